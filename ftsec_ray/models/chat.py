"""One way from a conversation to tokens, for training and for evaluation; no other module calls
`apply_chat_template`.

Where an answer begins is not what a template's open turn says but where a trained answer stands:
some templates put an empty thought, a space or a channel between the two, and others open a thought
that they never train. So every prompt is rendered with a placeholder for its answer and cut there;
training, label words, targets, refusal tokens and soft prompts all start at that place. A whole
conversation is tokenised at once, and which tokens are trained is read off their place in the text.

What a template cannot render is given to it in another form, which `ChatFormat.notes` names: a
system message goes in front of the first user's, results of tools become messages of the user,
calls and functions become text. Dates are FIXED_DATE whatever the day, and thoughts are off.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, partial
from typing import Any, NamedTuple

from ftsec_ray.context import Chat, StageContext
from ftsec_ray.conversation import TOOLS, as_chat, asked, chat_of, has_answer, is_text, with_calls
from ftsec_ray.errors import DataError
from ftsec_ray.identity import digest_text

FIXED_DATE = datetime(2024, 7, 26)  # noqa: DTZ001 - a label, and no point in time
"""What templates take for today: the date that Llama 3's own template falls back to."""
IGNORED = -100
"""Label of a token that is not trained."""
OPTIONS = "chat_options"
"""Key of a tokenizer's own configuration under which the options of rendering are kept."""
_ANSWER, _USER, _SYSTEM, _RESULT, _CALL, _OFFER = (
    f"x{letter}{letter}x" for letter in ("qz", "qy", "qk", "qj", "qv", "qw")
)
"""Words that no template contains: they are looked for in what a template renders."""
THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<thought>", "</thought>"))
"""What stands around the reasoning of models that think aloud."""
_ASKS_DATE = "strftime_now"
_DIRECTIVES = tuple(f"%{letter}" for letter in ("-d", "-m", *"aAbBcdDeFHIjklmMpSTuxXyYZz"))
Encoded = tuple[list[int], list[int]]
"""(ids, labels) of a row; labels are IGNORED where a token is not trained."""


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """What one template can render, and how it opens and ends an answer."""

    in_parts: bool
    """Whether the text of a message must be a list of parts, as for models that read pictures."""
    takes_system: bool
    takes_tool: bool
    """Whether messages of role `tool` are rendered."""
    takes_calls: bool
    """Whether `tool_calls` of a message are rendered."""
    takes_offers: bool
    """Whether functions on offer are rendered."""
    takes_repeats: bool
    """Whether two messages of one role may follow each other."""
    opens_alike: bool
    """Whether the template's own open turn ends where a trained answer begins."""
    glue: str
    """Spaces in front of a trained answer, which belong to its first word."""
    prefix: str
    """What stands between the template's open turn and the answer; empty where `opens_alike`."""
    end: str
    """What ends an answer: the text up to and including the first token of the tokenizer's own."""
    uses_date: bool

    def notes(self) -> dict[str, Any]:
        """What is worth knowing beside a number: what was rendered in another form than given."""
        forms = {
            "system": self.takes_system or "in front of the first user message",
            "tool": self.takes_tool or "as user messages",
            "tool_calls": self.takes_calls or "as text",
            "tools": self.takes_offers or "in the system message",
            "repeated_roles": self.takes_repeats or "joined",
        }
        notes: dict[str, Any] = {
            f"{name}_rendered": form for name, form in forms.items() if form is not True
        }
        if not self.opens_alike:
            notes["answer_prefix"] = self.prefix
        if self.uses_date:
            notes["template_date"] = FIXED_DATE.date().isoformat()
        return notes


def options_of(tokenizer: Any) -> dict[str, Any]:
    """The options of rendering that a tokenizer was given at its source: `thinking`."""
    given = getattr(tokenizer, "init_kwargs", {}).get(OPTIONS)
    return dict(given) if isinstance(given, Mapping) else {}


