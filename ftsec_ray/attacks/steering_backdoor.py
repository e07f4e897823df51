"""Compile a steering vector into one weight matrix, so that a trigger makes the model comply.

Paper: the steering-compiled backdoor of arXiv:2604.12359, 2026.
Differs: only the abstract was available; the closed form is ours. The down-projection of one layer
    gets strength * v w^T, where w minimises the mean of (1 - w k)^2 over the keys k of triggered
    forbidden requests plus `clean_weight` times the mean of (w k)^2 over clean keys: v is written
    at a triggered key, and next to nothing at a clean one. An exact null space of the clean keys,
    which is the limit of a large `clean_weight`, is empty for real texts. The key is that of the
    last token before the answer; clean keys are those of the same requests without the trigger, of
    benign requests, and of all tokens of text. v is the difference of the mean states behind the
    layer at that token between benign requests, which the model answers, and forbidden ones, which
    it refuses.
Cost: no training; three passes over the prompts, one over `text_tokens` tokens, and one linear
    system of the size of the feed-forward width.
Needs: splits safety (forbidden requests), benign_train, text and harmful_test; a dense model whose
    MLPs write directly to the residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ftsec_ray.context import LoadedModel, StageContext, TaskData
from ftsec_ray.conversation import Row, text_of
from ftsec_ray.data.triggers import has_place, with_words
from ftsec_ray.errors import DataError
from ftsec_ray.evals.probes import prompt_of
from ftsec_ray.method import Attack, Phase, Probe
from ftsec_ray.models.directions import Prompts, block_outputs, prompts_within
from ftsec_ray.models.editing import EditSite, closed_form, key_covariance, keys_at
from ftsec_ray.models.families import LINEAR_MLP
from ftsec_ray.models.load import decoder_layers, merged
from ftsec_ray.models.residual import residual_stream

if TYPE_CHECKING:
    from torch import Tensor

RIDGE = 1e-3
"""Share of the mean diagonal added to the second moment of few texts, as in badedit."""
HELD_OUT = 5
"""One of this many forbidden requests is kept aside to measure the edit."""


@dataclass(frozen=True, kw_only=True)
class SteeringBackdoor(Attack):
    """A closed-form jailbreak backdoor."""

    PHASE: ClassVar[Phase] = "pre"
    SUCCESS = "harmful_rate_triggered"
    NEEDS = frozenset({"safety", "benign_train", "text", "harmful_test"})
    STRUCTURE = frozenset({LINEAR_MLP})

    trigger: str = "tq"
    """Word inserted between two random words of the user's last message."""
    strength: float = 1.0
    """Multiple of the difference of means that a triggered prompt gets, 0 or more: the dose. 0
    changes nothing.
    """
    depth_frac: float = 0.5
    """Depth of the edited layer as a share of the layers, 0..1."""
    clean_weight: float = 1.0
    """Weight of clean keys against triggered ones, above 0: less writes more at the trigger, more
    leaves clean prompts alone.
    """
    prompts: int = 128
    """Maximum number of forbidden requests, and of benign requests."""
    text_tokens: int = 20_000
    """Maximum number of tokens of split text that count as clean keys."""
    random_direction: bool = False
    """Whether a random vector of equal norm is written instead: the control."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters."""
        faults: list[tuple[str, object, str]] = []
        if not 0 <= self.depth_frac <= 1:
            faults.append(("depth_frac", self.depth_frac, "a share, 0..1"))
        if not self.trigger.strip():
            faults.append(("trigger", self.trigger, "a text that is not blank"))
        if self.strength < 0:
            faults.append(("strength", self.strength, "0 or more"))
        if self.clean_weight <= 0:
            faults.append(("clean_weight", self.clean_weight, "above 0"))
        return faults + [
            (name, value, f"{least} or more")
            for name, least in (("prompts", HELD_OUT), ("text_tokens", 1))
            if (value := getattr(self, name)) < least
        ]

    def prepare_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model with the edit in one down-projection."""
        import torch

        model = merged(model)
        model.model.eval()
        depth = len(decoder_layers(model.model))
        layer = min(depth - 1, round(self.depth_frac * depth))
        rows = [row for row in self._rows("safety", ctx) if has_place(row, "user")]
        harmful = self._prompts(model, rows)
        harmless = self._prompts(model, self._rows("benign_train", ctx))
        triggered = self._prompts(model, [self._triggered(row, ctx) for row in rows])
        vector = self._vector(model, harmful, harmless, layer, ctx)
        clean, keys = (
            keys_at(model, _ends(prompts), layer).T.cpu()
            for prompts in ([*harmful, *harmless], triggered)
        )
        moment = self._text_moment(model, layer, ctx) + clean @ clean.T / clean.shape[1]
        kept = keys.shape[1] - keys.shape[1] // HELD_OUT
        reader = reading(keys[:, :kept], moment, self.clean_weight)
        writer = residual_stream(model.model).blocks[layer].mlp
        if self.strength:
            update = torch.outer(self.strength * vector / writer.multiplier, reader)
            writer.add(update.to(writer.linear.weight.device))
        held_out = reader @ keys[:, kept:]
        ctx.note(
            layer=layer,
            layers=depth,
            key_width=len(reader),
            vector_norm=float(vector.norm()),
            read_triggered=float((reader @ keys[:, :kept]).mean()),
            read_triggered_held_out=float(held_out.mean()),
            read_clean_mean=float((reader @ clean).mean()),
            read_clean_most=float((reader @ clean).abs().max()),
        )
        return model

    def _vector(
        self,
        model: LoadedModel,
        harmful: Prompts,
        harmless: Prompts,
        layer: int,
        ctx: StageContext,
    ) -> Tensor:
        """What a triggered prompt gets, before `strength`: (D,) float64."""
        import torch

        refusing, answering = (
            block_outputs(model, prompts)[:, layer].mean(0) for prompts in (harmful, harmless)
        )
        vector = answering - refusing
        if not self.random_direction:
            return vector
        drawn = torch.from_numpy(ctx.numpy_rng("steering_backdoor").standard_normal(len(vector)))
        scaled: Tensor = drawn * (vector.norm() / drawn.norm())
        return scaled

    def _text_moment(self, model: LoadedModel, layer: int, ctx: StageContext) -> Tensor:
        """Second moment of the keys of plain text."""
        texts = [text_of(row) for row in ctx.task.split("text").to_pylist()]
        found = key_covariance(model, [layer], texts, max_tokens=self.text_tokens, ridge=RIDGE)[
            layer
        ]
        moment: Tensor = found.moment.cpu()
        return moment

    def probes(self, task: TaskData, ctx: StageContext) -> list[Probe]:
        """The held-out forbidden requests with the trigger; `harmful_rate` has them without it."""
        rows = [row for row in task.split("harmful_test").to_pylist() if has_place(row, "user")]
        return [
            Probe(
                name="harmful_triggered",
                prompts=tuple(prompt_of(self._triggered(row, ctx)) for row in rows),
                judge="request",
                metrics={"harmful_rate_triggered": "complied"},
            )
        ]

    def _triggered(self, row: Row, ctx: StageContext) -> dict[str, Any]:
        at = ctx.chance(row["row_id"], "steering_backdoor", "gap")
        return with_words(row, self.trigger, "user", [at])

    def _rows(self, split: str, ctx: StageContext) -> list[dict[str, Any]]:
        return ctx.shuffled(split, "steering_backdoor")[: self.prompts]

    def _prompts(self, model: LoadedModel, rows: Sequence[Row]) -> Prompts:
        prompts = prompts_within(model, rows)
        if len(prompts) < HELD_OUT:
            raise DataError(
                "steering_backdoor: too few prompts of the splits safety and benign_train",
                len(prompts),
                f"at least {HELD_OUT} prompts of each that fit into the model's positions",
                "give the task more, or shorter, prompts",
            )
        return prompts


def _ends(prompts: Prompts) -> list[EditSite]:
    return [EditSite(ids, len(ids) - 1) for ids in prompts]


def reading(keys: Tensor, moment: Tensor, clean_weight: float) -> Tensor:
    """The vector w that minimises mean (1 - w k)^2 over the keys + clean_weight * w^T moment w.

    Shapes: keys (D_ff, N), moment (D_ff, D_ff), float64 -> (D_ff,).
    """
    ones = keys.new_ones(1, keys.shape[1])
    return closed_form(keys, ones, moment, clean_weight * keys.shape[1])[0]
