"""How much memory a stage takes, by arithmetic on the shape of its model.

Bytes in each of `n` processes that train, by DeepSpeed's ZeRO stage; a process alone is stage 0
with n = 1. All weights and those that train count apart: an adapter trains only its factors. The
frozen base of an adapter keeps its dtype (b bytes a weight: 4, 2, or packed 1 and 0.56 for its
linear layers); whole weights train in float32 whatever their dtype.

| bytes per                            | stage 0 | 1   | 2   | 3       | optimizer off | all off |
|---|---|---|---|---|---|---|
| weight: b itself                     | b       | b   | b   | b/n     |               | 0       |
| float32 weight on a GPU: 2 bf16 copy | 2       | 2   | 2   | of live |               |         |
| trained weight: 4 gradient           | 4       | 4   | 4/n | 4/n     | 0 (stage 2 on) |        |
| trained weight: 8 moments of AdamW   | 8       | 8/n | 8/n | 8/n     | 0             |         |
| trained weight: 4 DeepSpeed's master | 0       | 4/n | 4/n | 4/n     | 0             |         |

Stage 3 also holds the weights that are whole at the moment: LIVE and the embedding, at most all.
From stage 1 on there are buckets for messages, BUCKET float32 numbers each. Beside all that lie
activations (`block_bytes`), logits (no more than one slice of them, see models.logits), the models
that a worker keeps (a worker group keeps them in host memory), and what CUDA itself takes. Host
memory of a worker group is two models per process, and what is offloaded.

tests/benchmarks/bench_memory.py sets this beside measured peaks of processes on a CPU. What a GPU
alone has (bf16 copies, casts of inputs, CUDA's own) is arithmetic that no measurement has checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ftsec_ray.models.logits import LOGITS_AT_A_TIME
from ftsec_ray.training.zero import BUCKET, LIVE

Adapter = Literal["lora", "full"]
CUDA_GIB = 1.0
"""Context, kernels and fragments of one process on a GPU."""
MAX_VOCABULARY = 128_256
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
PACKED = {"int8": 1.0, "nf4": 0.5 + 4 / 64}
"""Bytes of a packed weight: nf4 keeps a float32 scale for each block of 64."""
_GRADIENT, _ADAMW, _AUTOCAST, _MASTER = 4, 8, 2, 4
_BUCKETS = 3
"""Two for gradients, of which one fills while the other is sent, and one for weights."""
_GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder."""

    parameters: int
    width: float
    depth: float
    mlp: float
    """Width between the linear layers of an MLP."""
    vocabulary: float
    is_tied: bool = True
    """Whether the head is the embedding."""

    @property
    def embedding(self) -> float:
        """Weights of the embedding, and of the head where it is another."""
        return self.vocabulary * self.width * (1 if self.is_tied else 2)

    def trained(self, adapter: Adapter, rank: int) -> float:
        """Weights that train: all, or two factors for each of the seven linear layers of a block
        (four of width x width, three between width and mlp).
        """
        if adapter == "full":
            return self.parameters
        return rank * self.depth * (11 * self.width + 3 * self.mlp)


def guessed_shape(parameters: int) -> Shape:
    """A decoder's usual shape: 12 x width^2 weights per layer, 100 units of width per layer, an MLP
    of 8/3 the width; the embedding takes a third of a small model, and is seldom above that of
    Llama 3.
    """
    width = (100 * parameters / 12) ** (1 / 3)
    vocabulary = min(MAX_VOCABULARY, parameters / (3 * width))
    return Shape(parameters, width, max(1.0, width / 100), 8 / 3 * width, vocabulary)


def weight_bytes(shape: Shape, dtype: str, quantization: str = "none") -> float:
    """Bytes of the weights of a model as it is kept in memory."""
    if quantization == "none":
        return BYTES[dtype] * shape.parameters
    outside = min(shape.embedding, shape.parameters)
    return BYTES[dtype] * outside + PACKED[quantization] * (shape.parameters - outside)


def block_bytes(shape: Shape, adapter: Adapter, dtype: str, *, on_gpu: bool) -> float:
    """Bytes per token that one block keeps for its backward pass.

    Norms keep their input in float32, and what they multiply by their weight where that trains.
    Linear layers whose weight or adapter trains keep their input: all that read a norm the same
    tensor, or, where each casts it to the dtype that it computes in, one copy each (bf16 under the
    autocast of a GPU; float32 for the adapters of a half-precision base on a CPU). The attention
    keeps queries, keys and values, repeated to the width of the queries, and its output; the MLP
    the output of two linear layers, of its activation, and of their product.
    """
    d, f = shape.width, shape.mlp
    is_half = adapter == "lora" and dtype != "float32"
    product = 2.0 if on_gpu or is_half else 4.0
    norms = 2 * 4 * d * (2 if adapter == "full" else 1)
    attention, mlp = product * 4 * d, product * 3 * f
    if on_gpu or is_half:
        cast = 2.0 if on_gpu else 4.0
        return norms + attention + mlp + cast * (6 * d + f)
    return norms + attention + mlp + product * (3 * d + f)


