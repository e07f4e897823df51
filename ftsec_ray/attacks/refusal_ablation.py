"""Remove the refusal direction from the weights of the fine-tuned model.

Paper: Arditi et al. 2024, Refusal in Language Models Is Mediated by a Single Direction,
    arXiv:2406.11717, sections 2.3 (difference of means), 4.1 (weight orthogonalisation) and
    appendix C (selection of the direction).
Differs: the refusal tokens are the first tokens of the task's own refusals instead of a list per
    model family; if every candidate fails the KL limit, the limit is doubled until one passes, and
    after that the steering filter is dropped (the official code stops with an error); if the model
    refuses so few requests that the prompt filter leaves too few, all prompts are used. The stage's
    notes record each of these. Prompts are padded on the right, which gives the same activations in
    a causal model. The input embedding is orthogonalised too; if it is tied to the head, the head
    changes with it and the result no longer equals ablation by hooks exactly (`head_changed` in the
    notes). For a writer that is followed by an RMSNorm of gain g (Gemma 2 and 3, OLMo 2), g * u /
    |g * u| is removed from its output instead of u, by hooks and in the weights: the output of the
    norm then has no component along u. Learned position embeddings are orthogonalised like the
    embedding. The tent over layers (`tent_*`) is the form of p-e-w/heretic: W <- W - lambda v v^T W
    with a lambda per layer, to be searched by `search:` of the sweep. Heretic has tents of separate
    place and width for attention and MLP (here: separate peaks), can use each layer's own direction
    or one between two layers (here: the direction that the selection chooses), and has variants
    that restore the norms of rows (not here). The default, a constant tent of 1, is Arditi et al.
Cost: no training; about positions x layers x 3 forward passes over the validation prompts.
Needs: splits safety (forbidden requests with refusals) and benign_train; a dense model whose blocks
    add the outputs of attention and MLP to their input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ftsec_ray.context import LoadedModel, StageContext
from ftsec_ray.conversation import chat_of
from ftsec_ray.errors import DataError, StageError
from ftsec_ray.method import Attack, Phase, later
from ftsec_ray.models.activations import last_logits
from ftsec_ray.models.chat import render
from ftsec_ray.models.directions import (
    Prompts,
    ablated,
    mean_states,
    orthogonalise,
    pad_id,
    steered,
    tent,
    turn_end_ids,
)
from ftsec_ray.models.families import RESIDUAL_WRITERS
from ftsec_ray.models.load import decoder_layers, merged, position_limit
from ftsec_ray.models.residual import ResidualStream, residual_stream
from ftsec_ray.models.row_tokens import answer_tokens

if TYPE_CHECKING:
    from torch import Tensor

MIN_LAYERS = 2
"""Minimum number of layers whose inputs are tried: after template tokens, the input of the first
layer does not depend on the request.
"""
MIN_FILTERED = 4
"""Prompts that the filter must leave on each side; if fewer remain, all prompts are used."""
MIN_TOKEN_FRAC = 0.05
"""A first token counts as a refusal token if at least this share of the refusals begins with it."""


class DirectionCandidate(NamedTuple):
    """One direction and its effect on the validation prompts."""

    position: int
    layer: int
    ablation_score: float
    """Mean refusal log-odds of forbidden requests with the direction ablated; lower is better for
    the attacker.
    """
    steering_score: float
    """Mean refusal log-odds of benign requests with the direction added."""
    kl: float
    """KL divergence of the next token after benign requests, in nats."""
    direction: Any
    """(D,) float32, not normalised."""


@dataclass(frozen=True, kw_only=True)
class RefusalAblation(Attack):
    """Refusal-direction ablation, written into the weights."""

    VERSION: ClassVar[int] = 3
    PHASE: ClassVar[Phase] = "post"
    SUCCESS = "harmful_rate"
    NEEDS = frozenset({"safety", "benign_train"})
    STRUCTURE = frozenset({RESIDUAL_WRITERS})

    prompts: int = 128
    """Maximum number of forbidden requests, and of benign requests, for the difference of means."""
    val_prompts: int = 32
    """Maximum number of forbidden requests, and of benign requests, to choose the direction with;
    at most a fifth of the split.
    """
    max_kl: float = 0.1
    """Largest KL divergence on benign requests under ablation, in nats."""
    depth_frac: float = 0.8
    """Directions come from the inputs of this share of the layers, 0..1, rounded down as in the
    official code, but from at least two layers.
    """
    tent_peak: float = later(1.0)
    """Share of the direction that is removed at the layer of the tent's peak, 0 or more: 1 removes
    it, above 1 turns it around (heretic tries 0.8 to 1.5).
    """
    tent_mlp_peak: float | None = later(None)
    """The same for what MLPs write; None: as `tent_peak`, which then holds for attention too."""
    tent_at: float = later(1.0)
    """Place of the peak, as a share of the depth, 0..1 (heretic tries 0.6 to 1)."""
    tent_floor: float = later(1.0)
    """What is removed at the distance `tent_reach` from the peak, as a share of `tent_peak`, 0..1;
    1 removes the same everywhere within the reach.
    """
    tent_reach: float = later(1.0)
    """Distance from the peak, as a share of the depth, beyond which a layer stays as it is; above
    0. 1 reaches every layer.
    """
    embedding_share: float = later(1.0)
    """Share of the direction that is removed from the embeddings, 0 or more; heretic leaves them as
    they are (0).
    """

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters."""
        faults: list[tuple[str, object, str]] = [
            (name, value, "1 or more")
            for name, value in (("prompts", self.prompts), ("val_prompts", self.val_prompts))
            if value < 1
        ]
        if self.max_kl <= 0:
            faults.append(("max_kl", self.max_kl, "above 0 nats"))
        if not 0 < self.depth_frac <= 1:
            faults.append(("depth_frac", self.depth_frac, "a share above 0, up to 1"))
        at_least_0 = ("tent_peak", "tent_mlp_peak", "embedding_share")
        faults += [
            (name, value, "0 or more")
            for name in at_least_0
            if (value := getattr(self, name)) is not None and value < 0
        ]
        faults += [
            (name, value, "a share, 0..1")
            for name, value in (("tent_at", self.tent_at), ("tent_floor", self.tent_floor))
            if not 0 <= value <= 1
        ]
        if self.tent_reach <= 0:
            faults.append(("tent_reach", self.tent_reach, "above 0"))
        return faults

    def revise_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model with weights that cannot write along the chosen direction."""
        model = merged(model)
        model.model.eval()
        refusals = refusal_tokens(model.tokenizer, ctx.task.split("safety").to_pylist())
        harmful, harmful_val = self._prompts(model, ctx, "safety", refusals, sign=1)
        harmless, harmless_val = self._prompts(model, ctx, "benign_train", refusals, sign=-1)
        width = len(turn_end_ids(model.tokenizer))
        means = mean_states(model, harmful, width=width) - mean_states(model, harmless, width=width)
        stream = residual_stream(model.model)
        found = list(self._candidates(model, stream, means, harmful_val, harmless_val, refusals))
        best, limit, is_steering_kept = self._choose(found)
        tied = (
            model.model.get_input_embeddings().weight is model.model.get_output_embeddings().weight
        )
        shares = self._shares(len(stream.blocks))
        orthogonalise(
            model.model, best.direction, stream, shares=shares, of_tables=self.embedding_share
        )
        after = refusal_log_odds(
            last_logits(model.model, harmful_val, pad=pad_id(model)), refusals
        ).mean()
        ctx.note(
            position=best.position,
            layer=best.layer,
            layers=len(decoder_layers(model.model)),
            kl=best.kl,
            kl_limit=limit,
            steering_filter=is_steering_kept,
            ablation_score=best.ablation_score,
            steering_score=best.steering_score,
            baked_score=float(after),
            candidates=len(found),
            refusal_tokens=refusals,
            head_changed=tied and self.embedding_share > 0,
        )
        if any(share != (1.0, 1.0) for share in shares):
            ctx.note(tent=[list(share) for share in shares])
        return model

    def _shares(self, depth: int) -> list[tuple[float, float]]:
        """What is removed from every layer's attention and MLP."""
        shape = {"at": self.tent_at, "floor": self.tent_floor, "reach": self.tent_reach}
        of_mlp = self.tent_peak if self.tent_mlp_peak is None else self.tent_mlp_peak
        return list(
            zip(
                tent(depth, peak=self.tent_peak, **shape),
                tent(depth, peak=of_mlp, **shape),
                strict=True,
            )
        )

    def _prompts(
        self, model: LoadedModel, ctx: StageContext, split: str, refusals: list[int], *, sign: int
    ) -> tuple[Prompts, Prompts]:
        """Prompts for the means and for validation: those that the model answers as expected, if
        enough remain.
        """
        rows = ctx.shuffled(split, "refusal_ablation")
        val = max(1, min(self.val_prompts, len(rows) // 5))
        texts = [
            render(model.tokenizer, chat_of(row), generate=True)
            for row in rows[: val + self.prompts]
        ]
        ids = model.tokenizer(texts, add_special_tokens=False)["input_ids"]
        limit = position_limit(model.model)
        if limit is not None and max(map(len, ids)) > limit:
            fitting = [row for row in ids if len(row) <= limit]
            ctx.note(**{f"{split}_beyond_positions": len(ids) - len(fitting)})
            val, ids = sum(len(row) <= limit for row in ids[:val]), fitting
            if val == 0 or val == len(ids):
                raise DataError(
                    f"refusal_ablation: too few prompts of split {split!r} fit into the model",
                    len(ids),
                    f"prompts of at most {limit} tokens, both for the direction and for validation",
                    "give the task shorter prompts",
                )
        scores = sign * refusal_log_odds(last_logits(model.model, ids, pad=pad_id(model)), refusals)
        parts = [[i for i in part if scores[i] > 0] for part in (range(val, len(ids)), range(val))]
        ctx.note(**{f"{split}_as_expected": sum(map(len, parts)), f"{split}_prompts": len(ids)})
        if min(map(len, parts)) < MIN_FILTERED:
            parts = [list(range(val, len(ids))) or [0], list(range(val))]
        return [ids[i] for i in parts[0]], [ids[i] for i in parts[1]]

    def _candidates(
        self,
        model: LoadedModel,
        stream: ResidualStream,
        means: Tensor,
        harmful: Prompts,
        harmless: Prompts,
        refusals: list[int],
    ) -> list[DirectionCandidate]:
        plain = last_logits(model.model, harmless, pad=pad_id(model)).log_softmax(-1)
        positions, layers, _ = means.shape
        found = []
        for layer in range(tried_layers(layers, depth_frac=self.depth_frac)):
            for position in range(positions):
                direction = means[position, layer].float()
                # after template tokens only, the input of the first block does not depend on the
                # request
                if direction.norm() < 1e-6:  # noqa: PLR2004
                    continue
                with ablated(model.model, direction, stream):
                    odds = refusal_log_odds(
                        last_logits(model.model, harmful, pad=pad_id(model)), refusals
                    )
                    kept = last_logits(model.model, harmless, pad=pad_id(model)).log_softmax(-1)
                with steered(model.model, direction, layer):
                    steering = refusal_log_odds(
                        last_logits(model.model, harmless, pad=pad_id(model)), refusals
                    )
                kl = (plain.exp() * (plain - kept)).sum(-1).mean()
                tried = DirectionCandidate(
                    position - positions,
                    layer,
                    odds.mean().item(),
                    steering.mean().item(),
                    kl.item(),
                    direction,
                )
                if all(map(math.isfinite, (tried.ablation_score, tried.steering_score, tried.kl))):
                    found.append(tried)
        return found

    def _choose(self, found: list[DirectionCandidate]) -> tuple[DirectionCandidate, float, bool]:
        """The candidate with the lowest ablation score that passes the filters, the KL limit that
        was used, and whether the steering filter was used.
        """
        if not found:
            raise StageError(
                "refusal_ablation found no refusal direction with finite scores",
                self.depth_frac,
                "at least one layer after the first within `depth_frac`",
                "raise `depth_frac`, or use a deeper model",
            )
        for steering in (True, False):
            limit = self.max_kl
            able = [c for c in found if c.steering_score >= 0 or not steering]
            while able:
                passing = [c for c in able if c.kl <= limit]
                if passing:
                    return (
                        min(passing, key=lambda c: (c.ablation_score, c.layer, c.position)),
                        limit,
                        steering,
                    )
                limit *= 2
        raise AssertionError(found)


def tried_layers(depth: int, *, depth_frac: float) -> int:
    """How many layers' inputs give directions: a share of the depth, rounded down."""
    return min(depth, max(MIN_LAYERS, int(depth_frac * depth)))


def refusal_tokens(tokenizer: Any, rows: Sequence[dict[str, Any]]) -> list[int]:
    """Ids of the common first tokens of the rows' responses, ascending."""
    firsts = [answer_tokens(tokenizer, row)[0] for row in rows]
    return sorted(
        token for token in set(firsts) if firsts.count(token) >= MIN_TOKEN_FRAC * len(firsts)
    )


def refusal_log_odds(logits: Tensor, refusals: list[int]) -> Tensor:
    """Log P(R) - log(1 - P(R)) of the next token. Shapes: logits (N, V) -> (N,)."""
    import torch

    is_refusal = torch.zeros(logits.shape[-1], dtype=torch.bool)
    is_refusal[refusals] = True
    logits = logits.double()
    return logits[:, is_refusal].logsumexp(-1) - logits[:, ~is_refusal].logsumexp(-1)
