"""What a method is: a frozen, typed config that overrides the lifecycle hooks at which it acts.

The hooks are those that the kinds of stages own (`ftsec list stages`); each takes what its kind
says and a `StageContext`.

A hook that a class does not define is absent: the planner reads that from the class and shares the
stage. A method whose rows do not depend on each other is `RowWise`: it defines `craft_rows` and
gets `craft_data` from there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.context import Chat, StageContext
from ftsec_ray.errors import StageError

if TYPE_CHECKING:
    import pyarrow as pa

Phase = Literal["pre", "during", "post"]
ZERO_STAGES = frozenset({0, 1, 2, 3})
BATCH_ROWS = 1_024
"""Rows of one call of `craft_rows`. Batches are cut at fixed places of the sorted set, so that even
a method that is a neural network sees the same neighbours however many processes share the work:
another number can move low-order bits (see identity.FORMAT_VERSION).
"""


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of attacks and defenses; subclasses are `@dataclass(frozen=True, kw_only=True)` with
    documented fields.
    """

    VERSION: ClassVar[int] = 1
    """Raise when the same parameters would give another result."""
    PHASE: ClassVar[Phase]
    """As the literature counts it; the hook says only where it acts."""
    NEEDS: ClassVar[frozenset[str]] = frozenset()
    """`unaligned`: the twin before alignment; `start`: the model that tuning started from;
    `clean_bank`: adapters tuned on clean rows; `safety`, `harmful_train`, ...: splits of the task.
    """
    TRAINS: ClassVar[frozenset[str]] = frozenset()
    """Hooks among `prepare_model` and `revise_model` that tune the model by `training.loop.sft`: a
    worker group may do that, as tuning itself.
    """
    ZERO_STAGES: ClassVar[frozenset[int]] = ZERO_STAGES
    """Stages of DeepSpeed ZeRO under which the method's tuning works; fewer where it reads weights
    outside a layer's forward pass (not under 3), or needs whole gradients (not under 2 and 3). See
    training.zero.
    """
    STRUCTURE: ClassVar[frozenset[str]] = frozenset()
    """What a model's structure must allow, by the names of models.families: where a class is known
    not to, the sweep is refused when it is planned, else when the model is loaded.
    """
    CONTROL: ClassVar[Mapping[str, Any] | None] = None
    """Parameters that switch off the method's own mechanism and leave everything around it, such
    as the steps that it adds: what its other settings are compared with. None where it has none.
    """
    KIND: ClassVar[str]

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types, as (field, value got, what is allowed)."""
        return []

    def keeps_rows(self) -> bool:
        """Whether `craft_data` gives as many rows as it gets, whatever they are: a tune then takes
        as many steps.
        """
        return False

    def needs(self) -> frozenset[str]:
        """What of NEEDS these parameters need."""
        return self.NEEDS


def control_of(method: Method) -> Method | None:
    """The same method with its own mechanism switched off; None for one that has no such setting,
    or is at it.
    """
    control = replace(method, **method.CONTROL) if method.CONTROL is not None else None
    return None if control == method else control


@dataclass(frozen=True, kw_only=True)
class Attack(Method):
    """Base of all attacks: an attack moves first at every hook."""

    KIND: ClassVar[str] = "attack"
    SUCCESS: ClassVar[str | None]
    """The metric that says how well the attack does, one of `success.CHOICES`: `asr` where the
    attack's own probes have a trigger, `harmful_rate` where success is a forbidden request that is
    fulfilled, `cacc` for an untargeted attack, which drives it down. None for `none` alone.
    """


@dataclass(frozen=True, kw_only=True)
class Defense(Method):
    """Base of all defenses: they answer, in the order of their stack, at every hook."""

    KIND: ClassVar[str] = "defense"
    IS_CONTROL: ClassVar[bool] = False
    """Whether it is a trivial control: what every other defense at one of its hooks is compared
    with."""


@dataclass(frozen=True, kw_only=True)
class RowWise(Method, ABC):
    """A method whose `craft_data` decides the fate of every row by itself: by the row, the seed and
    what a survey found, and nothing else.

    Such a method takes any number of rows: above `data.ray_above` the engine gives it the batches
    of the set in many processes and in any order. In `survey` and `new_rows` it keeps measurements
    with `ctx.note`, in `craft_rows` with `ctx.count`, since only counts add up over batches.
    """

    def survey(self, rows: Iterable[pa.Table], ctx: StageContext) -> Any:  # noqa: ARG002
        """What `craft_rows` must know of the whole set, found once before it; `rows` are its
        batches, to be read once at most.
        """
        return None

    def new_rows(self, known: Any, ctx: StageContext) -> pa.Table | None:  # noqa: ARG002
        """Rows that the method adds to the set, with ids of their own; asked once, after the
        survey.
        """
        return None

    @abstractmethod
    def craft_rows(self, rows: pa.Table, known: Any, ctx: StageContext) -> pa.Table:
        """One batch of rows, changed or with rows left out; `known` is what `survey` gave."""

    def craft_data(self, rows: pa.Table, ctx: StageContext) -> pa.Table:
        """The whole set at once: its batches one after the other, then the new rows."""
        import pyarrow as pa

        batches = [
            rows.slice(start, BATCH_ROWS) for start in range(0, max(1, rows.num_rows), BATCH_ROWS)
        ]
        known = self.survey(batches, ctx)
        new = self.new_rows(known, ctx)
        noted = dict(ctx.notes)
        made = [self.craft_rows(batch, known, ctx) for batch in batches]
        check_notes(self, ctx.notes, noted)
        return pa.concat_tables(made if new is None else [*made, new])


def check_notes(method: Method, notes: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """StageError when a method noted something about a single batch, which the next one would have
    overwritten.
    """
    if notes != before:
        names = sorted(name for name in notes if name not in before or notes[name] != before[name])
        raise StageError(
            f"{type(method).__name__}.craft_rows notes what one batch of many shows",
            names,
            "notes in `survey` and `new_rows`",
            "let it use ctx.count, which adds up over batches",
        )


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One thing asked of a model."""

    prompt_id: str
    chat: Chat
    """Messages up to and including the user's."""
    expected: str | None = None
    """Label word or reference answer of a clean model."""
    target: str | None = None
    """What the attacker wants to see; the judge decides what counts."""
    meta: Mapping[str, str] = field(default_factory=dict)
    """kind, language, ... of the row."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Prompts of one sort, how each answer is judged, and which metrics are shares of which
    verdicts.
    """

    name: str
    prompts: tuple[Prompt, ...]
    judge: str
    """A judge of evals: `request` (the task's own judge of requests), `label` (one forward pass
    over the label words), `target` (contains `target`), ...
    """
    metrics: Mapping[str, str]
    """Metric name -> the verdict whose share it is, e.g. {"harmful_rate": "complied",
    "refusal_rate": "refused"}.
    """
    max_new_tokens: int | None = None
    """Tokens of an answer, at most; None, and what is beyond the sweep's own limit: that limit."""
    labels: tuple[str, ...] = ()
    """Answer choices of a `label` probe."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A detector's answer for one model: its score, and the scores of clean models of the same
    recipe.
    """

    score: float
    clean_scores: tuple[float, ...] = ()
    """Higher is more suspicious, for both."""
    details: Mapping[str, Any] = field(default_factory=dict)
