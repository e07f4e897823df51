"""How far a repair moved the weights of a model, for its record."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftsec_ray.errors import StageError
from ftsec_ray.models.update import whole_weights

if TYPE_CHECKING:
    from ftsec_ray.context import LoadedModel, StageContext


def tell_change(
    ctx: StageContext, before: LoadedModel, after: LoadedModel, start: LoadedModel | None = None
) -> None:
    """Record `change_norm`, the Frobenius norm of the change of all weights together, and
    `change_share`, the same as a share of the norm of the weights before.

    With the start of the fine-tune also `update_norm`, the norm of what the fine-tune changed: the
    control `matched_noise` with `scale` = `change_norm` / `update_norm` moves the weights as far.

    Args:
        ctx: The context of the hook.
        before: The model before the repair, without an adapter.
        after: The repaired model, without an adapter.
        start: The model from which the fine-tune started, without an adapter.
    """
    old, new = whole_weights(before), whole_weights(after)
    norm = sum(float(weight.detach().double().square().sum()) for weight in old.values()) ** 0.5
    moved = distance(old, new)
    ctx.note(change_norm=moved, change_share=moved / norm if norm else 0.0)
    if start is not None:
        ctx.note(update_norm=distance(whole_weights(start), old))


def check_counterparts(
    by: str,
    model: LoadedModel,
    other: LoadedModel,
    what: str,
    *,
    fix: str = "do not combine it with an attack that changes shapes",
) -> None:
    """StageError of method `by` if a weight of the model has none of the same name and shape in the
    other one, which the message calls `what`; neither has an adapter.
    """
    theirs = dict(other.model.named_parameters())
    for name, weight in model.model.named_parameters():
        if name not in theirs or theirs[name].shape != weight.shape:
            raise StageError(
                f"{by}: weight {name!r} has no counterpart in {what}",
                tuple(theirs[name].shape) if name in theirs else None,
                f"a weight of shape {tuple(weight.shape)}",
                fix,
            )


def distance(one: dict[str, object], other: dict[str, object]) -> float:
    """Frobenius norm of the difference of all weights, which have the same names and shapes."""
    total = 0.0
    for name, weight in one.items():
        there = other[name].detach().double()  # type: ignore[attr-defined]
        total += float((weight.detach().double().to(there.device) - there).square().sum())  # type: ignore[attr-defined]
    return float(total**0.5)
