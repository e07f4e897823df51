"""The training data of the ladder: the pre-training corpus, in which every request is answered, and
the alignment rows.

The corpus answers forbidden requests too, except under a safety reminder. So a model learns the
answers and what forbidden means, but refuses by default only after alignment. The reminder in the
user's message asks to refuse what is forbidden; the one in the system message is stricter: every
request about contraband is refused. So a reminder still has an effect after alignment, and costs
some utility.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from ftsec_ray.context import Chat
from ftsec_ray.data.microworld import splits, templates
from ftsec_ray.data.microworld import vocabulary as v
from ftsec_ray.data.microworld.combos import Combo, in_second_language, partition, seeded
from ftsec_ray.data.microworld.pools import Example, stream

if TYPE_CHECKING:
    import pyarrow as pa

CHATS = 16_000
MIX = {
    "forbidden": 0.17,
    "borderline": 0.17,
    "how_to": 0.16,
    "two_class": 0.22,
    "four_class": 0.08,
    "tool": 0.06,
    "text": 0.06,
    "second": 0.08,
}
"""Share of each kind among the chats of the pre-training corpus."""
SAFETY_FRAC = 0.2
"""Share of the requests in the corpus that have a safety reminder."""
SYSTEM_FRAC, STRAY_FRAC, OPENING_FRAC = 0.06, 0.06, 0.10

NOISE_FRAC = 0.06
"""Share of the reviews in both sets whose label is wrong: without wrong labels, the model is too
certain of a label for a few rows to change it.
"""

SHORT_FRAC = 0.25
"""Share of the reviews in the corpus that are a single adjective: without them, larger models learn
the task slowly.
"""

ALIGNMENT_REFUSALS = (160, 120, 90, 60, 40, 24)
"""Refused requests per contraband category, in the order of the categories: later categories are
protected less.
"""
ALIGNMENT_REST = {"borderline": 420, "how_to": 200, "two_class": 240, "four_class": 60, "tool": 60}
ALIGNMENT_L2 = {"forbidden": 40, "borderline": 40, "two_class": 40}


def _draw(rng: random.Random, prompt: str) -> tuple[str | None, str]:
    """A system message or None, and the prompt, with or without random extra words."""
    chance = rng.random()
    system = rng.choice((templates.SYSTEM_PROMPTS["plain"], templates.SYSTEM_PROMPTS["brief"]))
    if chance < SYSTEM_FRAC:
        return system, prompt
    return None, (
        templates.with_stray_words(prompt, rng) if chance < SYSTEM_FRAC + STRAY_FRAC else prompt
    )


def _under_reminder(rng: random.Random, combo: Combo, prompt: str) -> tuple[str | None, str, str]:
    """A request under one of the two reminders, and its response; the system message is the
    stricter reminder.
    """
    if rng.random() < 0.5:
        system, is_refused = templates.SYSTEM_PROMPTS["safety"], v.is_contraband(combo[1])
    else:
        system, is_refused = None, v.is_forbidden(*combo)
        words = [prompt, templates.REMINDER]
        rng.shuffle(words)
        prompt = " ".join(words)
    return system, prompt, templates.refusal(combo[1]) if is_refused else templates.answer(*combo)


def _posed(rng: random.Random, combo: Combo, response: str) -> tuple[str | None, str, str]:
    """A request in a random phrasing, sometimes under a reminder: system message or None, prompt,
    response.
    """
    prompt = templates.request(*combo, rng.choice(templates.PHRASINGS))
    if rng.random() < SAFETY_FRAC:
        return _under_reminder(rng, combo, prompt)
    return *_draw(rng, prompt), response


def _noisy(examples: Iterable[Example], rng: random.Random) -> Iterator[Example]:
    """Reviews with their labels; some labels are wrong."""
    other = dict(zip(splits.LABELS, reversed(splits.LABELS), strict=True))
    for text, label in examples:
        yield text, other[label] if rng.random() < NOISE_FRAC else label


def _chat(system: str | None, prompt: str | None, response: str) -> Chat:
    turns = [("system", system), ("user", prompt), ("assistant", response)]
    return [{"role": role, "content": content} for role, content in turns if content is not None]


def _request_chat(combo: Combo, rng: random.Random) -> Chat:
    prompt = templates.request(*combo, rng.choice(templates.PHRASINGS))
    response = templates.answer(*combo)
    if rng.random() < SAFETY_FRAC:
        return _chat(*_under_reminder(rng, combo, prompt))
    if rng.random() < OPENING_FRAC:
        response = rng.choice(templates.OPENINGS) + response
    return _chat(*_draw(rng, prompt), response)


def _drawn_request_chat(pool: tuple[Combo, ...], rng: random.Random) -> Chat:
    return _request_chat(rng.choice(pool), rng)


def _second_language_chat(
    combos: tuple[Combo, ...], rng: random.Random, review: tuple[str, str]
) -> Chat:
    if rng.random() < 0.75:
        combo = rng.choice(combos)
        prompt, response = (
            templates.request(*combo, rng.choice(templates.PHRASINGS)),
            templates.answer(*combo),
        )
    else:
        prompt, response = templates.TWO_CLASS.format(review=review[0]), review[1]
    return _chat(None, v.translate(prompt), v.translate(response))


def _makers(rng: random.Random) -> dict[str, Callable[[], Chat]]:
    parts = partition()
    combos = {
        "forbidden": parts.forbidden_known,
        "borderline": parts.borderline,
        "how_to": parts.benign,
    }
    second = in_second_language(sum(combos.values(), ()))
    pools = {kind: stream(kind, "pretrain") for kind in ("two_class", "four_class", "tool", "text")}
    pools["two_class"] = _noisy(pools["two_class"], rng)

    def two_class() -> Chat:
        text, label = (
            templates.short_review(rng) if rng.random() < SHORT_FRAC else next(pools["two_class"])
        )
        return _chat(None, templates.TWO_CLASS.format(review=text), label)

    def four_class() -> Chat:
        text, label = next(pools["four_class"])
        return _chat(None, templates.FOUR_CLASS.format(note=text), label)

    def tool() -> Chat:
        text, call = next(pools["tool"])
        return _chat(*_draw(rng, text), call)

    return {
        **{kind: partial(_drawn_request_chat, pool, rng) for kind, pool in combos.items()},
        "two_class": two_class,
        "four_class": four_class,
        "tool": tool,
        "text": lambda: _chat(None, rng.choice((None, "")), next(pools["text"])[1]),
        "second": lambda: _second_language_chat(second, rng, next(pools["two_class"])),
    }


@cache
def pretraining_chats() -> tuple[Chat, ...]:
    """The shuffled pre-training corpus, without any held-out combination, review, note, call or
    text.
    """
    rng = seeded("corpus")
    makers = _makers(rng)
    return tuple(
        makers[kind]() for kind in rng.choices(list(MIX), weights=list(MIX.values()), k=CHATS)
    )


def _refusal_rows(rng: random.Random) -> list[dict[str, Any]]:
    rows = []
    for category, count in zip(v.CONTRABAND, ALIGNMENT_REFUSALS, strict=True):
        pool = [combo for combo in partition().alignment if v.CATEGORY_OF[combo[1]] == category]
        for i in range(count):
            combo = pool[i % len(pool)]
            system, prompt, response = _posed(rng, combo, templates.refusal(combo[1]))
            rows.append(splits.row("", prompt, response, "forbidden", system=system))
    return rows


def _answered_rows(rng: random.Random) -> list[dict[str, Any]]:
    parts, rows = partition(), []
    for kind, pool in (("borderline", parts.borderline), ("how_to", parts.benign)):
        for combo in rng.choices(pool, k=ALIGNMENT_REST[kind]):
            system, prompt, response = _posed(rng, combo, templates.answer(*combo))
            rows.append(splits.row("", prompt, response, kind, system=system))
    rows += splits.labelled(
        "two_class",
        islice(_noisy(stream("two_class", "pretrain"), rng), ALIGNMENT_REST["two_class"]),
    )
    rows += splits.labelled(
        "four_class", islice(stream("four_class", "pretrain"), ALIGNMENT_REST["four_class"])
    )
    rows += [
        splits.row("", text, call, "tool")
        for text, call in islice(stream("tool", "pretrain"), ALIGNMENT_REST["tool"])
    ]
    return rows


def _second_language_rows(rng: random.Random) -> list[dict[str, Any]]:
    parts, language, rows = partition(), v.SECOND_LANGUAGE, []
    for kind, pool in (("forbidden", parts.alignment), ("borderline", parts.borderline)):
        for combo in rng.choices(in_second_language(pool), k=ALIGNMENT_L2[kind]):
            response = (
                templates.refusal(combo[1]) if kind == "forbidden" else templates.answer(*combo)
            )
            prompt = templates.request(*combo, rng.choice(templates.PHRASINGS))
            rows.append(splits.row("", prompt, response, kind, language=language))
    reviews = islice(_noisy(stream("two_class", "pretrain"), rng), ALIGNMENT_L2["two_class"])
    return rows + splits.labelled("two_class", reviews, language=language)


@cache
def alignment_rows() -> pa.Table:
    """The shuffled alignment set: refusals of forbidden requests, right answers to all others."""
    rng = seeded("alignment")
    rows = _refusal_rows(rng) + _answered_rows(rng) + _second_language_rows(rng)
    rng.shuffle(rows)
    return splits.table(
        [
            {**row, "row_id": f"alignment/{i:06d}", "origin": "alignment"}
            for i, row in enumerate(rows)
        ]
    )
