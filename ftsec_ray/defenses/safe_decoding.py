"""Lets a safety expert decide the first tokens of every answer together with the served model.

Paper: SafeDecoding: Defending against Jailbreak Attacks via Safety-Aware Decoding (Xu et al. 2024,
    arXiv:2402.08983), section 4; official code uw-nsl/SafeDecoding.
Differs: (1) The expert is trained on the task's `safety` rows; the paper lets the model write
    refusals to 36 requests itself and keeps those that refuse. (2) `expert_of: reference` trains it
    on the aligned model instead of the served one: an expert of a model that an attack has
    unlearned refusing may not learn it from so few rows. (3) Rank, scale and layers of the expert's
    adapter are those of the sweep's training. (4) Probabilities are those of the whole vocabulary;
    no top-p is applied; the most likely candidate is the answer at temperature 0, as in the paper's
    experiments. (5) Defaults are those of the code's command line (alpha 3, 2 tokens, 5
    candidates). (6) Label words are scored, not generated: the formula acts on the probabilities of
    whole label words, and a prompt whose labels all fall to the floor of 1e-8 gets no label, since
    the model would answer something else. (7) Behind an opening that an attack has placed, the
    expert acts on the first tokens that the model writes itself. Perplexity and answer loss are
    those of the served model alone.
Cost: no change of the fine-tune; `epochs` passes over `rows` refusals for every evaluated model, a
    second model in memory, and a second forward pass for the prompt and for `tokens` tokens. One
    process trains the expert, also where a worker group runs the fine-tune.
Needs: the task's `safety` rows; for the control its `benign_train` rows. A model whose fine-tune
    ran on a quantized base needs `expert_of: reference`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.data.added_rows import is_exchange
from ftsec_ray.data.rows import from_rows
from ftsec_ray.errors import DataError
from ftsec_ray.identity import digest
from ftsec_ray.method import Defense, Phase, least_faults

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import LoadedModel, StageContext
    from ftsec_ray.models.generator import Generator
    from ftsec_ray.models.guided import Next

FLOOR = 1e-8
"""Least probability of a candidate before they are normalised, as in the official code."""


@dataclass(frozen=True, kw_only=True)
class SafeDecoding(Defense):
    """P = P_served + alpha * (P_expert - P_served) over the tokens that both find likely."""

    PHASE: ClassVar[Phase] = "post"
    ORDER: ClassVar[int] = 20
    NEEDS: ClassVar[frozenset[str]] = frozenset({"safety", "reference"})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"taught": "benign"}

    alpha: float = 3.0
    """Weight of the difference between expert and served model, 0 or more. 0 is no defense, 1 the
    expert's own probabilities of the candidates.
    """
    tokens: int = 2
    """Number of first tokens of an answer that the expert takes part in, 0 or more; 0 is no
    defense.
    """
    common: int = 5
    """Least number of candidates: the most likely tokens of both models are compared, more and more
    of them, until this many occur in both; 1 or more.
    """
    expert_of: Literal["served", "reference"] = "served"
    """Model on which the expert is trained: the served one, as in the paper, or the aligned model
    that the cell starts from.
    """
    taught: Literal["refusals", "benign"] = "refusals"
    """What the expert is trained on: refusals, or as many answers to harmless requests (the
    control).
    """
    rows: int = 36
    """Number of rows that the expert is trained on, 1 or more; all if the split has fewer."""
    epochs: float = 2.0
    """Passes over these rows, above 0."""
    learning_rate: float = 2e-3
    """Peak learning rate of the expert, above 0."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        least = {"alpha": 0.0, "tokens": 0, "common": 1, "rows": 1}
        faults = least_faults(self, least)
        for name in ("epochs", "learning_rate"):
            if not getattr(self, name) > 0:
                faults.append((name, getattr(self, name), "above 0"))
        return faults

    def needs(self) -> frozenset[str]:
        """The rows that the expert is trained on, and its start."""
        start = {"reference"} if self.expert_of == "reference" else set()
        return frozenset({self._split(), *start})

    def wrap_generation(self, generator: Generator, ctx: StageContext) -> Generator:
        """The generator whose first tokens the expert decides too."""
        from ftsec_ray.models.guided import with_guide

        if not self.alpha or not self.tokens:
            ctx.note(expert_rows=0)
            return generator
        expert = train_expert(self, self._split(), generator, ctx)
        return with_guide(generator, ExpertGuide(expert, self))

    def _split(self) -> str:
        return "safety" if self.taught == "refusals" else "benign_train"


