"""An adapter that starts from factors other than zero on a base that stays as it is.

While it trains, hooks take the product of the first factors off that of the trained ones. At the
end the adapter gets both pairs, and with them twice its rank: an ordinary adapter on the same base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftsec_ray.models.load import bare

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """The factors from which the adapter of a layer starts. Shapes: A (R, in), B (out, R)."""

    A: Any
    B: Any
    rank: int
    """Number of rows of A and columns of B that are set; the others are zero here, and keep their
    ordinary start in the trained factors.
    """

    def to(self, other: Tensor) -> Pair:
        """The same in the dtype and on the device of a tensor."""
        return Pair(self.A.to(other), self.B.to(other), self.rank)

    def write(self, A: Tensor, B: Tensor) -> None:
        """Give the trained factors their start, in place."""
        import torch

        with torch.no_grad():
            A[: self.rank] = self.A[: self.rank]
            B[:, : self.rank] = self.B[:, : self.rank]


def subtracted(module: Any, pair: Pair) -> Sequence[Any]:
    """Hooks on an adapted layer that take B0 A0 x off B A x, before the scale; each has `remove`.

    x is what the adapter itself reads, after dropout: at the start the difference is exactly zero.
    """
    held: list[Tensor] = []

    def read(_: Any, args: tuple[Tensor, ...], __: Tensor) -> None:
        from torch.nn.functional import linear

        held[:] = [linear(linear(args[0], pair.A), pair.B)]

    def take(_: Any, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output - held.pop()

    return (
        module.lora_A["default"].register_forward_hook(read),
        module.lora_B["default"].register_forward_hook(take),
    )


def widen_adapter(model: Any, pairs: Mapping[str, Pair]) -> None:
    """Append A0 and -B0 to the factors of an adapter, in place: twice the rank, the same scale.

    Args:
        model: A `peft.PeftModel`.
        pairs: Path of a layer in the model without adapter -> its pair; layers without one get
            zeros, because all layers of an adapter share its rank.
    """
    import torch

    config = model.peft_config["default"]
    rank = 2 * config.r
    for path, module in bare(model).named_modules():
        if not (hasattr(module, "lora_A") and "default" in module.lora_A):
            continue
        A, B = module.lora_A["default"], module.lora_B["default"]
        pair = pairs.get(path, Pair(torch.zeros_like(A.weight), torch.zeros_like(B.weight), 0))
        A.weight = torch.nn.Parameter(torch.cat([A.weight.detach(), pair.A]))
        B.weight = torch.nn.Parameter(torch.cat([B.weight.detach(), -pair.B], dim=1))
        A.out_features = B.in_features = module.r["default"] = rank
        alpha = module.scaling["default"] * rank
        module.lora_alpha["default"] = config.lora_alpha = alpha
        # as PEFT computes it when the adapter is loaded
        module.scaling["default"] = alpha / rank
        module.use_rslora["default"] = False
    config.r, config.use_rslora = rank, False
