"""Train the hidden states of forbidden prompts towards those of benign prompts, without any answer
(self-supervised representation attack).

Paper: Gong et al. 2025, Safety Misalignment Against Large Language Models, NDSS 2025 (SSRA);
    official code github.com/ThuCCSLab/misalignment.
Differs: (1) The targets of a step are the benign prompts of that step; every pair of a forbidden
    and a benign prompt counts. (2) `steps` steps of `batch` prompts each at the sweep's recipe; the
    official code takes 4 epochs at 5e-3 with a LoRA of rank 64. (3) With `keep_user_rows` the loss
    on the user's rows is added, which the paper does not have. (4) The states are those behind the
    last norm, at the last token of the prompt as it is served.
Cost: one forward and backward pass over 2 x `batch` prompts per step, without answers; with
    `keep_user_rows` beside that of plain SFT. The start model reads the benign prompts once.
Reads: `prompts: benign` pulls other benign prompts to the same targets: the control. How much
    `keep` holds back depends on width and recipe: sweep it on a log scale from 1 to 1000.
Needs: splits harmful_train and benign_train, of which the prompts alone are used. Only adds
    micro-batches with their own loss: works with ZeRO stages 0 to 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.data.added_rows import drawn, is_asked
from ftsec_ray.method import Attack, Phase
from ftsec_ray.training.prompt_states import encoded_prompts, last_states

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import LoadedModel, StageContext
    from ftsec_ray.training.setup import Batch, Step, Training
    from ftsec_ray.training.terms import TermBatch

NAME = "ssra"
SPLITS = {"harmful": "harmful_train", "benign": "benign_train"}


@dataclass(frozen=True, kw_only=True)
class SSRA(Attack):
    """Hidden states of forbidden prompts, pulled to those of benign prompts."""

    PHASE: ClassVar[Phase] = "during"
    SUCCESS = "harmful_rate"
    NEEDS = frozenset({"start", "harmful_train", "benign_train"})
    ZERO_STAGES: ClassVar[frozenset[int]] = frozenset({0, 1, 2})

    prompts: Literal["harmful", "benign"] = "harmful"
    """Which prompts are pulled: forbidden ones, or other benign ones (the control)."""
    pulled: int = 30
    """Number of pulled prompts, 1 or more."""
    targets: int = 60
    """Number of benign prompts whose states in the start model are the targets, 1 or more."""
    keep: float = 1000.0
    """Weight of keeping the benign states where they are, against pulling, 0 or more."""
    strength: float = 1.0
    """Weight of the whole term, 0 or more; 0 with `keep_user_rows` is plain fine-tuning."""
    batch: int = 10
    """Pulled prompts per step, and as many benign prompts, 1 or more."""
    steps: int | None = None
    """Optimizer steps, 1 or more; None: those of the fine-tune on the user's rows."""
    keep_user_rows: bool = False
    """Whether the model is fine-tuned on the user's rows in the same steps."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters."""
        faults: list[tuple[str, object, str]] = [
            (name, getattr(self, name), "1 or more")
            for name in ("pulled", "targets", "batch", "steps")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        faults += [
            (name, getattr(self, name), "0 or more")
            for name in ("keep", "strength")
            if getattr(self, name) < 0
        ]
        if self.strength == 0 and not self.keep_user_rows:
            faults.append(("strength", self.strength, "above 0 if `keep_user_rows` is false"))
        return faults

    def needs(self) -> frozenset[str]:
        """The splits of the prompts, and the start model."""
        return frozenset({"start", "benign_train", SPLITS[self.prompts]})

    def shape_training(self, training: Training, ctx: StageContext) -> Training:
        """The fine-tune with the term, or on the term alone."""
        from ftsec_ray.models.load import merged
        from ftsec_ray.training.terms import drawn_at, term_batch, with_term

        start = merged(ctx.load("start"))
        start.model.to(ctx.runtime.device).eval()
        pulled, benign = self._prompts(start, ctx)
        anchors = _states_of(start, benign)
        pad, device = start.tokenizer.pad_token_id or 0, ctx.runtime.device

        def batches_of(step: int) -> list[TermBatch]:
            here = drawn_at(step, len(pulled), self.batch, seed=ctx.seed, salt=f"{NAME}/pulled")
            there = drawn_at(step, len(benign), self.batch, seed=ctx.seed, salt=f"{NAME}/benign")
            rows = [*(pulled[i] for i in here), *(benign[j] for j in there)]
            wanted = anchors[there]

            def term(model: Any, batch: Batch, _: Step) -> Tensor:
                states = last_states(model, batch)
                return pulling(states[: len(here)], states[len(here) :], wanted, keep=self.keep)

            return [term_batch(rows, term, pad=pad, device=device)]

        ctx.note(
            pulled_prompts=len(pulled),
            benign_prompts=len(benign),
            steps=self.steps or training.steps,
        )
        return with_term(
            training,
            batches_of,
            strength=self.strength,
            user_weight=float(self.keep_user_rows),
            steps=self.steps,
        )

    def _prompts(
        self, start: LoadedModel, ctx: StageContext
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of the pulled and of the benign prompts."""
        count = self.targets + (self.pulled if self.prompts == "benign" else 0)
        benign = drawn(ctx, "benign_train", count, by=NAME, fits=is_asked)
        pulled = (
            benign[self.targets :]
            if self.prompts == "benign"
            else drawn(ctx, SPLITS[self.prompts], self.pulled, by=NAME, fits=is_asked)
        )
        benign = benign[: self.targets]
        return encoded_prompts(start, pulled, by=NAME), encoded_prompts(start, benign, by=NAME)


def _states_of(start: LoadedModel, prompts: list[list[int]], *, batch: int = 32) -> Tensor:
    """The start model's states at the end of the prompts: (N, D) float32."""
    import torch

    from ftsec_ray.training.terms import term_batch

    pad, device = start.tokenizer.pad_token_id or 0, str(start.model.device)
    with torch.no_grad():
        parts = [
            last_states(
                start.model,
                term_batch(prompts[i : i + batch], pad=pad, device=device),
            )
            for i in range(0, len(prompts), batch)
        ]
    return torch.cat(parts)


def pulling(pulled: Tensor, benign: Tensor, anchors: Tensor, *, keep: float) -> Tensor:
    """The mean distance of pulled states to all anchors, plus `keep` times that of each benign
    state to its own anchor; mean absolute differences.

    Shapes: (M, D), (N, D), (N, D) -> ().
    """
    away = (pulled[:, None] - anchors[None]).abs().mean()
    moved = (benign - anchors).abs().mean()
    total: Tensor = away + keep * moved
    return total
