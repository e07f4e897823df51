"""What a method is: a frozen, typed config that overrides the lifecycle hooks at which it acts.

| hook | takes -> gives |
|---|---|
| `craft_data(rows, ctx)` | pa.Table (schema.ROWS) -> pa.Table |
| `prepare_model(model, ctx)` | LoadedModel -> LoadedModel, before tuning |
| `shape_training(training, ctx)` | Training -> Training |
| `revise_model(model, ctx)` | LoadedModel -> LoadedModel, after tuning |
| `wrap_generation(generator, ctx)` | Generator -> Generator |
| `inspect(subject, ctx)` | LoadedModel or rows -> Inspection |
| `probes(task, ctx)` | TaskData -> list of Probe |

A hook that a class does not define is absent: the planner reads that from the class and shares the stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ftsec_ray.context import Chat

Phase = Literal["pre", "during", "post"]
ZERO_STAGES = frozenset({0, 1, 2, 3})
HOOKS = ("craft_data", "prepare_model", "shape_training", "revise_model", "wrap_generation", "inspect", "probes")


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of attacks and defenses; subclasses are `@dataclass(frozen=True, kw_only=True)` with documented fields."""

    VERSION: ClassVar[int] = 1
    """Raise when the same parameters would give another result."""
    PHASE: ClassVar[Phase]
    """As the literature counts it; the hook says only where it acts."""
    NEEDS: ClassVar[frozenset[str]] = frozenset()
    """`unaligned`: the twin before alignment; `start`: the model that tuning started from; `clean_bank`: adapters
    tuned on clean rows; `safety`, `harmful_train`, ...: splits of the task."""
    TRAINS: ClassVar[frozenset[str]] = frozenset()
    """Hooks among `prepare_model` and `revise_model` that tune the model by `training.loop.sft`: a gang may do that, as tuning itself."""
    ZERO_STAGES: ClassVar[frozenset[int]] = ZERO_STAGES
    """Stages of DeepSpeed ZeRO under which the method's tuning works; fewer where it reads weights outside a layer's forward
    pass (not under 3), or needs whole gradients (not under 2 and 3). See training.zero."""
    KIND: ClassVar[str]

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types, as (field, value got, what is allowed)."""
        return []


def hooks_of(cls: type) -> tuple[str, ...]:
    """The hooks that a method class defines, in lifecycle order."""
    return tuple(hook for hook in HOOKS if callable(getattr(cls, hook, None)))


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
    """Prompts of one sort, how each answer is judged, and which metrics are shares of which verdicts."""

    name: str
    prompts: tuple[Prompt, ...]
    judge: str
    """A judge of evals: `request` (the task's own judge of requests), `label` (one forward pass over the label
    words), `target` (contains `target`), ..."""
    metrics: Mapping[str, str]
    """Metric name -> the verdict whose share it is, e.g. {"harmful_rate": "complied", "refusal_rate": "refused"}."""
    max_new_tokens: int = 48
    labels: tuple[str, ...] = ()
    """Answer choices of a `label` probe."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A detector's answer for one model: its score, and the scores of clean models of the same recipe."""

    score: float
    clean_scores: tuple[float, ...] = ()
    """Higher is more suspicious, for both."""
    details: Mapping[str, Any] = field(default_factory=dict)
