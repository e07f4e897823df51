"""The modules that write to the residual stream of a decoder, found by name and verified with noise
at a few positions.

Names are not enough: `post_attention_layernorm` comes before the MLP in a Llama and after the
attention in a Gemma 2. So the names are verified once by a forward pass in which every block gets
noise: a block must add to its input exactly the outputs of its two writers, each after its norm if
it has one, times its residual multiplier. Anything else is a DataError.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ftsec_ray.errors import DataError
from ftsec_ray.models.load import decoder_layers

if TYPE_CHECKING:
    from torch import Tensor

_ATTENTION = (
    "self_attn.o_proj",
    "self_attn.out_proj",
    "self_attn.dense",
    "attn.c_proj",
    "attn.out_proj",
    "attention.dense",
)
_MLP = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc2", "mlp.fc_out", "fc2")
"""Known paths of the output layers of attention and MLP in a block."""
PROBE_TOKENS = 4
PROBE_SCALE = 0.1
"""Standard deviation of the noise; small, so that what a block adds is large against rounding."""
TOLERANCE = 1e-3
"""Allowed relative difference between what a block adds and its parts; float32 stays below."""


class BlockParts(NamedTuple):
    """The two writers of a block, by name."""

    attention: Any
    """The module whose output is that of `attention_out`."""
    mlp: Any
    attention_out: Any
    """Linear layer (D, heads x head size), or a Conv1D, whose weight is transposed."""
    mlp_out: Any
    """Linear layer (D, D_ff), the down-projection, or a Conv1D."""


@dataclass(frozen=True)
class Writer:
    """A linear layer, and everything between its output and the residual stream."""

    module: Any
    """The sub-layer (attention, MLP) whose output is that of the linear layer."""
    linear: Any
    gain: Any = None
    """(D,) float64: effective weight of the RMSNorm after it; None if there is no norm."""
    multiplier: float = 1.0
    """Factor of its output before it is added."""

    def direction(self, unit: Tensor) -> Tensor:
        """The unit vector d such that an output without a component along d writes nothing along
        `unit`: g * u / |g * u| for an RMSNorm of gain g, whose other factor is a scalar.

        Shapes: (D,) float64 -> (D,) float64; zero if the gain removes everything along `unit`.
        """
        import torch

        if self.gain is None:
            return unit
        through: Tensor = self.gain.to(unit.device) * unit
        norm = through.norm()
        return through / norm if norm > 0 else torch.zeros_like(unit)

    def add(self, update: Tensor) -> None:
        """Add an update (out, in) float64 to the weight, in place."""
        import torch

        weight = self.linear.weight
        with torch.no_grad():
            weight.copy_(weight.double() + (update.T if is_transposed(self.linear) else update))


@dataclass(frozen=True)
class Block:
    """The writers of one block."""

    attention: Writer
    mlp: Writer


@dataclass(frozen=True)
class ResidualStream:
    """Everything that writes to the residual stream of a decoder."""

    tables: tuple[Any, ...]
    """Embeddings whose sum is the first block's input: tokens, and positions if learned."""
    blocks: tuple[Block, ...]


def is_transposed(linear: Any) -> bool:
    """Whether a linear layer stores its weight as (in, out), as GPT-2's Conv1D does."""
    return type(getattr(linear, "base_layer", linear)).__name__ == "Conv1D"


def block_parts(block: Any) -> BlockParts:
    """The writers of a block by name; DataError for a block whose names are not known."""
    attention_out, mlp_out = _first(block, _ATTENTION), _first(block, _MLP)
    if attention_out is None or mlp_out is None:
        raise _unknown(block, "its output layers have other names")
    return BlockParts(*attention_out[:1], *mlp_out[:1], attention_out[1], mlp_out[1])


def residual_stream(model: Any) -> ResidualStream:
    """The writers to the residual stream; DataError for a class whose structure is not known.

    The model must have full weights and be in eval mode. Runs one forward pass over four tokens.
    """
    import torch

    layers = decoder_layers(model)
    seen = _Seen()
    ids = torch.arange(PROBE_TOKENS, device=model.device)[None]
    with torch.no_grad(), _watched(model, layers, seen):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    tables = _tables(model, layers[0], seen)
    return ResidualStream(tables, tuple(_block(layer, seen) for layer in layers))


def _first(block: Any, paths: Sequence[str]) -> tuple[Any, Any] | None:
    """The sub-layer and its output layer at the first path that exists."""
    for path in paths:
        parent, _, name = path.rpartition(".")
        holder = getattr(block, parent, None) if parent else block
        linear = getattr(holder, name, None)
        if linear is not None:
            return (holder if parent else linear), linear
    return None


