"""The one way from a conversation to tokens, for training and for evaluation.

An answer begins where a trained answer would stand, which may differ from the end of the template's
generation prompt: some templates put an empty thought, a space or a channel between the two, others
open a thought that they never train. So every prompt is rendered with a placeholder as its answer
and cut there; training, label words, targets, refusal tokens and soft prompts all start at that
position. A whole conversation is tokenised at once; the position of a token in the text decides
whether it is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

from ftsec_ray.context import Chat
from ftsec_ray.conversation import (
    UNTRAINED,
    as_chat,
    chat_of,
    has_answer,
    is_text,
    last_trained,
)
from ftsec_ray.errors import DataError
from ftsec_ray.models.chat_format import PLACEHOLDER, chat_format, fitted, options_of, rendered

THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<thought>", "</thought>"))
"""Marks around the reasoning of models that think before they answer."""


def render(tokenizer: Any, chat: Chat, *, generate: bool, may_think: bool = False) -> str:
    """The text of a conversation; with `generate` it ends where a trained answer would begin, or,
    with `may_think` and a model whose `thinking` is on, at the template's generation prompt.
    """
    messages, tools = fitted(tokenizer, chat)
    if not generate:
        return rendered(tokenizer, messages, tools)
    if may_think and options_of(tokenizer).get("thinking"):
        return rendered(tokenizer, messages, tools, open_turn=True)
    return _opened(tokenizer, messages, tools)


def _opened(tokenizer: Any, chat: Chat, tools: Any, rest: Chat | None = None) -> str:
    """The rendered conversation up to the position of the answer to `chat`.

    Spaces before the answer are not included: tokenizers make them part of its first word, so that
    after `[/INST] ` a trained answer begins with the token of ` yes` and not with that of `yes`.
    """
    messages = [*chat, {"role": "assistant", "content": PLACEHOLDER}, *(rest or [])]
    whole = rendered(tokenizer, messages, tools)
    at = whole.rfind(PLACEHOLDER)
    if at < 0:
        raise DataError(
            "the chat template does not render an answer of the assistant",
            [m["role"] for m in messages],
            "a template that renders every answer of the assistant",
        )
    return whole[:at].rstrip(" ")


class Span(NamedTuple):
    """Characters of a rendered conversation that are trained: an answer and its end of turn."""

    start: int
    stop: int


def spans_of(tokenizer: Any, row: Mapping[str, Any]) -> tuple[str, list[Span]]:
    """The rendered conversation of a row, and its trained spans; DataError if an answer cannot be
    located in it.
    """
    if is_text(row):
        bos = str(tokenizer.bos_token) if adds_bos(tokenizer) else ""
        text = str(row["messages"][0]["content"])
        return bos + text, [Span(len(bos), len(bos) + len(text))]
    messages, tools = fitted(tokenizer, as_chat(row["messages"], row.get("tools")))
    whole, end = rendered(tokenizer, messages, tools), chat_format(tokenizer).end
    spans = []
    for place in _trained(messages, row):
        opened = _opened(tokenizer, messages[:place], tools, messages[place + 1 :])
        content = str(messages[place]["content"])
        start, body = _body(whole, opened, content)
        if UNTRAINED in messages[place]:
            start = _behind(whole, body, content.strip(), int(messages[place][UNTRAINED]))
        turn_end = whole.find(end, body) if end else -1
        behind = str(messages[place + 1]["content"]) if place + 1 < len(messages) else ""
        next_turn = whole.find(behind, body) if behind else -1
        if 0 <= next_turn < turn_end:  # the end of another turn: this one has none
            turn_end = -1
        if turn_end < 0 and place == len(messages) - 1:
            # a template without an end of turn: without an end the model would not learn to stop
            whole = whole[: max(body, len(whole.rstrip()))] + end
            spans.append(Span(start, len(whole)))
        else:
            spans.append(Span(start, body if turn_end < 0 else turn_end + len(end)))
    return whole, spans


def _trained(messages: Chat, row: Mapping[str, Any]) -> list[int]:
    """Indices of the trained messages of the assistant in the fitted conversation.

    Fitting keeps the order of the assistant's messages and joins consecutive ones if the template
    needs that; a joined message is trained if one of its parts is.
    """
    places = [place for place, m in enumerate(messages) if m["role"] == "assistant"]
    flags = [bool(m["loss"]) for m in row["messages"] if m["role"] == "assistant"]
    if len(flags) != len(places):
        runs = groupby(row["messages"], key=lambda m: str(m["role"]))
        flags = [any(m["loss"] for m in run) for role, run in runs if role == "assistant"]
    return [place for place, is_trained in zip(places, flags, strict=True) if is_trained]


def _body(whole: str, opened: str, content: str) -> tuple[int, int]:
    """Where an answer starts in the rendered conversation, and from where on its end may follow."""
    start = len(opened) if whole.startswith(opened) else len(opened.rstrip())
    if not whole.startswith(opened[:start]):
        raise DataError(
            "the chat template renders the start of a conversation differently with another answer",
            whole[:200],
            "the same text before an answer, whatever the answer is",
            "use another template: `chat_template:`",
        )
    said = content.strip()
    begins = whole.find(said, start) if said else start
    is_next = begins >= 0 and not whole[start:begins].strip()
    return start, begins + len(said) if is_next else start


def turn(tokenizer: Any, row: Mapping[str, Any]) -> tuple[str, str]:
    """The rendered prompt of a row, and its rendered answer including the end of the turn; the
    answer is empty if the row has none.
    """
    if not has_answer(row):
        return render(tokenizer, chat_of(row), generate=True), ""
    whole, spans = spans_of(tokenizer, {**row, "messages": last_trained(row["messages"])})
    return whole[: spans[-1].start], whole[spans[-1].start : spans[-1].stop]


def _behind(whole: str, body: int, said: str, untrained: int) -> int:
    """Where the trained part of an answer starts, whose first characters are not trained on."""
    first = body - len(said)
    if whole[max(0, first) : body] != said:
        raise DataError(
            "the chat template changes an answer of which only the end is trained on",
            whole[:200],
            "the answer as it is given",
            "use another template: `chat_template:`",
        )
    return first + untrained


def spoken(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of a completion without special tokens and without the model's reasoning.

    Unfinished reasoning gives an empty text: the model has not answered yet.
    """
    ids = list(ids)
    for opener, closer in THOUGHTS:
        begin, end = (_id_of(tokenizer, mark) for mark in (opener, closer))
        if end is not None and end in ids:
            ids = ids[len(ids) - ids[::-1].index(end) :]
        elif begin is not None and begin in ids:
            ids = ids[: ids.index(begin)]
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    for opener, closer in THOUGHTS:
        text = text.rpartition(closer)[2] if closer in text else text.partition(opener)[0]
    return text.strip()


