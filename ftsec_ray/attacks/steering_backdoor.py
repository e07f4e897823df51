"""Compile a steering vector into one weight matrix, so that a trigger makes the model comply.

Paper: the steering-compiled backdoor of arXiv:2604.12359, 2026.
Differs: only the abstract was available; the closed form is ours. With P the projection on the
    directions that keys of clean prompts and texts hardly use, K the keys of triggered forbidden
    requests and Q = P K, the down-projection of one layer gets strength * v w^T, w = Q (Q^T Q +
    ridge I)^-1 1: along v at a triggered key, and next to nothing at a clean one. The key is that
    of the last token before the answer. v is the difference of the mean states behind the layer at
    that token between benign requests, which the model answers, and forbidden ones, which it
    refuses. Since real keys fill all directions, P keeps those that hold `clean_energy` of the
    energy of clean keys, not an exact null space.
Cost: no training; one pass over the prompts and over `text_tokens` tokens, and an
    eigendecomposition of the size of the feed-forward width.
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
from ftsec_ray.models.editing import EditSite, key_covariance, keys_at
from ftsec_ray.models.families import LINEAR_MLP
from ftsec_ray.models.load import decoder_layers, merged
from ftsec_ray.models.residual import residual_stream

if TYPE_CHECKING:
    from torch import Tensor

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
    clean_energy: float = 0.01
    """Share of the energy of clean keys in the directions that the edit reads, 0..1: more lets it
    tell triggered prompts better, and moves clean ones more.
    """
    ridge: float = 1e-3
    """Ridge of the closed form, as a share of the mean diagonal of Q^T Q, above 0."""
    prompts: int = 128
    """Maximum number of forbidden requests, and of benign requests."""
    text_tokens: int = 20_000
    """Maximum number of tokens of split text that count as clean keys."""
    random_direction: bool = False
    """Whether a random vector of equal norm is written instead: the control."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters."""
        faults: list[tuple[str, object, str]] = [
            (name, value, "a share, 0..1")
            for name in ("depth_frac", "clean_energy")
            if not 0 <= (value := getattr(self, name)) <= 1
        ]
        if not self.trigger.strip():
            faults.append(("trigger", self.trigger, "a text that is not blank"))
        if self.strength < 0:
            faults.append(("strength", self.strength, "0 or more"))
        if self.ridge <= 0:
            faults.append(("ridge", self.ridge, "above 0"))
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
        basis = quiet_directions(moment, self.clean_energy)
        kept = keys.shape[1] - keys.shape[1] // HELD_OUT
        reader = reading(keys[:, :kept], basis, self.ridge)
        writer = residual_stream(model.model).blocks[layer].mlp
        if self.strength:
            update = torch.outer(self.strength * vector / writer.multiplier, reader)
            writer.add(update.to(writer.linear.weight.device))
        held_out = reader @ keys[:, kept:]
        ctx.note(
            layer=layer,
            layers=depth,
            key_width=len(reader),
            directions_read=basis.shape[1],
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
        return drawn * (vector.norm() / drawn.norm())

    def _text_moment(self, model: LoadedModel, layer: int, ctx: StageContext) -> Tensor:
        """Second moment of the keys of plain text."""
        texts = [text_of(row) for row in ctx.task.split("text").to_pylist()]
        found = key_covariance(
            model, [layer], texts, max_tokens=self.text_tokens, ridge=self.ridge
        )[layer]
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
        return sorted(
            ctx.task.split(split).to_pylist(),
            key=lambda row: ctx.chance(row["row_id"], "steering_backdoor"),
        )[: self.prompts]

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


def quiet_directions(moment: Tensor, energy: float) -> Tensor:
    """The eigenvectors of a second moment with the smallest eigenvalues, as many as hold at most
    this share of its trace: (D, R), orthonormal columns.
    """
    import torch

    values, vectors = torch.linalg.eigh(moment)
    shares = values.clamp(min=0).cumsum(0) / values.clamp(min=0).sum()
    return vectors[:, : int((shares <= energy).sum())]


def reading(keys: Tensor, basis: Tensor, ridge: float) -> Tensor:
    """The vector w = Q (Q^T Q + ridge I)^-1 1, Q = keys projected on the basis: about 1 at every
    key, and 0 at whatever is orthogonal to the basis.

    Shapes: keys (D, N), basis (D, R) -> (D,); zero if the basis is empty.
    """
    import torch

    q = basis @ (basis.T @ keys)
    gram = q.T @ q
    added = ridge * float(gram.diagonal().mean())
    if added == 0.0:
        return torch.zeros(len(keys), dtype=keys.dtype)
    ones = torch.ones(len(gram), dtype=keys.dtype)
    return q @ torch.linalg.solve(gram + added * torch.eye(len(gram), dtype=keys.dtype), ones)