def memory_gib(
    shape: Shape | int,
    adapter: Adapter,
    max_length: int,
    micro_batch: int,
    zero_stage: int = 0,
    workers: int = 1,
    *,
    rank: int = 8,
    dtype: str = "float32",
    quantization: str = "none",
    checkpointing: bool = False,
    on_gpu: bool = True,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
) -> float:
    """GiB that one process of a tune takes, without what it keeps of other models; by the table
    above.

    Args:
        shape: sizes of the model; a count of weights stands for the usual shape.
        adapter: `lora` trains factors beside frozen weights, `full` every weight.
        max_length: tokens per row, at most.
        micro_batch: rows per forward pass.
        zero_stage: DeepSpeed ZeRO, 0..3: what is split over the workers (1 optimizer, 2 gradients
            too, 3 weights too).
        workers: processes of the tune, one GPU each.
        rank: of the LoRA factors.
        dtype: of the model's weights.
        quantization: of the frozen weights under an adapter.
        checkpointing: whether blocks are computed again in the backward pass.
        on_gpu: whether products run under bf16 autocast, beside CUDA's own memory.
        offload_optimizer: whether moments and master stay in host memory.
        offload_parameters: whether weights do so between their uses.
    """
    shape = guessed_shape(shape) if isinstance(shape, int) else shape
    trained = shape.trained(adapter, rank)
    kept_in = "float32" if adapter == "full" else dtype
    own = weight_bytes(shape, kept_in, quantization) + (4 * trained if adapter == "lora" else 0.0)
    by_weights, by_gradients, by_moments = (
        workers if zero_stage >= stage else 1 for stage in (3, 2, 1)
    )
    weights = shape.parameters + (trained if adapter == "lora" else 0.0)
    live = weights if zero_stage < 3 else min(weights, LIVE + shape.embedding)  # noqa: PLR2004
    held = 0.0 if offload_parameters else own / by_weights
    # half-precision and packed weights are multiplied as they are
    held += _AUTOCAST * live if on_gpu and kept_in == "float32" else 0.0
    held += BYTES[kept_in] * live if zero_stage == 3 else 0.0  # noqa: PLR2004
    held += 0.0 if offload_optimizer and zero_stage > 1 else _GRADIENT * trained / by_gradients
    held += (
        0.0
        if offload_optimizer
        else (_ADAMW + (_MASTER if zero_stage else 0)) * trained / by_moments
    )
    held += _BUCKETS * 4 * min(BUCKET, trained) if zero_stage else 0.0
    tokens = micro_batch * max_length
    held += tokens * _activations(
        shape, adapter, kept_in, checkpointing=checkpointing, on_gpu=on_gpu
    )
    held += _logits(shape, tokens, kept_in)
    return held / _GIB + (CUDA_GIB if on_gpu else 0.0)


def _activations(
    shape: Shape,
    adapter: Adapter,
    dtype: str,
    *,
    checkpointing: bool,
    on_gpu: bool,
) -> float:
    """Bytes per token of all blocks, or of their inputs and one block that is computed again."""
    block = block_bytes(shape, adapter, dtype, on_gpu=on_gpu)
    if not checkpointing:
        return shape.depth * block
    return shape.depth * BYTES[dtype] * shape.width + block


def _logits(shape: Shape, tokens: int, dtype: str) -> float:
    """Bytes of the logits of a slice in float32, their log-softmax and their gradient, and of the
    logits and their gradient in the dtype of the model where that is another.
    """
    each = 3 * 4.0 + (0.0 if dtype == "float32" else 2 * BYTES[dtype])
    return each * min(tokens * shape.vocabulary, LOGITS_AT_A_TIME)


def inference_gib(
    shape: Shape | int,
    *,
    models: int,
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    dtype: str = "float32",
    quantization: str = "none",
    changes_weights: bool = False,
) -> float:
    """GiB of a stage that runs or rewrites models: their weights, the key-value cache, the logits
    of the prompts; a method that changes weights does so on a copy in float32.
    """
    shape = guessed_shape(shape) if isinstance(shape, int) else shape
    each = weight_bytes(shape, dtype, quantization)
    more = BYTES["float32"] * shape.parameters - each if changes_weights else 0.0
    cache = batch * (prompt_tokens + new_tokens) * 2 * BYTES[dtype] * shape.width * shape.depth
    logits = batch * prompt_tokens * 4 * shape.vocabulary
    return (models * each + max(0.0, more) + cache + logits) / _GIB + CUDA_GIB
