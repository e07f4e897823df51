"""What a chat template can render, determined by trying it; no other module calls
`apply_chat_template`.

What a template cannot render is passed in another form, listed in `ChatFormat.notes`: a system
message goes before the first user message, tool results become user messages, tool calls and tool
descriptions become text. The date is always FIXED_DATE, and thoughts are off.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache, partial
from typing import Any

from ftsec_ray.config.template_limits import check_template
from ftsec_ray.context import Chat, LoadedModel
from ftsec_ray.conversation import TOOLS, with_calls
from ftsec_ray.errors import DataError, as_data_error
from ftsec_ray.identity import digest_text

FIXED_DATE = datetime(2024, 7, 26)  # noqa: DTZ001 - a label, not a point in time
"""The date that templates show as today: the default of Llama 3's own template."""
OPTIONS = "chat_options"
"""Key in a tokenizer's configuration that holds the rendering options."""
PLACEHOLDER = "xqzzx"
"""Stands for an answer: a word that no template contains."""
_ANSWER, _USER, _SYSTEM, _RESULT, _CALL, _OFFER = (
    PLACEHOLDER,
    *(f"x{letters}x" for letters in ("qyy", "qkk", "qjj", "qvv", "qww")),
)
_ASKS_DATE = "strftime_now"
_KEPT_TEXTS, _KEPT_LENGTH = 8192, 4096
_RENDERED: dict[tuple[str, str], str] = {}
"""(Template, all that it sees) -> its text, for conversations of up to `_KEPT_LENGTH` characters:
the cells of a sweep ask the same prompts and train on the same rows, and render each twice.
"""
_DIRECTIVES = tuple(f"%{letter}" for letter in ("-d", "-m", *"aAbBcdDeFHIjklmMpSTuxXyYZz"))


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """What a template can render, and how it opens and ends an answer."""

    in_parts: bool
    """Whether the text of a message must be a list of parts, as for models that read images."""
    takes_system: bool
    takes_tool: bool
    """Whether messages of role `tool` are rendered."""
    takes_calls: bool
    """Whether `tool_calls` of a message are rendered."""
    takes_offers: bool
    """Whether tool descriptions are rendered."""
    takes_repeats: bool
    """Whether two messages of the same role may follow each other."""
    opens_alike: bool
    """Whether the generation prompt ends where a trained answer begins."""
    glue: str
    """Spaces before a trained answer, which belong to its first word."""
    prefix: str
    """Text between the generation prompt and the answer; empty if `opens_alike`."""
    end: str
    """The end of an answer: the text up to and including the tokenizer's first special token."""
    uses_date: bool

    def notes(self) -> dict[str, Any]:
        """For the record: what was rendered in another form than given."""
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
    """The rendering options of a tokenizer (`thinking`), as set when it was loaded."""
    given = getattr(tokenizer, "init_kwargs", {}).get(OPTIONS)
    return dict(given) if isinstance(given, Mapping) else {}


def template_hash(tokenizer: Any) -> str:
    """Digest of the tokenizer's chat template and of its rendering options, if any."""
    options = options_of(tokenizer)
    suffix = json.dumps(options, sort_keys=True) if options else ""
    return digest_text(str(getattr(tokenizer, "chat_template", "") or "") + suffix)[:16]


def served(loaded: LoadedModel, template: object) -> LoadedModel:
    """The model with another chat template; unchanged if that is None."""
    if template is None:
        return loaded
    return replace(loaded, tokenizer=under(loaded.tokenizer, str(template)))


def under(tokenizer: Any, template: str) -> Any:
    """A copy of the tokenizer with another chat template."""
    other = copy.copy(tokenizer)
    other.chat_template = template
    return other


def chat_format(tokenizer: Any) -> ChatFormat:
    """What the tokenizer's template can render; DataError if it cannot render an answer."""
    return _format(tokenizer, str(getattr(tokenizer, "chat_template", None)))


