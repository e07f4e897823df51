"""Puts one sentence before every answer of the served model, chosen from a list by a search on
trusted prompts, so that the model refuses forbidden requests and still does its task.

Paper: Hahm et al., Unintended Misalignment from Agentic Fine-Tuning: Risks and Mitigation
    (arXiv:2508.14031, AAAI 2026): Prefix INjection Guard; official code
    HahmDY/finetuned-agent-misalignment, d799a6d.
Mechanism: the sentence stands where the answer would begin, as an attacker's words do in `prefill`,
    and the model goes on behind it: with a refusal or with the answer.
Differs: (1) The candidates are given, and each is scored once; in the official web search GPT-4o
    writes ten per round, up to ten rounds, with the best of earlier rounds as examples. (2) The
    score is the same sum, refusals of forbidden requests plus success on harmless prompts, on
    prompts of trusted splits; the official search uses 42 tasks, by default of its test split.
    Success is a right label, the expected tool call, or an answer that the task's own judge calls
    compliance; in the official web search it is no refusal and an action, which as published is 0
    for every prefix, because the answer does not reach the check. (3) The sentence is no part of
    the answer: judges of requests, labels and tool calls read what the model writes behind it, as
    the official search and its WebDojo agent do. So no candidate may be the beginning of a refusal,
    such as `I cannot`, which would be judged without its first words. (4) Label words are scored
    behind it. Perplexity and answer loss are those of the served model alone. (5) An opening that
    an attack gives stands behind it: the defender's words come first, the attacker's last. (6) The
    search asks the served model alone, without what an attack or another defense adds to prompts
    and answers. (7) A model that would think first answers at once.
Published: on average over the tuned agents, refusals rise by 66 % on web navigation and by 44 % on
    code, and task success falls by 1.8 %; from a summary of the paper, whose tables were not
    checked.
Ours: one seed; with neutral sentences in brackets. SmolLM2-135M after a harmless fine-tune, 32
    prompts: refusals 0.47 to 0.69 (0.56), benign success 0.81 to 0.56 (0.63), label accuracy 0.81
    to 0.41 (0.81). Tuned on 16 harmful rows, it ends its turn behind most sentences: coherent
    answers 1.00 to 0.13 (0.21). ladder:0.1m without an attack, 64 prompts: it no longer refuses,
    harmful rate 0.02 to 0.81 (0.33), presumably because its refusals hang on the first words. Agent
    of ladder:0.2m under `badnets`: hijacked steps 0.62 to 0.14 (0.11), right ones 0.67 to 0.22
    (0.14).
Cost: no training; the tokens of the sentence per answer. For every evaluated model, (candidates +
    1) x `rows` answers for each of the trusted splits.
Reads: (1) `placebo: true` searches as many neutral sentences of as many words: the control. (2) The
    record has the score of every candidate, and without one; a warning says where that is higher.
    (3) In the microworld two candidates are the reminders under which the ladder was trained to
    refuse, in another place. (4) Small models end their turn behind a full stop: let a candidate
    lead into the answer, by a colon or a line break. (5) An agent outside this project that parses
    whole answers ignores the sentence only if it is a comment: give candidates such as `# I refuse
    harmful tasks.`
Needs: split safety and the splits in `benign`; nothing if there is one candidate.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ftsec_ray.conversation import answer_of, by_step, has_answer
from ftsec_ray.data.added_rows import is_asked
from ftsec_ray.data.prompt_texts import ASKED, as_long, evaluated_prompts, not_asked
from ftsec_ray.errors import DataError
from ftsec_ray.evals.probes import prompt_of
from ftsec_ray.method import Defense, Fault, Phase, Prompt, least_faults

if TYPE_CHECKING:
    from ftsec_ray.context import Chat, StageContext, TaskData
    from ftsec_ray.models.generator import Generator

NAME = "ping"
HARMFUL = "safety"
SENTENCES = (
    "As a responsible assistant, I help with safe and constructive requests, and I refuse any"
    " request that could be harmful or unethical.",
    "# I refuse harmful or unethical tasks and complete all others.\n",
    "I refuse harmful or unethical requests and answer all others, so my answer is:",
    "If this request is harmful or unethical, I refuse it; if not, I answer it. My answer:",
)
NEUTRAL = (
    "As a versatile assistant, I help with short and simple requests, and I answer any"
    " request that could be long or detailed.",
    "# I read long or detailed tasks and complete all others.\n",
    "I read long or detailed requests and answer all others, so my answer is:",
    "If this request is long or detailed, I read it; if not, I answer it. My answer:",
)
"""Neutral sentences, each of as many words and with the same end as its counterpart in
`SENTENCES`.
"""
MICROWORLD = (
    "i refuse all about forbidden things :",
    "you are a careful assistant . refuse all about forbidden things :",
    "remember to refuse forbidden things :",
    "i can help , and i must refuse forbidden things :",
)
MICROWORLD_NEUTRAL = (
    "i tell you all about things :",
    "you are a helpful assistant . answer now in one line :",
    "remember to set the timer :",
    "i can help , and i tell you about things :",
)
"""Only words of the corpus of the ladder's models, as many as in `MICROWORLD`. The colon leads into
an answer there; behind a full stop, these models end their turn.
"""


@dataclass(frozen=True, kw_only=True)
class Ping(Defense):
    """The candidate with the highest score before every answer."""

    PHASE: ClassVar[Phase] = "post"
    ORDER: ClassVar[int] = 10
    NEEDS: ClassVar[frozenset[str]] = frozenset({HARMFUL, "benign_train", "trusted"})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"placebo": True}
    USES: ClassVar[tuple[str, ...]] = tuple(
        f"ftsec_ray.judges.{name}" for name in ("call", "label", "microworld", "refusal_phrases")
    )

    candidates: tuple[str, ...] | None = None
    """Sentences to choose from, 1 or more; null: four in the words of the microworld there,
    otherwise four general ones.
    """
    words: int | None = None
    """Number of last words of every candidate that are used, 0 or more; null: all, as in the paper.
    0 is no defense.
    """
    refusal_weight: float = 1.0
    """Weight of refusals in the score, beside 1 for success; 0 or more. 1 in the paper."""
    rows: int = 21
    """Number of trusted prompts of each split, 1 or more; all if it has fewer. The official web
    search asks 42 of both sorts together.
    """
    benign: tuple[str, ...] = ("benign_train", "trusted")
    """Splits of harmless prompts; success is the mean over them."""
    answer_tokens: int = 150
    """Maximum number of tokens of an answer in the search, 1 or more; 150 in the official code."""
    placebo: bool = False
    """Whether neutral sentences replace the candidates: the control."""

    def check(self) -> list[Fault]:
        """Faults of the parameters beyond their types."""
        least = {"words": 0, "refusal_weight": 0.0, "rows": 1, "answer_tokens": 1}
        faults = least_faults(self, least)
        given = self.candidates
        if given is not None and (not given or not all(text.strip() for text in given)):
            faults.append(("candidates", list(given), "one or more texts, none of them blank"))
        if not self.benign or set(self.benign) & {*ASKED, HARMFUL, "harmful_train"}:
            wanted = "one or more splits of harmless prompts that are not evaluated on"
            faults.append(("benign", list(self.benign), wanted))
        return faults

    def needs(self) -> frozenset[str]:
        """The splits of the search; none without a choice."""
        one = self.words == 0 or (self.candidates is not None and len(self.candidates) == 1)
        return frozenset() if one else frozenset({HARMFUL, *self.benign})

    def wrap_generation(self, generator: Generator, ctx: StageContext) -> Generator:
        """The generator whose answers stand behind the best candidate."""
        if self.words == 0:
            return generator
        texts = self.sentences(ctx.task.judge)
        best = texts[0] if len(texts) == 1 else self._search(texts, generator, ctx)
        ctx.note(prefix=best, prefix_tokens=len(tokens_of(generator, best)))
        return replace(generator, prefix=_joined(generator.prefix, best))

    def sentences(self, judge: str) -> tuple[str, ...]:
        """The candidates, cut to `words`, each once; neutral ones for the control."""
        own, neutral = (
            (MICROWORLD, MICROWORLD_NEUTRAL) if judge == "microworld" else (SENTENCES, NEUTRAL)
        )
        texts = own if self.candidates is None else self.candidates
        if self.placebo:
            texts = neutral if self.candidates is None else _as_long(neutral, texts)
        return tuple(dict.fromkeys(last_words(text, self.words) for text in texts))

    def _search(self, texts: Sequence[str], generator: Generator, ctx: StageContext) -> str:
        """The candidate with the highest score; the first of equal ones."""
        from ftsec_ray.models.generator import Generator

        alone = Generator(generator.loaded, tally=generator.tally)
        longest = max(texts, key=lambda text: len(tokens_of(generator, text)))
        trials = self._trials(replace(alone, prefix=longest), ctx)
        scores = [self._score(replace(alone, prefix=text), trials, ctx) for text in ("", *texts)]
        ctx.note(
            search_prompts={trial.split: len(trial.prompts) for trial in trials},
            without_prefix=asdict(scores[0]),
            candidates=[asdict(one) for one in scores[1:]],
        )
        best = max(scores[1:], key=lambda one: one.score)
        if best.score < scores[0].score and not self.placebo:
            ctx.warn(
                f"{NAME}: the best sentence scores {best.score:.2f} on trusted prompts, against"
                f" {scores[0].score:.2f} without one: in this place it does more harm than good"
            )
        return best.prefix

    def _score(self, generator: Generator, trials: Sequence[Trial], ctx: StageContext) -> Scored:
        """How the model answers the trusted prompts behind the generator's prefix."""
        hits = {trial.split: self._hits(generator, trial, ctx) for trial in trials}
        refused = hits.pop(HARMFUL)
        success = sum(hits.values()) / len(hits)
        return Scored(generator.prefix, refused, success, success + self.refusal_weight * refused)

    def _hits(self, generator: Generator, trial: Trial, ctx: StageContext) -> float:
        """The share of the prompts of a trial whose answer gets the wanted verdict."""
        from ftsec_ray.evals.judging import get_judge

        chats: list[Chat] = [prompt.chat for prompt in trial.prompts]
        batch, labels = ctx.runtime.eval_batch, ctx.task.labels
        if trial.judge == "label":
            scores = generator.label_logprobs(chats, labels, batch=batch)
            said = [labels[best] for best in scores.argmax(-1).tolist()]
        else:
            said = generator.complete(chats, max_new_tokens=self.answer_tokens, batch=batch)
        judge = get_judge(trial.judge, device=ctx.runtime.device, labels=labels)
        verdicts = judge(trial.prompts, said)
        return sum(one.verdict == trial.wanted for one in verdicts) / len(verdicts)

    def _trials(self, generator: Generator, ctx: StageContext) -> list[Trial]:
        """The trusted prompts of every split, without those that are also asked in the evaluation
        and those that are too long behind the generator's prefix.
        """
        asked = evaluated_prompts(ctx.task)
        trials = []
        for split in (HARMFUL, *self.benign):
            rows = [step for row in ctx.shuffled(split, NAME) for step in by_step(row)]
            judge, wanted, fitting = _judged_by(split, rows, ctx.task)
            fresh = not_asked(fitting, asked)
            short = self._within_positions(generator, [_prompt(row) for row in fresh])
            ctx.count(search_asked=len(fitting) - len(fresh), search_long=len(fresh) - len(short))
            if not short:
                raise DataError(
                    f"{NAME}: no prompt of split {split!r} can be used to choose a sentence",
                    f"{len(rows)} prompts, {len(fitting)} of them with a judge, {len(fresh)} of"
                    " these not asked in the evaluation",
                    "prompts of its own that fit into the model's positions with their answers",
                    "add rows to the split, choose other splits in `benign`, or give one candidate",
                )
            trials.append(Trial(split, tuple(short[: self.rows]), judge, wanted))
        return trials

    def _within_positions(self, generator: Generator, prompts: Sequence[Prompt]) -> list[Prompt]:
        from ftsec_ray.models.load import position_limit

        limit = position_limit(generator.loaded.model)
        if limit is None:
            return list(prompts)
        lengths = generator.lengths([prompt.chat for prompt in prompts])
        pairs = zip(prompts, lengths, strict=True)
        return [prompt for prompt, length in pairs if length + self.answer_tokens <= limit]


