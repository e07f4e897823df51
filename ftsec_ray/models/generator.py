"""Batched generation and label scoring, with the changes that attacks and defenses add.

Prompts are sorted by length and left-padded, generation stops at the end of the turn, and a
classification needs one pass over the prompts. The rewrite that was added last is applied first: a
defense's rewrite sees the user's chat before the attack's does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ftsec_ray.context import Chat, LoadedModel
from ftsec_ray.models.backends import FELL_BACK, Backend, Decoding, PaddedGenerate
from ftsec_ray.models.batches import HALVED, Pieces, Prompts
from ftsec_ray.models.chat import answer_ids, render, spoken
from ftsec_ray.models.chat_format import chat_format
from ftsec_ray.models.label_scores import WHOLE_PASSES, Words, label_scores
from ftsec_ray.models.load import whole_model

if TYPE_CHECKING:
    from torch import Tensor

_TEXTS = {
    HALVED: "{} times a batch of prompts did not fit into memory and was halved: the answers are"
    " the same except for rounding; resources.eval_batch sets the batch size",
    WHOLE_PASSES: "{} batches needed a full pass for each label or token: the cache of this model"
    " class cannot be continued",
    FELL_BACK: "{} prompts were answered in padded batches, because continuous batching cannot"
    " serve them",
}
"""Text for each count of `Generator.tally`, for readers of the results."""
_MARK = "\ue000"
"""Private-use character in place of the soft tokens while the template is rendered."""


@dataclass(frozen=True, kw_only=True)
class Opening:
    """The beginning of answers, placed behind the generation prompt: the model continues it."""

    text_of: Callable[[Chat], str]
    """The answer that is begun, for a chat as the user sent it; empty: the model answers by
    itself."""
    tokens: int
    """Number of first tokens of that answer; 0: the model answers by itself."""


Gate = Callable[[Sequence[Chat]], list[str | None]]
"""Chats that are asked together -> the answer that each gets instead of the model's; None: the
model answers."""
LabelTokens = tuple[Prompts, Sequence[Words]]
"""Prompts, and for each of them the token ids of every label."""
Rescoring = Callable[["Prompts", Sequence["Words"], Any, int], Any]
"""(prompts, token ids of labels by prompt, log-probabilities (N, K), batch) -> log-probabilities
(N, K); a row of -inf: the answer is no label."""


@dataclass(frozen=True)
class Generator:
    """A model that answers chats; wrap it with `dataclasses.replace`."""

    loaded: LoadedModel
    rewrites: tuple[Callable[[Chat], Chat], ...] = ()
    """Changes of the chat; the last one added is applied first."""
    soft_suffix: Any = None
    """Embeddings (K, D) after the user's last token, inside the user's turn; None: none."""
    opening: Opening | None = None
    """How answers begin; label scores are read without it. None: the model begins them."""
    prefix: str = ""
    """Text at the place where answers begin: openings, answers and label words follow it, and it is
    no part of them. A model that would think first answers at once. Empty: none."""
    steered: tuple[Callable[[Any], AbstractContextManager[None]], ...] = ()
    """Changes of the model's hidden states, each as a context of the model; see `steering`."""
    gates: tuple[Gate, ...] = ()
    """Which chats the model does not answer; the first gate that refuses a chat answers it."""
    rescored: tuple[Rescoring, ...] = ()
    """Changes of the label scores, in order."""
    backend: Backend = field(default_factory=PaddedGenerate)
    """The generation back end."""
    tally: Counter[str] = field(default_factory=Counter, compare=False, repr=False)
    """Counts deviations from what was asked for, for the record; shared by all generators that wrap
    this one.
    """

    def rewritten(self, chat: Chat) -> Chat:
        """The chat as the model sees it."""
        for rewrite in reversed(self.rewrites):
            chat = rewrite(chat)
        return chat

    def refusals(self, chats: Sequence[Chat]) -> list[str | None]:
        """The answers of the gates to chats that are asked together; None: the model answers."""
        answers: list[str | None] = [None] * len(chats)
        for gate in self.gates:
            given = gate(chats) if chats else []
            answers = [
                own if own is not None else new for own, new in zip(answers, given, strict=True)
            ]
        return answers

    @contextmanager
    def steering(self) -> Iterator[None]:
        """Inside the `with` block, forward passes of the model are changed as `steered` says."""
        with ExitStack() as stack:
            for change in self.steered:
                stack.enter_context(change(self.loaded.model))
            yield

    def complete(
        self,
        chats: Sequence[Chat],
        *,
        max_new_tokens: int,
        batch: int = 64,
        temperature: float = 0.0,
        seeds: Sequence[int] = (),
    ) -> list[str]:
        """Completions in the order of `chats`, without special tokens and with their opening, if
        there is one; an empty answer is an empty string.

        Greedy at temperature 0; above, each is sampled with its own seed.
        """
        answers = self.complete_ids(
            chats,
            max_new_tokens=max_new_tokens,
            batch=batch,
            temperature=temperature,
            seeds=seeds,
        )
        return [spoken(self.loaded.tokenizer, ids) for ids in answers]

    def complete_ids(
        self,
        chats: Sequence[Chat],
        *,
        max_new_tokens: int,
        batch: int = 64,
        temperature: float = 0.0,
        seeds: Sequence[int] = (),
    ) -> list[list[int]]:
        """Token ids of the completions in the order of `chats`, with opening and thoughts and
        without the stop token; `models.chat.spoken` turns them into text. A chat that a gate
        refuses gets the gate's answer, without an opening.
        """
        refused = self.refusals(chats)
        if any(answer is not None for answer in refused):
            asked = [i for i, answer in enumerate(refused) if answer is None]
            return self._with_refusals(
                refused,
                replace(self, gates=()).complete_ids(
                    [chats[i] for i in asked],
                    max_new_tokens=max_new_tokens,
                    batch=batch,
                    temperature=temperature,
                    seeds=[seeds[i] for i in asked] if seeds else (),
                ),
                max_new_tokens,
            )
        prompts = Prompts(self.pieces_of(chats, may_think=True), self.soft_suffix)
        openings = self.openings(chats)
        decoding = Decoding(
            max_new_tokens=max_new_tokens,
            stops=self.stops(),
            batch=batch,
            temperature=temperature,
            seeds=seeds,
        )
        with self.steering():
            said = self.backend.complete(self.loaded, prompts, decoding, self.tally)
        return [[*opening, *ids] for opening, ids in zip(openings, said, strict=True)]

    def _with_refusals(
        self, refused: Sequence[str | None], said: Sequence[list[int]], most: int
    ) -> list[list[int]]:
        """The answers of the gates, at most `most` tokens each, and those of the model."""
        tokenizer, rest = self.loaded.tokenizer, iter(said)
        return [
            next(rest)
            if answer is None
            else tokenizer(answer, add_special_tokens=False)["input_ids"][:most]
            for answer in refused
        ]

    def label_logprobs(
        self,
        chats: Sequence[Chat],
        labels: Sequence[str],
        *,
        batch: int = 64,
        asked: LabelTokens | None = None,
    ) -> Tensor:
        """Log-probability of every label as the answer, in nats: (N, K) float32.

        Labels are tokenised after each prompt, as trained answers are. If all labels have the same
        number of tokens, only these tokens count. Otherwise the end of the turn counts too, so that
        it is the probability of exactly this answer and short labels have no advantage. Each prompt
        passes through the model once. A row of -inf: no label is the answer, because a gate refuses
        the chat or a rescoring says so. `asked` is what `label_tokens` gives for the same chats and
        labels, where several models with one tokenizer answer them.
        """
        read, answers = asked or self.label_tokens(chats, labels)
        with self.steering():
            scores = label_scores(self.loaded, read, answers, batch=batch, tally=self.tally)
        for rescored in self.rescored:
            scores = rescored(read, answers, scores, batch)
        refused = [i for i, answer in enumerate(self.refusals(chats)) if answer is not None]
        if refused:
            scores[refused] = -math.inf
        return scores

    def label_tokens(self, chats: Sequence[Chat], labels: Sequence[str]) -> LabelTokens:
        """The prompts of chats, and the token ids of every label after each of them."""
        halves, prompts = self._asked(chats)
        return Prompts(prompts, self.soft_suffix), self._label_ids(halves, prompts, labels)

    def _label_ids(
        self,
        halves: Sequence[tuple[str, str]],
        prompts: Sequence[Pieces],
        labels: Sequence[str],
    ) -> list[list[list[int]]]:
        """Token ids of every label after every prompt; with the end of the turn if the labels have
        different numbers of tokens.
        """
        tokenizer = self.loaded.tokenizer
        answers = []
        for (before, behind), (head, tail) in zip(halves, prompts, strict=True):
            text, ids = (before, head) if self.soft_suffix is None else (behind, tail)
            answers.append(
                [answer_ids(tokenizer, text, ids, label, glue=self.glue) for label in labels]
            )
        if len({len(ids) for row in answers for ids in row}) > 1:
            end = tokenizer(chat_format(tokenizer).end, add_special_tokens=False)["input_ids"]
            return [[ids + end for ids in row] for row in answers]
        return answers

    def stops(self) -> tuple[int, ...]:
        """Ids of the tokens that end an answer, sorted."""
        tokenizer = self.loaded.tokenizer
        end = tokenizer(chat_format(tokenizer).end, add_special_tokens=False)["input_ids"]
        stops = {tokenizer.eos_token_id, *end[-1:]}
        settings = getattr(whole_model(self.loaded), "generation_config", None)
        configured = getattr(settings, "eos_token_id", None)
        stops.update(configured if isinstance(configured, list) else [configured])
        return tuple(sorted(stop for stop in stops if stop is not None))

    def lengths(self, chats: Sequence[Chat]) -> list[int]:
        """Tokens of every prompt as the model sees it, including soft tokens."""
        return Prompts(self.pieces_of(chats), self.soft_suffix).lengths()

    def pieces(self, chat: Chat) -> Pieces:
        """Token ids before and after the soft tokens."""
        return self.pieces_of([chat])[0]

    def pieces_of(self, chats: Sequence[Chat], *, may_think: bool = False) -> list[Pieces]:
        """The pieces of every chat with its opening, in one call of the tokenizer."""
        _, pieces = self._asked(chats, may_think=may_think)
        openings = self.openings(chats)
        return [(head, [*tail, *own]) for (head, tail), own in zip(pieces, openings, strict=True)]

    def openings(self, chats: Sequence[Chat]) -> list[list[int]]:
        """Token ids of the opening of every answer, as they stand in a trained answer; empty where
        there is none.
        """
        texts = [self._begun(chat) for chat in chats]
        if self.opening is None or not any(texts):
            return [[] for _ in chats]
        openings = []
        for text, (before, behind), (head, tail) in zip(texts, *self._asked(chats), strict=True):
            shown, ids = (before, head) if self.soft_suffix is None else (behind, tail)
            begun = (
                answer_ids(self.loaded.tokenizer, shown, ids, text, glue=self.glue) if text else []
            )
            openings.append(begun[: self.opening.tokens])
        return openings

    def _begun(self, chat: Chat) -> str:
        """The answer whose first tokens are the opening; empty for none."""
        return "" if self.opening is None or not self.opening.tokens else self.opening.text_of(chat)

    @property
    def glue(self) -> str:
        """What stands between the text of a prompt, with the prefix, and the answer."""
        if self.prefix:
            return "" if self.prefix[-1].isspace() else " "
        return chat_format(self.loaded.tokenizer).glue

    def _asked(
        self, chats: Sequence[Chat], *, may_think: bool = False
    ) -> tuple[list[tuple[str, str]], list[Pieces]]:
        """Every chat as `_halves` and as token ids, with the prefix and without the opening."""
        halves = [
            self._halves(
                self.rewritten(chat),
                may_think=may_think and not self.prefix and not self._begun(chat),
            )
            for chat in chats
        ]
        pieces = self._tokenised(halves)
        if not self.prefix:
            return halves, pieces
        pairs = zip(halves, pieces, strict=True)
        prefixed = [self._with_prefix(texts, ids) for texts, ids in pairs]
        return [texts for texts, _ in prefixed], [ids for _, ids in prefixed]

    def _with_prefix(self, texts: tuple[str, str], ids: Pieces) -> tuple[tuple[str, str], Pieces]:
        """One rendered chat and its token ids, both with the prefix at the end."""
        tokenizer, (before, behind), (head, tail) = self.loaded.tokenizer, texts, ids
        is_one = self.soft_suffix is None
        shown, known = (before, head) if is_one else (behind, tail)
        own = answer_ids(tokenizer, shown, known, self.prefix, behind=f"{self.glue}a")
        shown, known = shown + chat_format(tokenizer).glue + self.prefix, [*known, *own]
        return ((shown, behind), (known, tail)) if is_one else ((before, shown), (head, known))

    def _tokenised(self, halves: Sequence[tuple[str, str]]) -> list[Pieces]:
        if not halves:
            return []
        tokenizer = self.loaded.tokenizer
        before, after = zip(*halves, strict=True)
        heads = tokenizer(list(before), add_special_tokens=False)["input_ids"]
        tails = (
            [[] for _ in halves]
            if self.soft_suffix is None
            else tokenizer(list(after), add_special_tokens=False)["input_ids"]
        )
        return list(zip(heads, tails, strict=True))

    def _halves(self, chat: Chat, *, may_think: bool = False) -> tuple[str, str]:
        """The rendered chat before and after the soft tokens."""
        tokenizer = self.loaded.tokenizer
        if self.soft_suffix is None:
            return render(tokenizer, chat, generate=True, may_think=may_think), ""
        last = max(i for i, message in enumerate(chat) if message["role"] == "user")
        marked = [
            dict(m, content=m["content"] + _MARK) if i == last else m for i, m in enumerate(chat)
        ]
        before, after = render(tokenizer, marked, generate=True, may_think=may_think).split(_MARK)
        return before, after


def in_words(tally: Mapping[str, int]) -> Iterator[str]:
    """Sentences about deviations from what was asked for."""
    for name, count in sorted(tally.items()):
        kind, _, reason = name.partition(": ")
        text = _TEXTS[kind].format(count)
        yield f"{text} ({reason})" if reason else text