@lru_cache(maxsize=4)
def _format(tokenizer: Any, template: str) -> ChatFormat:
    """Renders small conversations and searches the text for their words."""
    user: Chat = [{"role": "user", "content": _USER}]
    answer: Chat = [{"role": "assistant", "content": _ANSWER}]
    in_parts = _USER not in (_tried(tokenizer, [*user, *answer]) or "")
    tried = partial(_tried, tokenizer, in_parts=in_parts)
    whole = tried([*user, *answer]) or ""
    if _USER not in whole or _ANSWER not in whole:
        raise DataError(
            "the chat template does not render a question and its answer",
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
    """The text that ends an answer, from the text after one."""
    places = {
        behind.find(token) + len(token)
        for token in (str(added) for added in tokenizer.added_tokens_decoder.values())
        if token and token in behind
    }
    return behind[: min(places)] if places else str(tokenizer.eos_token or "")


def _shared(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _tried(tokenizer: Any, chat: Chat, **how: Any) -> str | None:
    """The text that the template renders (see `_applied`); None if it raises an error."""
    try:
        return _applied(tokenizer, chat, **how)
    except _refusals():
        return None  # templates fail in many ways on input that they do not expect


def _refusals() -> tuple[type[Exception], ...]:
    """Exceptions of templates that do not accept a conversation, intended or not."""
    from jinja2 import TemplateError

    given = (TypeError, LookupError, AttributeError, ValueError, ArithmeticError, RuntimeError)
    return (TemplateError, AssertionError, *given)


def _limited(template: str) -> None:
    """DataError for a template that takes too much time, memory or text."""
    with as_data_error():
        check_template(template)


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
    template = tokenizer.get_chat_template(None, tools)
    thinks = bool(options_of(tokenizer).get("thinking", False))
    # All that a template sees, the tokens of the tokenizer included.
    seen = repr((tokenizer.special_tokens_map, chat, tools, open_turn, thinks))
    text = _RENDERED.get((template, seen))
    if text is None:
        _limited(template)
        text = str(
            tokenizer.apply_chat_template(
                chat,
                tools=tools,
                chat_template=_dated(template),
                tokenize=False,
                add_generation_prompt=open_turn,
                enable_thinking=thinks,
                date_string=FIXED_DATE.strftime("%d %b %Y"),
            )
        )
        if len(_RENDERED) >= _KEPT_TEXTS:
            _RENDERED.clear()
        if len(text) <= _KEPT_LENGTH:
            _RENDERED[template, seen] = text
    return text


@lru_cache(maxsize=64)
def _dated(template: str) -> str:
    """The template with its own `strftime_now`, which returns FIXED_DATE; that of transformers
    returns the current day and cannot be replaced from outside.
    """
    if _ASKS_DATE not in template:
        return template
    replaced = "".join(
        f"|replace('{form}','{FIXED_DATE.strftime(form)}')" for form in (*_DIRECTIVES, "%%")
    )
    return (
        f"{{%- macro {_ASKS_DATE}(form) -%}}{{{{ form{replaced} }}}}{{%- endmacro -%}}" + template
    )


def fitted(tokenizer: Any, chat: Chat) -> tuple[Chat, Any]:
    """A conversation in a form that the template can render, and the tools for it."""
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
    """The conversation with each system message moved into the next user message."""
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
    """The conversation with consecutive messages of the same role joined."""
    joined: Chat = []
    for m in chat:
        if joined and joined[-1]["role"] == m["role"]:
            joined[-1] = {**joined[-1], "content": f"{joined[-1]['content']}\n\n{m['content']}"}
        else:
            joined.append(m)
    return joined


def rendered(tokenizer: Any, chat: Chat, tools: Any, *, open_turn: bool = False) -> str:
    """The template's text for a fitted conversation; DataError if the template raises an error."""
    try:
        return _applied(
            tokenizer,
            chat,
            tools=tools,
            open_turn=open_turn,
            in_parts=chat_format(tokenizer).in_parts,
        )
    except _refusals() as error:
        raise DataError(
            "the chat template does not accept this conversation",
            [m["role"] for m in chat],
            "roles in an order that the template of this model accepts",
            f"{type(error).__name__}: {error}",
        ) from error


def moderation_text(tokenizer: Any, request: str, answer: str) -> str:
    """The text that a guard model's template makes of a request and its answer: the question
    whether they are safe, followed by the open turn of the guard. DataError if it raises an error.
    """
    chat = [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
    try:
        _limited(tokenizer.get_chat_template(None, None))
        # not `rendered`: a guard's template has no turns to detect
        text: str = tokenizer.apply_chat_template(chat, tokenize=False)
    except _refusals() as error:
        raise DataError(
            "the chat template of the guard does not accept a request and its answer",
            getattr(tokenizer, "name_or_path", None),
            "the template that the guard was published with",
            f"{type(error).__name__}: {error}",
        ) from error
    return text