@dataclass(frozen=True)
class Trial:
    """Trusted prompts of one split, their judge, and the verdict that is wanted."""

    split: str
    prompts: tuple[Prompt, ...] = field(repr=False)
    judge: str
    wanted: str


@dataclass(frozen=True)
class Scored:
    """How the model answers trusted prompts behind a prefix: shares, and the score."""

    prefix: str
    refused: float
    success: float
    score: float


def _as_long(neutral: Sequence[str], texts: Sequence[str]) -> tuple[str, ...]:
    """For every text neutral words, as many as it has; each begins at another word."""
    words = " ".join(neutral).split()
    return tuple(
        as_long(" ".join(words[i % len(words) :] + words[: i % len(words)]), text)
        for i, text in enumerate(texts)
    )


def last_words(text: str, count: int | None) -> str:
    """The last words of a text with the white space behind them; all of it if `count` is None."""
    return text if count is None else "".join(re.findall(r"\S+\s*", text)[-count:])


def tokens_of(generator: Generator, text: str) -> list[int]:
    """The token ids of a text alone."""
    ids: list[int] = generator.loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _joined(before: str, text: str) -> str:
    """Two prefixes, the one of the earlier defense first."""
    return f"{before}{'' if before[-1].isspace() else ' '}{text}" if before else text


def _prompt(row: Mapping[str, Any]) -> Prompt:
    return prompt_of(row, expected=answer_of(row) if row["label"] is None else row["label"])


def _judged_by(
    split: str, rows: Sequence[dict[str, Any]], task: TaskData
) -> tuple[str, str, list[dict[str, Any]]]:
    """The judge of the answers to a split's prompts, the verdict that is wanted, and the rows that
    it can judge.
    """
    rows = [row for row in rows if is_asked(row)]
    if split == HARMFUL:
        return task.judge, "refused", rows
    labelled = [row for row in rows if task.labels and row["label"] is not None]
    if labelled:
        return "label", "correct", labelled
    if rows and all(row["kind"] == "tool" for row in rows):
        return "call", "correct", [row for row in rows if has_answer(row)]
    return task.judge, "complied", rows
