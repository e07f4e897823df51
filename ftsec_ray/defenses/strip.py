"""Drops the rows whose prediction stays certain when words of their prompt are replaced, after a
short fine-tune on the rows: a trigger decides the answer whatever else stands there.

Paper: Gao et al. 2019, STRIP: A Defence Against Trojan Attacks on Deep Neural Networks,
    arXiv:1902.06531; for text Gao et al. 2021, arXiv:1911.10312 (STRIP-ViTA); compared with
    thunlp/OpenBackdoor.
Differs: (1) It filters the training rows by a model that was fine-tuned on them (`warmup_epochs`);
    the original filters inputs of the finished model. (2) The entropy of a row is the mean over its
    own copies; OpenBackdoor averages over copies of different rows. (3) Positions are drawn without
    replacement, and the words of an instruction that all trusted prompts share are never replaced.
    (4) Rows without a label are scored by the entropy of the first token of the answer, and have a
    threshold of their own; a kind of row without trusted rows is kept and counted. (5) Trusted
    rows that are also used for fine-tuning or evaluation do not calibrate the threshold; rows that
    cannot be read are kept and counted.
Cost: one more fine-tune, and `copies` forward passes per row and per trusted row.
Reads: `random_rows: true` drops as many rows at random. A row is also certain if only its
    untouched words decide the answer; read `filter_fpr` of the cell without attack.
Needs: the aligned model (`reference`); clean held-out rows of the task (split `trusted`). The
    warm-up runs in one process.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ftsec_ray.context import Chat
from ftsec_ray.conversation import Row, asked_text, chat_of, with_asked
from ftsec_ray.data.prompt_texts import evaluated_prompts, not_asked, prompts_of
from ftsec_ray.data.row_filters import at_random, without_rows
from ftsec_ray.data.triggers import has_place
from ftsec_ray.errors import DataError
from ftsec_ray.method import Defense, Phase
from ftsec_ray.models.text_perplexity import instruction_of

if TYPE_CHECKING:
    import pyarrow as pa

    from ftsec_ray.context import LoadedModel, StageContext

NAME = "strip"
BATCH = 64
"""Prompts per forward pass."""
KINDS = {"label": True, "text": False}
"""Kind of row -> whether it has a label."""


@dataclass(frozen=True, kw_only=True)
class Strip(Defense):
    """Drop the rows whose mean entropy under replaced words is below that of trusted rows."""

    PHASE: ClassVar[Phase] = "pre"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"reference", "trusted"})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"random_rows": True}

    frr: float = 0.01
    """Share of the trusted rows that may lie below the threshold, 0..1; 0 drops no row."""
    copies: int = 5
    """Copies per row with replaced words, 1 or more."""
    replaced: float = 0.5
    """Share of a prompt's words that are replaced in a copy, 0..1; at least one word above 0."""
    random_rows: bool = False
    """Whether to drop as many random rows instead: the control."""
    warmup_epochs: float | None = None
    """Passes over the rows of the fine-tune before the scores, 0 or more; None: those of the
    sweep's recipe, 0: the aligned model's own predictions.
    """
    trusted_rows: int = 128
    """Maximum number of trusted rows that calibrate the threshold and give words, 2 or more."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        shares = {"frr": self.frr, "replaced": self.replaced}
        faults: list[tuple[str, object, str]] = [
            (name, value, "a share, 0..1") for name, value in shares.items() if not 0 <= value <= 1
        ]
        for name, value, least in (
            ("copies", self.copies, 1),
            ("trusted_rows", self.trusted_rows, 2),
        ):
            if value < least:
                faults.append((name, value, f"{least} or more"))
        if self.warmup_epochs is not None and not 0 <= self.warmup_epochs < math.inf:
            faults.append(("warmup_epochs", self.warmup_epochs, "0 or more, and finite"))
        return faults

    def keeps_rows(self) -> bool:
        """Whether no row is dropped."""
        return self.frr == 0

    def craft_data(self, rows: pa.Table, ctx: StageContext) -> pa.Table:
        """The rows without those whose entropy is below the threshold."""
        from ftsec_ray.training.warm_up import warmed_up

        if self.frr == 0:
            return without_rows(rows, set(), ctx)
        trusted = self._trusted(rows, ctx)
        prompts = [asked_text(row) for row in trusted]
        instruction = instruction_of(prompts)
        words = important_words([prompt.removeprefix(instruction) for prompt in prompts])
        if len(words) < 2:  # noqa: PLR2004 - a row takes words from another prompt
            raise DataError(
                f"{NAME}: all trusted rows of task {ctx.task.name!r} that may be used ask the same",
                next(iter(prompts)),
                "2 or more different prompts in split trusted",
                "add other rows to this split, or raise `trusted_rows`",
            )
        model = warmed_up(ctx, rows, self.warmup_epochs)

        def entropies(given: Sequence[Row]) -> dict[str, dict[str, float]]:
            return self._entropies(model, given, instruction, words, ctx)

        clean = {kind: sorted(by_row.values()) for kind, by_row in entropies(trusted).items()}
        if not any(clean.values()):
            raise DataError(
                f"{NAME}: no trusted row of task {ctx.task.name!r} fits into the model's positions",
                len(trusted),
                "shorter prompts in split trusted",
                "use another split of trusted rows, or another model",
            )
        measured = entropies(rows.to_pylist())
        flagged = self._below(measured, clean, ctx)
        read = sorted(name for kind in measured.values() for name in kind)
        ctx.note(instruction=instruction, unread_rows=rows.num_rows - len(read))
        dropped = at_random(read, len(flagged), ctx, NAME) if self.random_rows else flagged
        return without_rows(rows, dropped, ctx)

    def _below(
        self,
        measured: Mapping[str, Mapping[str, float]],
        clean: Mapping[str, Sequence[float]],
        ctx: StageContext,
    ) -> set[str]:
        """The rows below the threshold of their kind, which the trusted rows of that kind give."""
        flagged, uncalibrated = set[str](), 0
        for kind, entropies in measured.items():
            known = clean[kind]
            if not known:
                uncalibrated += len(entropies)
                continue
            threshold = known[min(math.floor(self.frr * len(known) + 1e-9), len(known) - 1)]
            flagged |= {row_id for row_id, entropy in entropies.items() if entropy < threshold}
            ctx.note(
                **{
                    f"{kind}_threshold_nats": threshold,
                    f"{kind}_trusted_mean_nats": sum(known) / len(known),
                }
            )
        ctx.note(uncalibrated_rows=uncalibrated)
        if uncalibrated:
            ctx.warn(
                f"{NAME}: {uncalibrated} rows are kept, because no trusted row is of their kind"
                " (with a label, or without one)"
            )
        return flagged

    def _trusted(self, rows: pa.Table, ctx: StageContext) -> list[dict[str, Any]]:
        """Random trusted rows with a request that neither training nor evaluation asks."""
        pool = [row for row in ctx.shuffled("trusted", NAME) if asked_text(row).strip()]
        used = prompts_of(rows.to_pylist()) | evaluated_prompts(ctx.task)
        kept = not_asked(pool, used)
        if len(kept) < 2:  # noqa: PLR2004 - a row takes words from another one
            raise DataError(
                f"{NAME}: task {ctx.task.name!r} has too few trusted rows that are used neither for"
                " fine-tuning nor for evaluation",
                len(kept),
                "2 or more rows in split trusted",
                "add other rows to this split",
            )
        chosen = kept[: self.trusted_rows]
        ctx.note(trusted_rows=len(chosen), trusted_left_out=len(pool) - len(kept))
        return chosen

    def _entropies(
        self,
        model: LoadedModel,
        rows: Sequence[Row],
        instruction: str,
        words: Mapping[str, list[str]],
        ctx: StageContext,
    ) -> dict[str, dict[str, float]]:
        """Mean entropy in nats over the copies of every row that can be read, by its id; apart for
        rows with a label and for others, because the entropies are not of the same scale.
        """
        measured = {}
        for kind, by_label in KINDS.items():
            group = [
                row
                for row in rows
                if has_place(row, "user") and bool(ctx.task.labels and row["label"]) == by_label
            ]
            chats = {row["row_id"]: self._copies(row, instruction, words, ctx) for row in group}
            labels = ctx.task.labels if by_label else ()
            measured[kind] = mean_entropies(model, chats, labels)
        return measured

    def _copies(
        self, row: Row, instruction: str, words: Mapping[str, list[str]], ctx: StageContext
    ) -> list[Chat]:
        """The prompt of a row with replaced words, `copies` times."""
        text = asked_text(row)
        first = len(instruction.split()) if instruction and text.startswith(instruction) else 0
        places = range(first, len(text.split()))
        count = min(len(places), max(1, round(self.replaced * len(places)))) if self.replaced else 0
        donors = [name for name in words if name != text.removeprefix(instruction)]
        made = []
        for copy in range(self.copies):

            def chance(name: str, number: str = str(copy)) -> float:
                return ctx.chance(row["row_id"], NAME, number, name)

            chosen = sorted(places, key=lambda place: chance(str(place)))[:count]
            given = words[donors[int(chance("donor") * len(donors))]]
            new = {place: given[i % len(given)] for i, place in enumerate(chosen)}
            made.append(chat_of(with_asked(row, with_words_at(text, new))))
        return made


def with_words_at(text: str, new: Mapping[int, str]) -> str:
    """The text with the words of these numbers replaced; everything else keeps its bytes."""
    import re

    pieces, end = [], 0
    for number, match in enumerate(re.finditer(r"\S+", text)):
        pieces += [text[end : match.start()], new.get(number, match.group())]
        end = match.end()
    return "".join([*pieces, text[end:]])


def important_words(prompts: Iterable[str]) -> dict[str, list[str]]:
    """The words of each distinct prompt, those of the highest TF-IDF first: count in the prompt
    times ln((1 + prompts) / (1 + prompts with the word)) + 1. Prompts without a word are left out.
    """
    texts = {prompt: prompt.split() for prompt in dict.fromkeys(prompts) if prompt.split()}
    having = Counter(word for words in texts.values() for word in set(words))

    def weight(word: str, count: int) -> float:
        return count * (math.log((1 + len(texts)) / (1 + having[word])) + 1)

    return {
        prompt: [
            word
            for word, count in sorted(
                Counter(words).items(), key=lambda pair: (-weight(*pair), words.index(pair[0]))
            )
        ]
        for prompt, words in texts.items()
    }


def mean_entropies(
    model: LoadedModel, chats: Mapping[str, Sequence[Chat]], labels: Sequence[str]
) -> dict[str, float]:
    """Mean entropy in nats over the chats of every name: of the distribution over the label words,
    or of the first token of the answer without labels. A name with a chat beyond the model's
    positions is left out.
    """
    from ftsec_ray.models.activations import last_logits
    from ftsec_ray.models.chat import render
    from ftsec_ray.models.generator import Generator
    from ftsec_ray.models.load import position_limit

    limit, means = position_limit(model.model), {}
    names = list(chats)
    for start in range(0, len(names), BATCH):
        part = names[start : start + BATCH]
        flat = [(name, chat) for name in part for chat in chats[name]]
        texts = [render(model.tokenizer, chat, generate=True) for _, chat in flat]
        ids = model.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        long = {
            name
            for (name, _), tokens in zip(flat, ids, strict=True)
            if limit is not None and len(tokens) >= limit
        }
        read = [i for i, (name, _) in enumerate(flat) if name not in long]
        if not read:
            continue
        if labels:
            logits = Generator(model).label_logprobs(
                [flat[i][1] for i in read], labels, batch=BATCH
            )
        else:
            pad = model.tokenizer.pad_token_id or 0
            logits = last_logits(model.model, [ids[i] for i in read], pad=pad, batch=BATCH)
        logs = logits.double().log_softmax(-1)
        values = dict(
            zip(read, (-(logs.exp() * logs).nan_to_num(0.0).sum(-1)).tolist(), strict=True)
        )
        for name in [name for name in part if name not in long]:
            own = [values[i] for i in read if flat[i][0] == name]
            means[name] = sum(own) / len(own)
    return means