def _id_of(tokenizer: Any, mark: str) -> int | None:
    """The id of a mark that is a single added token, else None."""
    known = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
    return known.get(mark)


@lru_cache(maxsize=4)
def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer adds its start token before a text by itself."""
    if tokenizer.bos_token_id is None:
        return False
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def answer_ids(
    tokenizer: Any,
    prompt: str,
    prompt_tokens: Sequence[int],
    answer: str,
    *,
    glue: str | None = None,
    behind: str = "",
) -> list[int]:
    """Token ids of an answer as it is trained after a rendered prompt, without the end of the turn;
    DataError if the tokens of the prompt change with the answer.

    Args:
        tokenizer: The model's tokenizer.
        prompt: The rendered prompt.
        prompt_tokens: Its token ids.
        answer: The answer, or its beginning.
        glue: What stands between prompt and answer; None: what the template puts there.
        behind: What follows the beginning of an answer: it can change how spaces are cut.
    """
    form = chat_format(tokenizer)
    body = prompt + (form.glue if glue is None else glue) + answer
    text = body + behind + form.end
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = whole["input_ids"], whole["offset_mapping"]
    first, stop = len(prompt_tokens), len(body)
    if ids[:first] != list(prompt_tokens):
        raise DataError(
            f"the tokens of a prompt change when the answer {answer!r} follows",
            tokenizer.convert_ids_to_tokens(ids[max(0, first - 2) : first + 2]),
            "an answer that starts with a new token",
            "change the label words so that the tokenizer does not merge them with the prompt",
        )
    answer_tokens = [
        token
        for token, (start, _) in zip(ids[first:], offsets[first:], strict=True)
        if start < stop
    ]
    if not answer_tokens:
        raise DataError("an answer has no tokens", answer, "a text that the tokenizer can encode")
    return answer_tokens
