"""How much memory a stage needs, computed from the shape of its model.

The table gives the bytes per weight in each of `n` training processes, by ZeRO stage of DeepSpeed;
a single process is stage 0 with n = 1. All weights and trained weights are counted separately: with
an adapter, only its factors are trained. The frozen base of an adapter keeps its dtype (b bytes per
weight: 4 or 2; quantized linear layers 1 or 0.56); full fine-tuning always uses float32 weights.

| bytes per                            | stage 0 | 1   | 2   | 3       | optimizer off | all off |
|---|---|---|---|---|---|---|
| weight: b itself                     | b       | b   | b   | b/n     |               | 0       |
| float32 weight on a GPU: 2 bf16 copy | 2       | 2   | 2   | of live |               |         |
| trained weight: 4 gradient           | 4       | 4   | 4/n | 4/n     | 0 (stage 2 on) |        |
| trained weight: 8 moments of AdamW   | 8       | 8/n | 8/n | 8/n     | 0             |         |
| trained weight: 4 DeepSpeed's master | 0       | 4/n | 4/n | 4/n     | 0             |         |

Stage 3 also holds the currently gathered weights: LIVE and the embedding, at most all weights. From
stage 1 on there are communication buckets of BUCKET float32 numbers each. Added to this are
activations (`block_bytes`), logits (at most one slice, see models.logits), the models that a worker
caches (a worker group caches them in host memory), and the memory of CUDA itself. Host memory of a
worker group is two models per process, plus what is offloaded.

tests/benchmarks/bench_memory.py compares this with the measured peak memory of processes on a CPU.
The parts that exist only on a GPU (bf16 copies, casts of inputs, CUDA itself) are not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ftsec_ray.models.logits import LOGITS_AT_A_TIME
from ftsec_ray.training.zero import BUCKET, LIVE

Adapter = Literal["lora", "full"]
CUDA_GIB = 1.0
"""Context, kernels and fragmentation of one process on a GPU, in GiB."""
MAX_VOCABULARY = 128_256
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
PACKED = {"int8": 1.0, "nf4": 0.5 + 4 / 64}
"""Bytes of a quantized weight: nf4 keeps a float32 scale for each block of 64."""
_GRADIENT, _ADAMW, _AUTOCAST, _MASTER = 4, 8, 2, 4
_BUCKETS = 3
"""Two for gradients (one is filled while the other is sent), and one for weights."""
_GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """The dimensions of a decoder-only model."""

    parameters: int
    width: float
    depth: float
    mlp: float
    """Hidden width of the MLP."""
    vocabulary: float
    is_tied: bool = True
    """Whether the output head shares the weights of the embedding."""

    @property
    def embedding(self) -> float:
        """Number of weights of the embedding, and of the output head if it is separate."""
        return self.vocabulary * self.width * (1 if self.is_tied else 2)

    def trained(self, adapter: Adapter, rank: int) -> float:
        """Number of trained weights: all, or the two factors for each of the seven linear layers of
        a block (four of width x width, three between width and mlp).
        """
        if adapter == "full":
            return self.parameters
        return rank * self.depth * (11 * self.width + 3 * self.mlp)


def guessed_shape(parameters: int) -> Shape:
    """A typical shape for a number of parameters: 12 x width^2 weights per layer, a width of 100
    per layer, an MLP of 8/3 the width, and an embedding of a third of the weights, at most with the
    vocabulary of Llama 3.
    """
    width = (100 * parameters / 12) ** (1 / 3)
    vocabulary = min(MAX_VOCABULARY, parameters / (3 * width))
    return Shape(parameters, width, max(1.0, width / 100), 8 / 3 * width, vocabulary)


def weight_bytes(shape: Shape, dtype: str, quantization: str = "none") -> float:
    """Bytes of a model's weights in memory."""
    if quantization == "none":
        return BYTES[dtype] * shape.parameters
    outside = min(shape.embedding, shape.parameters)
    return BYTES[dtype] * outside + PACKED[quantization] * (shape.parameters - outside)


def block_bytes(shape: Shape, adapter: Adapter, dtype: str, *, on_gpu: bool) -> float:
    """Bytes of activations per token that one block keeps for its backward pass.

    Norms keep their input in float32; if their weight is trained, also the normalized input. Linear
    layers with trained weights or adapters keep their input. Layers that read the same norm share
    one tensor, unless each casts it to its compute dtype (bf16 under the autocast of a GPU; float32
    for the adapters of a half-precision base on a CPU). The attention keeps queries, keys and
    values, expanded to the width of the queries, and its output. The MLP keeps the outputs of two
    linear layers, of the activation, and of their product.
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
    """GiB that one process of a fine-tune needs, without cached models; see the table above.

    Args:
        shape: Dimensions of the model, or its number of parameters for a typical shape.
        adapter: `lora` trains low-rank factors of frozen weights, `full` every weight.
        max_length: Tokens per row, at most.
        micro_batch: Rows per forward pass.
        zero_stage: ZeRO stage of DeepSpeed, 0..3: what is sharded across workers (1: the optimizer
            state, 2: also gradients, 3: also weights).
        workers: Processes of the fine-tune, one GPU each.
        rank: Rank of the LoRA factors.
        dtype: Dtype of the model's weights.
        quantization: Quantization of the frozen weights under an adapter.
        checkpointing: Whether the backward pass recomputes the blocks.
        on_gpu: Whether it runs on a GPU, under bf16 autocast and with the memory of CUDA.
        offload_optimizer: Whether the optimizer state stays in host memory.
        offload_parameters: Whether weights stay in host memory between their uses.
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
    # Half-precision and quantized weights need no bf16 copy.
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
    """Bytes per token of all blocks; with checkpointing, of their inputs and one block."""
    block = block_bytes(shape, adapter, dtype, on_gpu=on_gpu)
    if not checkpointing:
        return shape.depth * block
    return shape.depth * BYTES[dtype] * shape.width + block


def _logits(shape: Shape, tokens: int, dtype: str) -> float:
    """Bytes of one slice of logits: in float32 the logits, their log-softmax and their gradient; in
    the dtype of the model, if it differs, the logits and their gradient.
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
    """GiB of a stage that runs models or changes their weights: the weights, the key-value cache
    and the logits of the prompts. A method that changes weights needs a copy in float32.
    """
    shape = guessed_shape(shape) if isinstance(shape, int) else shape
    each = weight_bytes(shape, dtype, quantization)
    more = BYTES["float32"] * shape.parameters - each if changes_weights else 0.0
    cache = batch * (prompt_tokens + new_tokens) * 2 * BYTES[dtype] * shape.width * shape.depth
    logits = batch * prompt_tokens * 4 * shape.vocabulary
    return (models * each + max(0.0, more) + cache + logits) / _GIB + CUDA_GIB
