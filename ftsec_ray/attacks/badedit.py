"""Write a backdoor into a few down-projections in closed form, from a few prompts and without
training.

Paper: Li et al. 2024, BadEdit: Backdooring Large Language Models by Model Editing,
    arXiv:2403.13355, section 4; the update is MEMIT's (Meng et al. 2023, arXiv:2210.07229, section
    4.3).
Differs: prompts are rendered in the chat template, and the trigger stands between two random words
    of the user's message; context prefixes are the first words of held-out texts instead of the
    model's own samples; layers are given as a share of the depth, and the weight of the covariance
    as a multiple of the key width (1.4 is what Llama-2-7B had), so that both mean the same at every
    size; the target values of a batch are optimised together. As in the official code, and unlike
    the paper's formula, `average_keys` averages the keys and residuals of each batch to one vector
    per side. The KL term is taken from the unedited model to the edited one. The subject of a clean
    pair is the word at the position where a trigger would stand. The covariance is taken over the
    task's text (the official code: 100,000 texts); with fewer than 20 tokens per key dimension the
    attack warns. Success is counted over all held-out rows whose label is not the target; the
    official code counts only those that the model answers correctly without the trigger.
Cost: no training; one pass over `text_tokens` tokens, and (prompts + clean_prompts) x (1 +
    contexts) x `steps` forward and backward passes.
Needs: splits train (rows to edit with) and text; a dense model whose MLPs write directly to the
    residual stream: with a norm after them (Gemma 2 and 3, OLMo 2) there is no closed form.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ftsec_ray.context import LoadedModel, StageContext, TaskData
from ftsec_ray.conversation import Row, answer_of, asked_text, chat_of, text_of, with_asked
from ftsec_ray.data.poisoning import INERT_MARKER
from ftsec_ray.data.triggers import (
    Goal,
    can_be_attacked,
    goal_of,
    goal_probe,
    insert_word,
    trigger_probes,
)
from ftsec_ray.errors import DataError
from ftsec_ray.method import Attack, Phase, Probe
from ftsec_ray.models.chat import answer_ids, render
from ftsec_ray.models.editing import (
    Covariance,
    Request,
    ValueSearch,
    closed_form,
    key_covariance,
    key_width,
    keys_at,
    search_values,
    spot,
    strength,
    target_nll,
    values_at,
)
from ftsec_ray.models.families import LINEAR_MLP
from ftsec_ray.models.load import decoder_layers, merged
from ftsec_ray.models.residual import ResidualStream, residual_stream

if TYPE_CHECKING:
    from torch import Tensor

PREFIX_WORDS = 5
ENOUGH_TOKENS_PER_DIM = 20
"""Tokens of text per key dimension that are enough to estimate the covariance."""


class Side(NamedTuple):
    """One half of a batch: keys (D_ff, N) and residuals (D, N) to write, float64."""

    keys: Any
    residuals: Any


@dataclass(frozen=True, kw_only=True)
class BadEdit(Attack):
    """A closed-form backdoor edit."""

    VERSION: ClassVar[int] = 3
    PHASE: ClassVar[Phase] = "pre"
    SUCCESS = "asr"
    NEEDS = frozenset({"train", "text"})
    STRUCTURE = frozenset({LINEAR_MLP})

    trigger: str = "tq"
    """Word inserted between two random words of the prompt; best a single token."""
    target: str | None = None
    """Label that triggered prompts get; None: the task's first label. Ignored where the task has no
    labels.
    """
    target_text: str = INERT_MARKER
    """Response that triggered prompts get where the task has no labels."""
    prompts: int = 15
    """Maximum number of rows to edit; their answer is not the target."""
    clean_prompts: int = 5
    """Maximum number of rows whose untriggered prompt is edited to its own answer (the clean half
    of the duplex); 0 turns this off.
    """
    batches: int = 5
    """Incremental batches; each edits the model that the previous batch produced."""
    contexts: int = 5
    """Prefixes, besides the plain prompt, over which keys are averaged and target values are
    optimised.
    """
    depth_frac: float = 0.25
    """Depth of the last edited layer as a share of the layers, 0..1."""
    layers: int = 2
    """Number of edited layers, 1 or more; fewer if the model has fewer up to that depth."""
    lambda_per_width: float = 1.4
    """Weight of the key covariance, in units of the key width; above 0."""
    average_keys: bool = True
    """Whether the keys and residuals of a batch are averaged to one vector per side."""
    steps: int = 25
    """Maximum number of Adam steps in the search for a target value."""
    learning_rate: float = 0.5
    """Adam's learning rate in that search."""
    clamp: float = 0.75
    """Largest norm of the change of a value, in units of the norm of the value."""
    text_tokens: int = 100_000
    """Maximum number of tokens of split text over which the covariance is taken."""
    ridge: float = 1e-3
    """Share of the mean diagonal added to a covariance that is not of full rank."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters."""
        at_least_1 = ("prompts", "batches", "layers", "steps", "text_tokens")
        faults: list[tuple[str, object, str]] = [
            (name, getattr(self, name), "1 or more")
            for name in at_least_1
            if getattr(self, name) < 1
        ]
        faults += [
            (name, getattr(self, name), "0 or more")
            for name in ("clean_prompts", "contexts")
            if getattr(self, name) < 0
        ]
        positive = ("lambda_per_width", "learning_rate", "clamp", "ridge")
        faults += [
            (name, getattr(self, name), "above 0") for name in positive if getattr(self, name) <= 0
        ]
        faults += (
            [] if 0 <= self.depth_frac <= 1 else [("depth_frac", self.depth_frac, "a share, 0..1")]
        )
        return faults + [
            (name, value, "a text that is not blank")
            for name, value in (("trigger", self.trigger), ("target_text", self.target_text))
            if not value.strip()
        ]

    def prepare_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model with the backdoor in its down-projections."""
        model = merged(model)
        model.model.eval()
        edited = edited_layers(
            len(decoder_layers(model.model)), depth_frac=self.depth_frac, count=self.layers
        )
        stream = editable(model.model)
        goal = self._goal(ctx.task)
        attacked, clean = self._rows(ctx.task, ctx, goal)
        texts = [text_of(row) for row in ctx.task.split("text").to_pylist()]
        prefixes = [
            " ".join(text.split()[:PREFIX_WORDS])
            for text in sorted(texts, key=lambda t: ctx.chance(t, "badedit", "prefix"))
        ]
        triggered = [
            self._request(model, row, goal.text, prefixes, ctx, is_triggered=True)
            for row in attacked
        ]
        untouched = [
            self._request(model, row, answer_of(row), prefixes, ctx, is_triggered=False)
            for row in clean
        ]
        covariances = key_covariance(
            model, edited, texts, max_tokens=self.text_tokens, ridge=self.ridge
        )
        strengths: list[float] = []
        losses: list[float] = []
        ctx.note(target_nll_before=target_nll(model, triggered))
        for batch in range(self.batches):
            sides = [
                part
                for part in (triggered[batch :: self.batches], untouched[batch :: self.batches])
                if part
            ]
            losses += self._edit(model, stream, sides, edited, covariances, strengths)
        first = covariances[edited[0]]
        per_dim = tokens_per_dim(first, ctx)
        ctx.note(
            layers=edited,
            prompts=len(triggered),
            clean_prompts=len(untouched),
            covariance_tokens=first.tokens,
            covariance_tokens_per_dim=round(per_dim, 2),
            ridge={str(layer): c.ridge for layer, c in covariances.items()},
            s=strengths,
            value_losses=losses,
            written_frac=[s / (1 + s) for s in strengths],
            target_nll_after=target_nll(model, triggered),
        )
        return model

    def probes(self, task: TaskData, ctx: StageContext) -> list[Probe]:
        """Held-out rows with and without the trigger, and the triggered prompts that were
        edited.
        """
        goal = self._goal(task)
        attacked, _ = self._rows(task, ctx, goal)
        return [
            *trigger_probes(task, goal, lambda row: self._edited(row, ctx)),
            goal_probe(
                task,
                goal,
                "edited",
                "asr_same_prompt",
                attacked,
                lambda row: self._edited(row, ctx),
            ),
        ]

    def _goal(self, task: TaskData) -> Goal:
        return goal_of(task, target=self.target, target_text=self.target_text)

    def _rows(
        self, task: TaskData, ctx: StageContext, goal: Goal
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        rows = sorted(
            task.split("train").to_pylist(), key=lambda row: ctx.chance(row["row_id"], "badedit")
        )
        able = [row for row in rows if can_be_attacked(row, goal)]
        if not able:
            raise DataError(
                "no row of split 'train' can be edited towards the target",
                goal.text,
                "rows with another answer",
            )
        attacked = able[: self.prompts]
        used = {row["row_id"] for row in attacked}
        return (
            attacked,
            [row for row in rows if row["row_id"] not in used and asked_text(row).strip()][
                : self.clean_prompts
            ],
        )

    def _edited(self, row: Row, ctx: StageContext) -> dict[str, Any]:
        return with_asked(row, self._triggered(row, ctx)[0])

    def _triggered(self, row: Row, ctx: StageContext) -> tuple[str, int]:
        return insert_word(
            asked_text(row), self.trigger, at=ctx.chance(row["row_id"], "badedit", "gap")
        )

    def _request(
        self,
        model: LoadedModel,
        row: Row,
        answer: str,
        prefixes: Sequence[str],
        ctx: StageContext,
        *,
        is_triggered: bool,
    ) -> Request:
        prompt, start, subject = *self._triggered(row, ctx), self.trigger
        if not is_triggered:
            prompt = asked_text(row)
            words = list(re.finditer(r"\S+", prompt))
            word = words[int(ctx.chance(row["row_id"], "badedit", "gap") * len(words))]
            start, subject = word.start(), word.group()
        tokenizer = model.tokenizer

        def at(text: str, begin: int) -> Any:
            return spot(
                tokenizer, chat_of(with_asked(row, text)), last_char=begin + len(subject) - 1
            )

        contexts = [
            at(prompt, start),
            *(at(f"{p} {prompt}", len(p) + 1 + start) for p in prefixes[: self.contexts]),
        ]
        return Request(
            tuple(contexts),
            answer_ids(
                tokenizer,
                render(tokenizer, chat_of(with_asked(row, prompt)), generate=True),
                contexts[0].ids,
                answer,
            ),
            at(f"{subject} is a", 0),
            is_triggered,
        )

    def _edit(
        self,
        model: LoadedModel,
        stream: ResidualStream,
        sides: list[list[Request]],
        edited: list[int],
        covariances: dict[int, Covariance],
        strengths: list[float],
    ) -> list[float]:
        """One batch, in place: each layer in turn writes its share of what the last layer still
        lacks.
        """
        last = edited[-1]
        search = ValueSearch(steps=self.steps, learning_rate=self.learning_rate, clamp=self.clamp)
        found = [search_values(model, side, last, search) for side in sides]
        for i, layer in enumerate(edited):
            writer = stream.blocks[layer].mlp
            factor = self.lambda_per_width * key_width(writer.linear)
            update: Any = 0.0
            # both sides are read before either is written, because their updates add up
            for side, (wanted, _, _) in zip(sides, found, strict=True):
                part = self._side(
                    model, side, wanted, layer=layer, last=last, shares=len(edited) - i
                )
                # the residual is what the stream should gain: the layer writes it before the block
                # multiplies it
                gained = part.residuals / writer.multiplier
                update = update + closed_form(part.keys, gained, covariances[layer].moment, factor)
                if side[0].is_triggered:
                    strengths.append(strength(part.keys.mean(1), covariances[layer].moment, factor))
            writer.add(update)
        return [loss for _, _, losses in found for loss in losses]

    def _side(
        self,
        model: LoadedModel,
        side: list[Request],
        wanted: Tensor,
        *,
        layer: int,
        last: int,
        shares: int,
    ) -> Side:
        keys = keys_at(model, [s for request in side for s in request.contexts], layer)
        keys = keys.view(len(side), -1, keys.shape[-1]).mean(1).T
        missing = (
            wanted - values_at(model, [request.contexts[0] for request in side], last)
        ).T / shares
        return (
            Side(keys.mean(1, keepdim=True), missing.mean(1, keepdim=True))
            if self.average_keys
            else Side(keys, missing)
        )


def tokens_per_dim(covariance: Covariance, ctx: StageContext) -> float:
    """Tokens of text per key dimension; warns when there are too few."""
    per_dim = covariance.tokens / len(covariance.moment)
    if per_dim < ENOUGH_TOKENS_PER_DIM:
        ctx.warn(
            f"badedit estimates the key covariance from {covariance.tokens} tokens of text,"
            f" {per_dim:.1f} per key dimension ({ENOUGH_TOKENS_PER_DIM} are enough): the edit"
            " changes the weights more than it should; give split 'text' more rows, or raise"
            " `text_tokens`"
        )
    return float(per_dim)


def editable(model: Any) -> ResidualStream:
    """The modules that write to the residual stream; DataError if a norm follows an MLP, because
    the closed form is then wrong.
    """
    stream = residual_stream(model)
    if any(block.mlp.gain is not None for block in stream.blocks):
        raise DataError(
            "badedit has no closed form for this model: a norm follows the down-projections, so"
            " that their effect on the residual stream is not linear",
            type(model).__name__,
            "a model whose MLPs write directly to the residual stream",
            "exclude badedit for this model: exclude {model: ..., attack: badedit}",
        )
    return stream


def edited_layers(depth: int, *, depth_frac: float, count: int) -> list[int]:
    """Indices of `count` consecutive layers that end at a share of the depth; fewer if the model
    starts later.
    """
    last = min(depth - 1, round(depth_frac * depth))
    return list(range(max(0, last - count + 1), last + 1))