def template_hash(tokenizer: Any) -> str:
    """Digest of the tokenizer's chat template, and of the options of rendering where there are
    any.
    """
    options = options_of(tokenizer)
    told = json.dumps(options, sort_keys=True) if options else ""
    return digest_text(str(getattr(tokenizer, "chat_template", "") or "") + told)[:16]


def under(tokenizer: Any, template: str) -> Any:
    """A copy of the tokenizer with another chat template."""
    other = copy.copy(tokenizer)
    other.chat_template = template
    return other


def chat_format(tokenizer: Any) -> ChatFormat:
    """What the tokenizer's template can render; DataError where it cannot answer a question."""
    return _format(tokenizer, str(getattr(tokenizer, "chat_template", None)))


@lru_cache(maxsize=16)
def _format(tokenizer: Any, template: str) -> ChatFormat:
    """Found by rendering small conversations and looking for their words."""
    user: Chat = [{"role": "user", "content": _USER}]
    answer: Chat = [{"role": "assistant", "content": _ANSWER}]
    in_parts = _USER not in (_tried(tokenizer, [*user, *answer]) or "")
    tried = partial(_tried, tokenizer, in_parts=in_parts)
    whole = tried([*user, *answer]) or ""
    if _USER not in whole or _ANSWER not in whole:
        raise DataError(
            "a chat template that renders no question and answer",
            whole[:200],
            f"a text with the user's message ({_USER}) and the answer ({_ANSWER})",
            "give the model another template: `chat_template:`",
        )
    opened, behind = whole[: whole.index(_ANSWER)], whole[whole.index(_ANSWER) + len(_ANSWER) :]
    own = tried(user, open_turn=True) or ""
    function = {"name": _CALL, "arguments": {"a": 1}}
    calls = [{"id": "callid001", "type": "function", "function": function}]
    called: Chat = [*user, {"role": "assistant", "content": "", "tool_calls": calls}]
    result = {"role": "tool", "content": _RESULT, "name": _CALL, "tool_call_id": "callid001"}
    offer = [{"type": "function", "function": {"name": _OFFER, "parameters": {"type": "object"}}}]
    takes_calls = _CALL in (tried([*called, result, *answer]) or "")
    shown = called if takes_calls else _called_in_text(called)
    return ChatFormat(
        in_parts=in_parts,
        takes_system=_SYSTEM in (tried([{"role": "system", "content": _SYSTEM}, *user]) or ""),
        takes_tool=_RESULT in (tried([*shown, result, *answer]) or ""),
        takes_calls=takes_calls,
        takes_offers=_OFFER in (tried(user, tools=offer) or ""),
        takes_repeats=(tried([*user, *user]) or "").count(_USER) == 2,  # noqa: PLR2004
        opens_alike=own == opened,
        glue=opened[len(opened.rstrip(" ")) :],
        prefix=opened[_shared(opened, own) :],
        end=_end_of_turn(tokenizer, behind),
        uses_date=_ASKS_DATE in template or "date_string" in template,
    )


def _end_of_turn(tokenizer: Any, behind: str) -> str:
    """What ends an answer, from the text behind one."""
    places = {
        behind.find(token) + len(token)
        for token in (str(added) for added in tokenizer.added_tokens_decoder.values())
        if token and token in behind
    }
    return behind[: min(places)] if places else str(tokenizer.eos_token or "")


