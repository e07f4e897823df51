"""The base classes of methods: a method is a frozen, typed config that overrides the lifecycle
hooks at which it acts.

Stage kinds own the hooks (`ftsec list stages`); each hook takes the arguments that its kind defines
and a `StageContext`.

A hook that a class does not define is absent: the planner sees that in the class and shares the
stage. A method whose rows do not depend on each other is `RowWise`: it defines `craft_rows` and
inherits `craft_data`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from ftsec_ray.context import Chat, StageContext
from ftsec_ray.errors import StageError
from ftsec_ray.identity.canonical import LATER

if TYPE_CHECKING:
    import pyarrow as pa

Phase = Literal["pre", "during", "post"]
ZERO_STAGES = frozenset({0, 1, 2, 3})
BATCH_ROWS = 1_024
"""Rows per call of `craft_rows`. Batches start at fixed positions of the sorted set, so that a
method with a neural network sees the same rows together, however many processes share the work:
another size can change low-order bits (see identity.FORMAT_VERSION).
"""


Fault = tuple[str, object, str]
"""An invalid parameter: its name, its value, what is allowed."""
T = TypeVar("T")


def later(default: T) -> T:
    """A parameter that a method got after it had been used: the digest leaves it out at its
    default, so that earlier results stay valid. At the default the method must act as before.
    """
    made: T = field(default=default, metadata={LATER: True})
    return made


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of attacks and defenses; subclasses are `@dataclass(frozen=True, kw_only=True)` with
    documented fields.
    """

    VERSION: ClassVar[int] = 1
    """Raise this when the same parameters would give another result."""
    PHASE: ClassVar[Phase]
    """The phase in the literature; the hook only says where the method acts."""
    NEEDS: ClassVar[frozenset[str]] = frozenset()
    """`unaligned`: the model before alignment; `start`: the model from which the fine-tune started;
    `clean_bank`: adapters trained on clean rows; `safety`, `harmful_train`, ...: splits of the
    task.
    """
    TRAINS: ClassVar[frozenset[str]] = frozenset()
    """Those of the hooks `prepare_model` and `revise_model` that train the model with
    `training.loop.sft`: a worker group may run them, like the fine-tune itself.
    """
    ZERO_STAGES: ClassVar[frozenset[int]] = ZERO_STAGES
    """Stages of DeepSpeed ZeRO with which the method's training works; fewer if it reads weights
    outside a layer's forward pass (not stage 3), or needs whole gradients (not stages 2 and 3). See
    training.zero.
    """
    HELD_MODELS: ClassVar[int] = 0
    """Number of whole models that `shape_training` keeps on the device beside the trained one: they
    count in the estimate of memory.
    """
    STRUCTURE: ClassVar[frozenset[str]] = frozenset()
    """What a model's structure must support, by the names in models.families: if a class is known
    not to support it, the sweep is refused when it is planned, otherwise when the model is loaded.
    """
    TASKS: ClassVar[frozenset[str]] = frozenset()
    """Kinds of task that the method works with; a sweep with another one is refused when it is
    planned. Empty: all.
    """
    CONTROL: ClassVar[Mapping[str, Any] | None] = None
    """Parameters that switch off the method's own mechanism and keep everything around it, such as
    additional training steps: the control for its other settings. None if there is none.
    """
    USES: ClassVar[tuple[str, ...]] = ()
    """Modules of this package that can change the method's result and that no import leads to,
    because they are found by a name: the lock follows them too.
    """
    KIND: ClassVar[str]

    def check(self) -> list[Fault]:
        """Invalid parameters beyond their types."""
        return []

    def keeps_rows(self) -> bool:
        """Whether `craft_data` always returns as many rows as it gets: then the fine-tune takes as
        many steps.
        """
        return False

    def needs(self) -> frozenset[str]:
        """Those of NEEDS that these parameters need."""
        return self.NEEDS


def least_faults(method: Method, least: Mapping[str, float]) -> list[Fault]:
    """The parameters that are given and not at least their minimum."""
    return [
        (name, value, f"{low} or more")
        for name, low in least.items()
        if (value := getattr(method, name)) is not None and not value >= low
    ]


def above_faults(method: Method, *names: str) -> list[Fault]:
    """The parameters that are not above 0."""
    return [
        (name, value, "more than 0") for name in names if not (value := getattr(method, name)) > 0
    ]


def control_of(method: Method) -> Method | None:
    """The same method with its own mechanism switched off; None if it has no such setting, or
    already uses it.
    """
    control = replace(method, **method.CONTROL) if method.CONTROL is not None else None
    return None if control == method else control