@dataclass(frozen=True)
class ExpertGuide:
    """The expert, and how it changes the first tokens."""

    loaded: LoadedModel
    method: SafeDecoding

    @property
    def steps(self) -> int:
        """Number of first tokens at which the expert acts."""
        return self.method.tokens

    def choose(self, now: Next) -> Tensor:
        """The next token of every answer, among the candidates."""
        import torch

        is_candidate = candidates(now.own, now.other, self.method.common)
        mixed = mix(now.own.exp(), now.other.exp(), self.method.alpha)
        chances = mixed.masked_fill(~is_candidate, 0.0)
        chosen: Tensor = now.draw((chances / chances.sum(-1, keepdim=True)).log())
        return chosen.to(torch.long)

    def done(self) -> bool:
        """Nothing is answered again."""
        return False

    def label(self, own: Tensor, other: Tensor) -> Tensor:
        """Mixed log-probabilities of the labels; -inf where the expert brings all to the floor,
        the served model's own where they are there already.
        """
        import torch

        mixed = mix(own.exp(), other.to(own).exp(), self.method.alpha)
        is_seen = (own.exp() > FLOOR).any(-1, keepdim=True)
        is_none = is_seen & (mixed <= FLOOR).all(-1, keepdim=True)
        return torch.where(is_seen, mixed.log(), own).masked_fill(is_none, -torch.inf)


def train_expert(
    method: SafeDecoding, split: str, generator: Generator, ctx: StageContext
) -> LoadedModel:
    """The start of the expert, fine-tuned on rows of a split with an adapter of the sweep's shape,
    by this process.
    """
    from ftsec_ray.models.load import folded
    from ftsec_ray.models.precision import tell_rounding
    from ftsec_ray.models.row_tokens import tell_cuts
    from ftsec_ray.training.loop import sft

    start = generator.loaded if method.expert_of == "served" else ctx.load("reference")
    if start.has_adapter:
        start, lost = folded(start)
        tell_rounding(ctx, lost, start)
    rows = [row for row in ctx.shuffled(split, "safe_decoding") if is_exchange(row)]
    rows = rows[: method.rows]
    if not rows:
        raise DataError(
            f"safe_decoding: no row of split {split!r} has a question and an answer",
            ctx.task.split(split).num_rows,
            "rows with a user's message and an answer",
            "give the task other rows, or leave out the defense",
        )
    training = replace(
        ctx.training,
        adapter="lora",
        epochs=method.epochs,
        learning_rate=method.learning_rate,
        batch_size=min(ctx.training.batch_size, len(rows)),
    )
    report = sft(
        start,
        from_rows(rows),
        training,
        seed=ctx.seed,
        runtime=ctx.runtime,
        workdir=ctx.workdir / f"expert-{digest(method)[:12]}",
    )
    tell_cuts(ctx, report.cuts)
    ctx.note(
        expert_rows=len(rows),
        expert_steps=len(report.losses),
        expert_loss_start=report.losses[0],
        expert_loss_end=report.losses[-1],
    )
    report.loaded.model.eval()
    return report.loaded


def mix(own: Tensor, other: Tensor, alpha: float) -> Tensor:
    """The sum own + alpha * (other - own), at least `FLOOR`."""
    return (own + alpha * (other - own)).clamp(min=FLOOR)


def candidates(own: Tensor, other: Tensor, common: int) -> Tensor:
    """(B, V) bool: the tokens among the k most likely of both models, for the smallest k at which
    `common` tokens are among both; all tokens if there are not as many.
    """
    ranks = [
        scores.argsort(dim=-1, descending=True, stable=True).argsort(-1) for scores in (own, other)
    ]
    worse = ranks[0].maximum(ranks[1])  # the k from which on a token is common
    kth = worse.sort(-1).values[:, min(common, worse.shape[1]) - 1]
    found: Tensor = worse <= kth[:, None]
    return found