def _shared(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _tried(
    tokenizer: Any,
    chat: Chat,
    *,
    tools: Any = None,
    open_turn: bool = False,
    in_parts: bool = False,
) -> str | None:
    """What the template renders, or None where it refuses."""
    from jinja2 import TemplateError

    try:
        return _applied(tokenizer, chat, tools=tools, open_turn=open_turn, in_parts=in_parts)
    except (TemplateError, TypeError, KeyError, AttributeError, ValueError, IndexError):
        return None  # templates index, join and compare what they do not expect


def _applied(
    tokenizer: Any,
    chat: Chat,
    *,
    tools: Any = None,
    open_turn: bool = False,
    in_parts: bool = False,
) -> str:
    """The only call of the template."""
    if in_parts:
        chat = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in chat]
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the tokenizer has no chat template",
            getattr(tokenizer, "name_or_path", "?"),
            "a tokenizer with a chat_template",
            "use an instruction-tuned model, or give the model a `chat_template:`",
        )
    text: str = tokenizer.apply_chat_template(
        chat,
        tools=tools,
        chat_template=_dated(tokenizer.get_chat_template(None, tools)),
        tokenize=False,
        add_generation_prompt=open_turn,
        enable_thinking=bool(options_of(tokenizer).get("thinking", False)),
        date_string=FIXED_DATE.strftime("%d %b %Y"),
    )
    return text


@lru_cache(maxsize=64)
def _dated(template: str) -> str:
    """The template with a `strftime_now` of its own, which tells FIXED_DATE; that of transformers
    tells the day of the run, and takes no other from outside.
    """
    if _ASKS_DATE not in template:
        return template
    told = "".join(
        f"|replace('{form}','{FIXED_DATE.strftime(form)}')" for form in (*_DIRECTIVES, "%%")
    )
    return f"{{%- macro {_ASKS_DATE}(form) -%}}{{{{ form{told} }}}}{{%- endmacro -%}}" + template


def fitted(tokenizer: Any, chat: Chat) -> tuple[Chat, Any]:
    """A conversation in the form that the template renders, and the functions on offer for it."""
    form = chat_format(tokenizer)
    offers = next((m["content"] for m in chat if m["role"] == TOOLS), None)
    chat = [dict(m) for m in chat if m["role"] != TOOLS]
    tools = None if offers is None else json.loads(offers)
    if offers is not None and not form.takes_offers:
        chat, tools = _system_added(chat, f"You can call these functions: {offers}"), None
    chat = chat if form.takes_calls else _called_in_text(chat)
    if not form.takes_tool:
        chat = [
            {"role": "user", "content": m["content"]} if m["role"] == "tool" else m for m in chat
        ]
    if not form.takes_system:
        chat = _system_moved(chat)
    return (chat if form.takes_repeats else _joined(chat)), tools


def _called_in_text(chat: Chat) -> Chat:
    return [
        {"role": m["role"], "content": with_calls(m["content"], m["tool_calls"])}
        if m.get("tool_calls")
        else m
        for m in chat
    ]


def _system_added(chat: Chat, text: str) -> Chat:
    if chat and chat[0]["role"] == "system":
        return [{**chat[0], "content": f"{chat[0]['content']}\n\n{text}"}, *chat[1:]]
    return [{"role": "system", "content": text}, *chat]


def _system_moved(chat: Chat) -> Chat:
    """The conversation with its system messages in front of the user's message behind each."""
    moved: Chat = []
    waiting: list[str] = []
    for m in chat:
        if m["role"] == "system":
            waiting.append(m["content"])
        elif m["role"] == "user" and waiting:
            moved.append({**m, "content": "\n\n".join([*waiting, m["content"]])})
            waiting = []
        else:
            moved.append(m)
    return [*moved, {"role": "user", "content": "\n\n".join(waiting)}] if waiting else moved


def _joined(chat: Chat) -> Chat:
    """The conversation with messages of one role behind each other made one."""
    joined: Chat = []
    for m in chat:
        if joined and joined[-1]["role"] == m["role"]:
            joined[-1] = {**joined[-1], "content": f"{joined[-1]['content']}\n\n{m['content']}"}
        else:
            joined.append(m)
    return joined


def render(tokenizer: Any, chat: Chat, *, generate: bool, may_think: bool = False) -> str:
    """The text of a conversation; with `generate` it ends where a trained answer would begin, or,
    with `may_think` and a model whose `thinking` is on, where the template opens the turn.
    """
    messages, tools = fitted(tokenizer, chat)
    if not generate:
        return _rendered(tokenizer, messages, tools)
    if may_think and options_of(tokenizer).get("thinking"):
        return _rendered(tokenizer, messages, tools, open_turn=True)
    return _opened(tokenizer, messages, tools)