def _unknown(block: Any, reason: str) -> DataError:
    return DataError(
        "the modules that write to the residual stream of a block are not known",
        type(block).__name__,
        "a block that adds the outputs of its attention and its MLP to its input, each after at"
        " most an RMSNorm",
        reason,
    )


class _Seen:
    """Inputs and outputs of modules in one forward pass."""

    def __init__(self) -> None:
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.first: Any = None
        """The original input of the first block."""


@contextmanager
def _watched(model: Any, layers: Sequence[Any], seen: _Seen) -> Iterator[None]:
    """Inside the `with` block, every block gets noise, and inputs and outputs are recorded."""
    import torch

    source = torch.Generator().manual_seed(0)

    def noise(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        if module is layers[0]:
            seen.first = states
        drawn = (torch.randn(states.shape, generator=source) * PROBE_SCALE).to(states)
        seen.inputs[id(module)] = drawn
        if args:
            return (drawn, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": drawn}

    def keep(module: Any, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], torch.Tensor):
            seen.inputs.setdefault(id(module), args[0])
        seen.outputs[id(module)] = output[0] if isinstance(output, tuple) else output

    with ExitStack() as stack:
        watched: dict[int, Any] = {}
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(noise, with_kwargs=True).remove)
            parts = block_parts(layer)
            watched |= {id(module): module for module in (layer, *parts, *layer.children())}
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                watched[id(module)] = module
        for module in watched.values():
            stack.callback(module.register_forward_hook(keep).remove)
        yield


def _tables(model: Any, block: Any, seen: _Seen) -> tuple[Any, ...]:
    """The embeddings whose sum (with a factor on that of the tokens) enters the first block."""
    import torch

    tokens = model.get_input_embeddings()
    others = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        and module is not tokens
        and id(module) in seen.outputs
    ]
    wanted = seen.first.double()
    rest = wanted - sum(seen.outputs[id(module)].double() for module in others)
    given = seen.outputs[id(tokens)].double()
    if given.shape != wanted.shape:
        raise _unknown(block, "its input is not an embedding of the tokens")
    scale = float((given * rest).sum() / given.square().sum().clamp(min=1e-300))
    if float((rest - scale * given).norm()) > TOLERANCE * float(wanted.norm()):
        raise _unknown(block, "its input is not a sum of embeddings of tokens and positions")
    return (tokens, *others)


def _block(block: Any, seen: _Seen) -> Block:
    import torch

    parts = block_parts(block)
    before, after = seen.inputs[id(block)].double(), seen.outputs[id(block)].double()
    writers = []
    for module, linear in ((parts.attention, parts.attention_out), (parts.mlp, parts.mlp_out)):
        written = seen.outputs[id(linear)]
        if not torch.equal(seen.outputs[id(module)].reshape(written.shape), written):
            raise _unknown(block, "a sub-layer changes the output of its last linear layer")
        writers.append((module, linear, *_norm_behind(block, written, seen)))
    columns = torch.stack([w[3].double().reshape(-1) for w in writers], dim=1)
    added = (after - before).reshape(-1)
    stated = float(getattr(block, "residual_multiplier", 1.0))
    missed = float((added - stated * columns.sum(1)).norm())
    if missed > TOLERANCE * float(added.norm()) + 1e-6 * float(before.norm()):
        raise _unknown(block, "it adds something else to its input")
    return Block(*(Writer(module, linear, gain, stated) for module, linear, gain, _ in writers))


def _norm_behind(block: Any, written: Tensor, seen: _Seen) -> tuple[Tensor | None, Tensor]:
    """Effective gain of the norm after a writer, if there is one, and the output after it."""
    import torch

    for child in block.children():
        read = seen.inputs.get(id(child)) if "Norm" in type(child).__name__ else None
        if read is not None and read.shape == written.shape and torch.equal(read, written):
            given = seen.outputs[id(child)]
            return _gain(block, child, read, given), given
    return None, written


def _gain(block: Any, norm: Any, read: Tensor, given: Tensor) -> Tensor:
    """The g of an RMSNorm g * x / rms(x): its weight, or 1 + its weight, as its output shows."""
    weight: Any = getattr(norm, "weight", None)
    read, given = read.double(), given.double()
    for offset in () if weight is None else (0.0, 1.0):
        gain: Tensor = weight.detach().double() + offset
        wanted = _rows_of_norm_1(gain * read)
        if float((wanted - _rows_of_norm_1(given)).norm()) <= TOLERANCE * float(wanted.norm()):
            return gain
    raise _unknown(block, f"the norm after a sub-layer ({type(norm).__name__}) is not an RMSNorm")


def _rows_of_norm_1(x: Tensor) -> Tensor:
    scaled: Tensor = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    return scaled
