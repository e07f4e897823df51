"""Completions as text: where answer lengths end in them, and what the model itself wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ftsec_ray.context import Chat

if TYPE_CHECKING:
    from ftsec_ray.models.generator import Generator

Ends = tuple[tuple[int, int], ...]
"""(tokens, characters) of an answer."""


class Said(NamedTuple):
    """A completion, and where the asked answer lengths end in it."""

    text: str
    ends: Ends
    own: str
    """The text without the opening that an attack placed before it."""


def said_by(
    generator: Generator, chats: Sequence[Chat], lengths: Sequence[int], given: Mapping[str, Any]
) -> list[Said]:
    """The completion of every chat, and where these lengths end in it."""
    from ftsec_ray.models.chat import spoken

    if not lengths and generator.opening is None:
        return [Said(text, (), text) for text in generator.complete(chats, **given)]
    tokenizer, completed = generator.loaded.tokenizer, []
    answers = generator.complete_ids(chats, **given)
    for ids, opening in zip(answers, generator.openings(chats), strict=True):
        text = spoken(tokenizer, ids)
        ends = tuple((n, _end_of(spoken(tokenizer, ids[:n]), text)) for n in lengths)
        is_begun = bool(opening) and ids[: len(opening)] == opening  # a gate's answer is not
        own = spoken(tokenizer, ids[len(opening) :]) if is_begun else text
        completed.append(Said(text, ends, own))
    return completed


def _end_of(start: str, text: str) -> int:
    """Number of characters that a text shares with the text of its first tokens `start`: without an
    incomplete character, and without trailing space that `spoken` removed.
    """
    pairs = enumerate(zip(start, text, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(start), len(text)))