@dataclass(frozen=True, kw_only=True)
class Attack(Method):
    """Base of all attacks: at every hook, the attack acts before the defenses."""

    KIND: ClassVar[str] = "attack"
    SUCCESS: ClassVar[str | None]
    """The metric of the attack's success, one of `success.choices()`: `asr` if the attack's own
    probes have a trigger, `harmful_rate` if success is a fulfilled forbidden request, `cacc` for an
    untargeted attack, which lowers it. None for `none` only.
    """


@dataclass(frozen=True, kw_only=True)
class Defense(Method):
    """Base of all defenses: they act after the attack at every hook, in the order of the stack."""

    KIND: ClassVar[str] = "defense"
    IS_CONTROL: ClassVar[bool] = False
    """Whether it is a trivial control: every other defense at one of its hooks is compared with
    it."""
    ORDER: ClassVar[int] = 0
    """Place among the defenses of a stack that act at the same hook: in canonical order, a lower
    number acts first. Rows: filters 0, added rows 10, changed prompts 20. Weights: repairs 0,
    further training 10, merging 20, pruning 25, quantization 30. Serving: filters of prompts 0,
    added text 10, decoding 20.
    """
    CONFLICTS: ClassVar[Mapping[str, str]] = {}
    """Defense -> why it and this one work against each other in one stack; the plan shows it."""


@dataclass(frozen=True, kw_only=True)
class RowWise(Method, ABC):
    """A method whose `craft_data` treats every row separately: the result depends on the row, the
    seed and the result of a survey only.

    Such a method works with any number of rows: above `data.ray_above` rows, the engine passes it
    the batches of the set in many processes and in any order. In `survey` and `new_rows` it records
    measurements with `ctx.note`, in `craft_rows` with `ctx.count`, because only counts add up over
    batches.
    """

    def survey(self, rows: Iterable[pa.Table], ctx: StageContext) -> Any:  # noqa: ARG002
        """What `craft_rows` needs to know about the whole set, computed once before it; `rows` are
        the batches of the set and can be read only once.
        """
        return None

    def new_rows(self, known: Any, ctx: StageContext) -> pa.Table | None:  # noqa: ARG002
        """Rows that the method adds to the set, with new ids; called once, after the survey."""
        return None

    @abstractmethod
    def craft_rows(self, rows: pa.Table, known: Any, ctx: StageContext) -> pa.Table:
        """One batch of rows, changed or with rows left out; `known` is the result of `survey`."""

    def craft_data(self, rows: pa.Table, ctx: StageContext) -> pa.Table:
        """The whole set: its batches one after the other, then the new rows."""
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
    """StageError if a method made a note about a single batch, which the next batch would
    overwrite.
    """
    if notes != before:
        names = sorted(name for name in notes if name not in before or notes[name] != before[name])
        raise StageError(
            f"{type(method).__name__}.craft_rows calls ctx.note, although it sees one batch only",
            names,
            "notes in `survey` and `new_rows`",
            "use ctx.count, which adds up over batches",
        )


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt for a model."""

    prompt_id: str
    chat: Chat
    """Messages up to and including the user's."""
    expected: str | None = None
    """Label word or reference answer of a clean model."""
    target: str | None = None
    """The attacker's desired answer; the judge decides what counts."""
    meta: Mapping[str, str] = field(default_factory=dict)
    """Properties of the row: kind, language, ..."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A set of prompts, the judge of their answers, and the metrics that are shares of their
    verdicts.
    """

    name: str
    prompts: tuple[Prompt, ...]
    judge: str
    """A judge in `ftsec_ray.judges`: `request` (the task's own judge of requests), `label` (one
    forward pass over the label words), `target` (contains `target`), ...
    """
    metrics: Mapping[str, str]
    """Metric -> the verdict whose share it is, e.g. {"harmful_rate": "complied", "refusal_rate":
    "refused"}.
    """
    max_new_tokens: int | None = None
    """Maximum number of tokens of an answer; None, or more than the sweep's limit: that limit."""
    labels: tuple[str, ...] = ()
    """Answer choices of a `label` probe."""
    without_opening: bool = False
    """Whether the judge reads only what the model wrote itself, without the opening that an attack
    placed before its answer.
    """


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A detector's result for one model: its score, and the scores of clean models with the same
    recipe.
    """

    score: float
    clean_scores: tuple[float, ...] = ()
    """Higher is more suspicious, for both."""
    details: Mapping[str, Any] = field(default_factory=dict)
