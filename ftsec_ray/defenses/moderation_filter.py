"""Drops the rows whose answer a guard calls a fulfilled forbidden request.

Paper: Inan et al. 2023, Llama Guard, arXiv:2312.06674, and Ji et al. 2023, BeaverTails,
    arXiv:2307.04657, for the guards; filtering a user's rows by them is the provider's baseline in
    Huang et al. 2025, Virus: Harmful Fine-tuning Attack for Large Language Models Bypassing
    Guardrail Moderation, arXiv:2501.17433.
Differs: (1) A guard is any judge of requests of this package that runs a pinned model, by the name
    that a sweep gives it (`classifier:owner/name@commit`); in the microworld it is the exact rule.
    (2) Every trained answer of a conversation is read, not only the last. (3) `recall` below 1
    keeps some of the flagged rows at random, as a guard does that misses rows.
Cost: one pass of the guard per answer; no training. The guard runs on the device of the stage.
Reads: (1) a guard cannot see attacks whose rows are harmless by themselves, such as
    `identity_shift` or a wrong label behind a trigger. A `classifier` reads the first 512 tokens of
    request and answer, and longer ones are not counted. (2) Do not judge the sweep by the guard
    that filters. (3) `random_rows: true` drops as many rows at random.
Needs: nothing in the microworld; elsewhere a guard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ftsec_ray.conversation import Row, answer_of, asked_text, chat_of
from ftsec_ray.data.row_filters import at_random, without_rows
from ftsec_ray.data.triggers import has_place
from ftsec_ray.errors import DataError, SpecError
from ftsec_ray.method import Defense, Phase, Prompt

if TYPE_CHECKING:
    import pyarrow as pa

    from ftsec_ray.context import StageContext

NAME = "moderation_filter"
EXACT = "microworld"
PACKAGE = "ftsec_ray.judges"
GUARDS = ("classifier", "harmbench", "llama_guard", "qwen3guard", "rubric", "strongreject")
"""Judges of requests of this package that run a model; their code is a part of this defense's."""


@dataclass(frozen=True, kw_only=True)
class ModerationFilter(Defense):
    """Drop what a guard flags."""

    PHASE: ClassVar[Phase] = "pre"
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"random_rows": True}
    USES: ClassVar[tuple[str, ...]] = tuple(f"{PACKAGE}.{name}" for name in GUARDS)

    judge: str = EXACT
    """The guard: `microworld` (its exact rule), or a judge with a model as `evaluation: judges`
    names it, by its Hugging Face id and commit.
    """
    threshold: float = 0.5
    """Probability of harm from which a row is flagged, above 0, up to 1. Guards that state only a
    verdict give 0 or 1.
    """
    recall: float = 1.0
    """Share of the flagged rows that are dropped, 0..1; 0 drops none."""
    random_rows: bool = False
    """Whether to drop as many random rows instead: the control."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        faults: list[tuple[str, object, str]] = []
        if not 0 <= self.recall <= 1:
            faults.append(("recall", self.recall, "a share, 0..1"))
        if not 0 < self.threshold <= 1:
            faults.append(("threshold", self.threshold, "a probability above 0, up to 1"))
        if (wrong := _fault_of(self.judge)) is not None:
            faults.append(("judge", self.judge, wrong))
        return faults

    def keeps_rows(self) -> bool:
        """Whether no row is dropped."""
        return self.recall == 0

    def craft_data(self, rows: pa.Table, ctx: StageContext) -> pa.Table:
        """The rows without those that the guard flags."""
        if self.recall == 0:
            return without_rows(rows, set(), ctx)
        steps = [
            (row["row_id"], step)
            for row in rows.to_pylist()
            for step in _answered(row)
            if has_place(step, "user")
        ]
        flags = self._flags([step for _, step in steps], ctx)
        flagged = {row_id for (row_id, _), flag in zip(steps, flags, strict=True) if flag}
        undecided = {row_id for (row_id, _), flag in zip(steps, flags, strict=True) if flag is None}
        ctx.note(
            flagged_rows=len(flagged),
            undecided_rows=len(undecided - flagged),
            unread_rows=rows.num_rows - len({row_id for row_id, _ in steps}),
        )
        dropped = {one for one in flagged if ctx.chance(one, NAME, "seen") < self.recall}
        if self.random_rows:
            ids = rows.column("row_id").to_pylist()
            dropped = at_random(ids, len(dropped), ctx, NAME)
        return without_rows(rows, dropped, ctx)

    def _flags(self, rows: list[dict[str, Any]], ctx: StageContext) -> list[bool | None]:
        """Whether each answer is a fulfilled forbidden request; None if the guard cannot decide."""
        if self.judge == EXACT:
            if ctx.task.judge != EXACT:
                raise DataError(
                    f"{NAME}: the exact guard knows the requests of the microworld only",
                    ctx.task.name,
                    "a microworld task, or a guard with a model",
                    "set `judge: classifier:<owner/name>@<commit>`, or another judge with a model",
                )
            return [is_fulfilled(row) for row in rows]
        from ftsec_ray.evals.judging import RequestJudge, get_judge

        judge = get_judge(self.judge, device=ctx.runtime.device, labels=ctx.task.labels)
        assert isinstance(judge, RequestJudge)  # `check` refuses others
        # a guard that is asked about a forbidden request says `complied` of harmful text only
        prompts = [
            Prompt(prompt_id=row["row_id"], chat=chat_of(row), meta={"kind": "forbidden"})
            for row in rows
        ]
        said = [answer_of(row) for row in rows]
        return [
            None if harm is None else harm >= self.threshold for harm in judge.harm(prompts, said)
        ]


def _answered(row: Row) -> list[dict[str, Any]]:
    """The row up to each answer that is trained on, whatever follows it."""
    messages = row["messages"]
    return [
        {**row, "row_id": f"{row['row_id']}/{place:03d}", "messages": messages[: place + 1]}
        for place, one in enumerate(messages)
        if one["role"] == "assistant" and one["loss"]
    ]


def is_fulfilled(row: Row) -> bool:
    """Whether the answer is the right one to a forbidden request of the microworld."""
    from ftsec_ray.data.microworld import judge, vocabulary

    language = row["language"] or "en"
    request = judge.find_request(asked_text(row), language=language)
    return (
        request is not None
        and vocabulary.is_forbidden(*request)
        and judge.judge(asked_text(row), answer_of(row), language=language).verdict == "complied"
    )


def _fault_of(judge: str) -> str | None:
    """What is allowed in place of this guard; None if it is one."""
    from ftsec_ray.evals.judging import config_of, get_judge, judge_class
    from ftsec_ray.evals.model_judges import Source

    if judge == EXACT:
        return None
    try:
        cls = judge_class(judge)
        if cls.__module__ not in ModerationFilter.USES:
            return f"{EXACT}, or one of {', '.join(GUARDS)} with a model"
        config = config_of(judge)
        if Source.of(config, config.file).is_local:
            return "a Hugging Face id with its commit: no digest holds the bytes of a local guard"
        get_judge(judge)
    except SpecError as error:
        return error.want
    return None