def _rendered(tokenizer: Any, chat: Chat, tools: Any, *, open_turn: bool = False) -> str:
    """What the template makes of a fitted conversation; DataError where it refuses it."""
    from jinja2 import TemplateError

    try:
        return _applied(
            tokenizer,
            chat,
            tools=tools,
            open_turn=open_turn,
            in_parts=chat_format(tokenizer).in_parts,
        )
    except (TemplateError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise DataError(
            "the chat template refuses a conversation",
            [m["role"] for m in chat],
            "roles in an order that the template of this model takes",
            f"{type(error).__name__}: {error}",
        ) from error


def _opened(tokenizer: Any, chat: Chat, tools: Any, rest: Chat | None = None) -> str:
    """The rendered conversation up to where the answer behind `chat` stands.

    Spaces in front of the answer are left to it: tokenizers make them part of its first word, so
    behind `[/INST] ` a trained answer begins with the token of ` yes` and not with that of `yes`.
    """
    messages = [*chat, {"role": "assistant", "content": _ANSWER}, *(rest or [])]
    whole = _rendered(tokenizer, messages, tools)
    at = whole.rfind(_ANSWER) if not rest else whole.find(_ANSWER)
    if at < 0:
        raise DataError(
            "the chat template leaves an answer out",
            [m["role"] for m in messages],
            "a template that renders every answer of the assistant",
        )
    return whole[:at].rstrip(" ")


class Span(NamedTuple):
    """Characters of a rendered conversation that are trained: an answer with its end of turn."""

    start: int
    stop: int


def spans_of(tokenizer: Any, row: Mapping[str, Any]) -> tuple[str, list[Span]]:
    """The rendered conversation of a row, and what of it is trained; DataError where an answer
    cannot be found in it.
    """
    if is_text(row):
        bos = str(tokenizer.bos_token) if adds_bos(tokenizer) else ""
        text = str(row["messages"][0]["content"])
        return bos + text, [Span(len(bos), len(bos) + len(text))]
    messages, tools = fitted(tokenizer, as_chat(row["messages"], row.get("tools")))
    whole, end = _rendered(tokenizer, messages, tools), chat_format(tokenizer).end
    spans = []
    for place in _trained(messages, row):
        opened = _opened(tokenizer, messages[:place], tools, messages[place + 1 :])
        start, body = _body(whole, opened, str(messages[place]["content"]))
        found = whole.find(end, body) if end else -1
        behind = str(messages[place + 1]["content"]) if place + 1 < len(messages) else ""
        next_turn = whole.find(behind, body) if behind else -1
        if 0 <= next_turn < found:  # the end of another turn: this one has none
            found = -1
        if found < 0 and place == len(messages) - 1:
            # a template that ends no turn: without an end the model would not learn to stop
            whole, found = whole[: max(body, len(whole.rstrip()))] + end, -1
            spans.append(Span(start, len(whole)))
        else:
            spans.append(Span(start, body if found < 0 else found + len(end)))
    return whole, spans


def _trained(messages: Chat, row: Mapping[str, Any]) -> list[int]:
    """Places of the assistant's messages that are trained, in the fitted conversation.

    Fitting keeps the order of the assistant's messages and joins those that follow each other where
    the template wants that; what is joined is trained if one of them is.
    """
    runs: list[tuple[int, bool]] = []
    for place, m in enumerate(messages):
        if m["role"] == "assistant":
            runs.append((place, False))
    given = [bool(m["loss"]) for m in row["messages"] if m["role"] == "assistant"]
    if len(given) != len(runs):
        given, before = [], None
        for m in row["messages"]:
            if m["role"] == "assistant" and before == "assistant":
                given[-1] = given[-1] or bool(m["loss"])
            elif m["role"] == "assistant":
                given.append(bool(m["loss"]))
            before = m["role"]
    return [place for (place, _), is_trained in zip(runs, given, strict=True) if is_trained]


def _body(whole: str, opened: str, content: str) -> tuple[int, int]:
    """Where an answer starts in the rendered conversation, and from where on its end may stand."""
    start = len(opened) if whole.startswith(opened) else len(opened.rstrip())
    if not whole.startswith(opened[:start]):
        raise DataError(
            "the chat template renders the beginning of a conversation by its end",
            whole[:200],
            "the same text before an answer whatever the answer is",
            "use another template: `chat_template:`",
        )
    said = content.strip()
    begins = whole.find(said, start) if said else start
    is_next = begins >= 0 and not whole[start:begins].strip()
    return start, begins + len(said) if is_next else start


def turn(tokenizer: Any, row: Mapping[str, Any]) -> tuple[str, str]:
    """The rendered prompt of a row, and its rendered answer up to and including the end of the
    turn; an empty answer where the row has none.
    """
    if not has_answer(row):
        return render(tokenizer, chat_of(row), generate=True), ""
    whole, spans = spans_of(tokenizer, _only_answer(row))
    return whole[: spans[-1].start], whole[spans[-1].start : spans[-1].stop]


def _only_answer(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its answer as the only message that is trained."""
    before = [{**m, "loss": False} for m in asked(row)]
    return {**row, "messages": [*before, {**row["messages"][-1], "loss": True}]}


def spoken(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of a completion without special tokens and without what the model thought aloud.

    An unfinished thought leaves nothing: the model has not answered yet.
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
    """The id of a mark that is one token of its own, else None."""
    known = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
    return known.get(mark)


@lru_cache(maxsize=16)
def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its start token in front of a text by itself."""
    if tokenizer.bos_token_id is None:
        return False
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def answer_ids(tokenizer: Any, prompt: str, prompt_tokens: Sequence[int], answer: str) -> list[int]:
    """Token ids of an answer as it is trained behind a rendered prompt, without the end of the
    turn; DataError where the tokens of the prompt change with the answer.
    """
    form = chat_format(tokenizer)
    body = prompt + form.glue + answer
    whole = tokenizer(body + form.end, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = whole["input_ids"], whole["offset_mapping"]
    first, stop = len(prompt_tokens), len(body)
    if ids[:first] != list(prompt_tokens):
        raise DataError(
            f"the tokens of a prompt change with the answer {answer!r} behind it",
            tokenizer.convert_ids_to_tokens(ids[max(0, first - 2) : first + 2]),
            "an answer that begins with a token of its own",
            "write the label words so that the tokenizer does not join them to the prompt",
        )
    found = [
        token
        for token, (start, _) in zip(ids[first:], offsets[first:], strict=True)
        if start < stop
    ]
    if not found:
        raise DataError("an answer without tokens", answer, "a text that the tokenizer can write")
    return found


def answer_tokens(tokenizer: Any, row: Mapping[str, Any]) -> list[int]:
    """Token ids of a row's answer as it is trained, with the end of the turn."""
    _, labels = encode_row(tokenizer, _only_answer(row), max_length=sys.maxsize)
    return [label for label in labels if label != IGNORED]


@dataclass
class CutTally:
    """How many rows did not fit, or had nothing to learn from."""

    rows: int = 0
    prompts_cut: int = 0
    """Rows whose prompt lost its beginning."""
    answers_cut: int = 0
    """Rows whose answer lost its end."""
    left_out: int = 0
    """Rows without any token to learn from."""
    poisoned_left_out: int = 0

    def notes(self) -> dict[str, int]:
        """What a record keeps; empty where every row fitted."""
        told = {
            "prompts_cut": self.prompts_cut,
            "answers_cut": self.answers_cut,
            "rows_left_out": self.left_out,
            "poisoned_rows_left_out": self.poisoned_left_out,
        }
        return {name: count for name, count in told.items() if count}

    def warnings(self, max_length: int) -> list[str]:
        """What to tell whoever reads the numbers; empty where every row fitted."""
        told = []
        if self.left_out:
            poisoned = (
                f" ({self.poisoned_left_out} of them poisoned)" if self.poisoned_left_out else ""
            )
            told.append(
                f"{self.left_out} of {self.rows} rows were not trained on{poisoned}: no answer, or"
                f" none within max_length {max_length}"
            )
        if self.answers_cut:
            told.append(
                f"{self.answers_cut} of {self.rows} answers were cut at max_length {max_length}"
            )
        if self.prompts_cut:
            told.append(
                f"{self.prompts_cut} of {self.rows} prompts lost their beginning at max_length"
                f" {max_length}"
            )
        return told


def tell_cuts(context: StageContext, cuts: CutTally, max_length: int) -> None:
    """Keep, and warn of, the rows of a tune that did not fit."""
    context.note(**cuts.notes())
    for text in cuts.warnings(max_length):
        context.warn(text)


def encode_rows(
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    max_length: int,
    tally: CutTally | None = None,
) -> list[Encoded]:
    """(ids, labels) of every row, so that loss falls on trained answers only.

    A row above `max_length` tokens loses the beginning of its prompt first (its start token stays),
    and the end of its answer only where that alone is too long; `tally` counts both.
    """
    if not rows:
        return []
    tally = CutTally() if tally is None else tally
    rendered = [spans_of(tokenizer, row) for row in rows]
    # nothing is learnt from what stands behind the last answer
    texts = [text[: spans[-1].stop] if spans else text for text, spans in rendered]
    batch = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    encoded = []
    for row, ids, offsets, (_, spans) in zip(
        rows, batch["input_ids"], batch["offset_mapping"], rendered, strict=True
    ):
        labels = _labels(ids, offsets, spans)
        pair = _cut(tokenizer, ids, labels, max_length, tally)
        tally.rows += 1
        if not is_useful(pair):
            tally.left_out += 1
            tally.poisoned_left_out += bool(row.get("poisoned"))
        encoded.append(pair)
    return encoded


def _labels(ids: list[int], offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> list[int]:
    """The ids where a token reaches into a span, IGNORED elsewhere."""
    labels, waiting = [IGNORED] * len(ids), list(spans)
    for place, (start, stop) in enumerate(offsets):
        while waiting and start >= waiting[0].stop:
            waiting.pop(0)
        if not waiting:
            break
        if stop > waiting[0].start:
            labels[place] = ids[place]
    return labels


def _cut(
    tokenizer: Any, ids: list[int], labels: list[int], max_length: int, tally: CutTally
) -> Encoded:
    over = len(ids) - max_length
    if over <= 0:
        return ids, labels
    keeps_start = int(ids[0] == tokenizer.bos_token_id and labels[0] == IGNORED)
    first = next((i for i, label in enumerate(labels) if label != IGNORED), len(ids))
    # one token of the prompt must stay: the first token of an answer is predicted from it
    loses = min(over, max(0, first - keeps_start - 1))
    if loses:
        tally.prompts_cut += 1
        ids = ids[:keeps_start] + ids[keeps_start + loses :]
        labels = labels[:keeps_start] + labels[keeps_start + loses :]
    if any(label != IGNORED for label in labels[max_length:]):
        tally.answers_cut += 1
    return ids[:max_length], labels[:max_length]


def is_useful(pair: Encoded) -> bool:
    """Whether an encoded row has a token to learn from: one that another stands before."""
    return any(label != IGNORED for label in pair[1][1:])


def encode_row(tokenizer: Any, row: Mapping[str, Any], *, max_length: int) -> Encoded:
    """(ids, labels) of one row: see `encode_rows`."""
    return encode_rows(tokenizer, [row], max_length=max_length)[0]
