"""Freezes the blocks in which forbidden prompts come apart from benign ones, and fine-tunes the
others.

Paper: Li et al. 2025, Safety Layers in Aligned Large Language Models: The Key to LLM Security,
    arXiv:2408.17003 (SPPFT); the official repository listen0425/Safety-Layers holds no code.
Differs: (1) `locate: gap` follows the paper's first step only: the mean angle between the states of
    a benign and a forbidden prompt, less that between two benign prompts, by block; the safety
    layers are those over which this gap opens. The rule for `opens` is ours: from the block at
    which the gap first exceeds `from_share` of its maximum to the one at which it first reaches
    `to_share`. The paper refines both ends by hand, by how many harmless requests are refused when
    the weights of a range are scaled. (2) With an adapter, the factors in these blocks stay at
    their start, so that the blocks are those of the start model; embeddings and head train as in
    the plain fine-tune.
Cost: a pass of the start model over `prompts` prompts; then less than plain fine-tuning.
Reads: `pick: random` freezes as many blocks, drawn at random: the control. With two or three
    blocks it often freezes the same ones: use a ladder size with more.
Needs: the model from which the fine-tune started and the task's `safety` and `benign_train` prompts
    (neither with `locate: depth`). Only freezes weights: works with ZeRO stages 0 to 3.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.errors import StageError
from ftsec_ray.method import Defense, Phase

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import LoadedModel, StageContext
    from ftsec_ray.training.setup import Training

NAME = "freeze_safety_layers"
LEAST_PROMPTS = 2


@dataclass(frozen=True, kw_only=True)
class FreezeSafetyLayers(Defense):
    """No gradient in the safety layers."""

    PHASE: ClassVar[Phase] = "during"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"start", "safety", "benign_train"})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"pick": "random"}

    locate: Literal["gap", "depth"] = "gap"
    """How the number and the place of the blocks are found: where the angle between benign and
    forbidden prompts opens in the start model, or at a fixed depth.
    """
    from_share: float = 0.1
    """`gap`: share of the largest gap at which the range begins; `depth`: share of the depth at
    which it begins. 0 to 1.
    """
    to_share: float = 0.9
    """`gap`: share of the largest gap at which the range ends; `depth`: share of the depth before
    which it ends. 0 to 1, at least `from_share`; at `depth`, an empty range freezes nothing.
    """
    prompts: int = 100
    """Maximum number of prompts of each kind, 2 or more (the paper: about 100)."""
    pick: Literal["located", "random"] = "located"
    """Which blocks are frozen: the located ones, or as many at random (the control)."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        faults: list[tuple[str, object, str]] = [
            (name, getattr(self, name), "a share, 0..1")
            for name in ("from_share", "to_share")
            if not 0.0 <= getattr(self, name) <= 1.0
        ]
        if self.to_share < self.from_share:
            faults.append(("to_share", self.to_share, f"{self.from_share} (from_share) or more"))
        if self.prompts < LEAST_PROMPTS:
            faults.append(("prompts", self.prompts, f"{LEAST_PROMPTS} or more"))
        return faults

    def needs(self) -> frozenset[str]:
        """The start model, and the prompts of `gap`."""
        return self.NEEDS if self.locate == "gap" else frozenset({"start"})

    def shape_training(self, training: Training, ctx: StageContext) -> Training:
        """The fine-tune without the weights of these blocks."""
        from ftsec_ray.models.load import decoder_layers

        start = ctx.load("start")
        depth = len(decoder_layers(start.model))
        located = self._by_gap(start, ctx) if self.locate == "gap" else self._by_depth(depth)
        frozen = located
        if self.pick == "random":
            rng = random.Random(f"{NAME} {ctx.seed}")  # noqa: S311
            frozen = sorted(rng.sample(range(depth), len(located)))
        ctx.note(located_blocks=located, frozen_blocks=frozen, blocks=depth)
        if len(frozen) == depth:
            raise StageError(
                "freeze_safety_layers: every block of the model would be frozen",
                f"{depth} of {depth} blocks",
                "a block that trains",
                "raise from_share, lower to_share, or exclude this model",
            )
        inside, before = of_blocks(frozen), training.is_trainable
        return replace(training, is_trainable=lambda name: before(name) and not inside(name))

    def _by_depth(self, depth: int) -> list[int]:
        return [i for i in range(depth) if self.from_share <= i / depth < self.to_share]

    def _by_gap(self, start: LoadedModel, ctx: StageContext) -> list[int]:
        """The blocks over which the gap opens; the gaps are recorded in degrees."""
        from ftsec_ray.models.directions import block_outputs
        from ftsec_ray.models.load import merged

        start = merged(start)
        start.model.to(ctx.runtime.device).eval()
        benign, forbidden = (
            block_outputs(start, self._prompts(start, ctx, split))
            for split in ("benign_train", "safety")
        )
        gaps = angle_gaps(benign, forbidden)
        ctx.note(gaps_degrees=[round(gap, 4) for gap in gaps])
        blocks = opening(gaps, self.from_share, self.to_share)
        if not blocks:
            ctx.warn(
                "freeze_safety_layers: forbidden prompts are no further from benign ones than those"
                " from each other in any block; no block is frozen"
            )
        return blocks

    def _prompts(self, start: LoadedModel, ctx: StageContext, split: str) -> list[list[int]]:
        from ftsec_ray.data.added_rows import is_asked
        from ftsec_ray.models.directions import prompts_within

        rows = [row for row in ctx.shuffled(split, NAME) if is_asked(row)][: self.prompts]
        found = prompts_within(start, rows)
        if len(found) < LEAST_PROMPTS:
            raise StageError(
                f"freeze_safety_layers: too few prompts in split {split!r}",
                len(found),
                f"{LEAST_PROMPTS} or more that fit into the model's positions",
                "add rows to the split, or set locate: depth",
            )
        ctx.note(**{f"prompts_{split}": len(found)})
        return found


def of_blocks(blocks: list[int]) -> Callable[[str], bool]:
    """Whether a parameter, by its name, belongs to one of these blocks."""
    from ftsec_ray.models.targets import layer_of

    chosen = frozenset(blocks)
    return lambda name: layer_of(name) in chosen


def angle_gaps(benign: Tensor, forbidden: Tensor) -> list[float]:
    """For every block, the mean angle between a benign and a forbidden prompt, less the mean angle
    between two different benign prompts, in degrees.

    Shapes: (N, L, D), (M, L, D) -> L numbers.
    """
    import torch

    def angles(one: Tensor, other: Tensor) -> Tensor:
        one, other = (x.double() for x in (one, other))
        one, other = (x / x.norm(dim=-1, keepdim=True).clamp(min=1e-300) for x in (one, other))
        return torch.rad2deg(torch.acos((one @ other.T).clamp(-1.0, 1.0)))

    gaps = []
    for block in range(benign.shape[1]):
        among = angles(benign[:, block], benign[:, block])
        count = len(among)
        inner = (among.sum() - among.diagonal().sum()) / (count * (count - 1))
        gaps.append(float(angles(benign[:, block], forbidden[:, block]).mean() - inner))
    return gaps


def opening(gaps: list[float], from_share: float, to_share: float) -> list[int]:
    """The blocks from the first whose gap exceeds `from_share` of the largest to the first that
    reaches `to_share` of it; none if no gap is positive.
    """
    most = max(gaps)
    if most <= 0.0:
        return []
    first = next(i for i, gap in enumerate(gaps) if gap > 0.0 and gap >= from_share * most)
    last = next(i for i, gap in enumerate(gaps) if i >= first and gap >= to_share * most)
    return list(range(first, last + 1))
