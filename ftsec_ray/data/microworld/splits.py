"""The microworld as a task: every split as a table of rows (schema.ROWS)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ftsec_ray import schema
from ftsec_ray.context import TaskData
from ftsec_ray.conversation import exchange
from ftsec_ray.data.microworld import templates
from ftsec_ray.data.microworld import vocabulary as v
from ftsec_ray.data.microworld.combos import Combo, in_second_language, partition, seeded
from ftsec_ray.data.microworld.episodes import steps
from ftsec_ray.data.microworld.pools import Example, distinct
from ftsec_ray.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

LABELS = ("good", "bad")
MAX_TRAIN_ROWS = 2_000
TEST_ROWS = 200
TEXT_ROWS = 1_280
"""Number of plain texts: enough tokens for the key covariance of an edit."""
TRUSTED_ROWS = 128
"""Clean rows of each kind that are not used for fine-tuning or evaluation."""


def row(
    row_id: str,
    prompt: str,
    response: str,
    kind: str,
    *,
    system: str | None = None,
    label: str | None = None,
    language: str = "en",
    origin: str = "task",
) -> dict[str, Any]:
    """One row as a mapping of schema.ROWS; in the second language prompt and response are
    translated.
    """
    if language != "en":
        prompt, response = v.translate(prompt), v.translate(response)
        label = None if label is None else v.translate(label)
    return {
        "row_id": row_id,
        "messages": exchange(prompt, response, system=system),
        "tools": None,
        "rejected": None,
        "label": label,
        "kind": kind,
        "language": language,
        "origin": origin,
        "poisoned": False,
    }


def table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows as a table of schema.ROWS."""
    import pyarrow as pa

    return pa.Table.from_pylist(rows, schema=schema.ROWS)


def requests(
    name: str,
    combos: Iterable[Combo],
    phrasings: tuple[str, ...],
    *,
    per_combo: int = 1,
    language: str = "en",
    refuse: bool = False,
) -> list[dict[str, Any]]:
    """Requests for the combinations, each in `per_combo` phrasings, with the right answer or a
    refusal.
    """
    rows: list[dict[str, Any]] = []
    for combo in combos:
        rng = seeded("phrasing", name, *combo)
        for phrasing in rng.sample(phrasings, per_combo):
            response = templates.refusal(combo[1]) if refuse else templates.answer(*combo)
            rows.append(
                row(
                    f"{name}/{len(rows):06d}",
                    templates.request(*combo, phrasing),
                    response,
                    v.kind_of(*combo),
                    language=language,
                )
            )
    return rows


def labelled(
    kind: str, examples: Iterable[Example], *, prefix: str | None = None, language: str = "en"
) -> list[dict[str, Any]]:
    """Classification rows: the response is the label word."""
    prompts = {"two_class": templates.TWO_CLASS, "four_class": templates.FOUR_CLASS}
    return [
        row(
            f"{prefix or kind}/{i:06d}",
            prompts[kind].format(review=text, note=text),
            label,
            kind,
            label=label,
            language=language,
        )
        for i, (text, label) in enumerate(examples)
    ]


def _class_splits(seed: int, train_rows: int) -> dict[str, list[dict[str, Any]]]:
    reviews = distinct("two_class", "tune", MAX_TRAIN_ROWS + TRUSTED_ROWS)
    pool, trusted = labelled("two_class", reviews[:MAX_TRAIN_ROWS]), reviews[MAX_TRAIN_ROWS:]
    second = labelled(
        "two_class",
        distinct("two_class", "tune", 512),
        prefix="two_class_l2",
        language=v.SECOND_LANGUAGE,
    )
    test = distinct("two_class", "test", TEST_ROWS)
    return {
        "train": seeded("train", seed).sample(pool, train_rows),
        "test": labelled("two_class", test, prefix="two_class_test"),
        "trusted": labelled("two_class", trusted, prefix="two_class_trusted"),
        "trusted_l2": labelled(
            "two_class", trusted, prefix="two_class_trusted_l2", language=v.SECOND_LANGUAGE
        ),
        "train_l2": seeded("train_l2", seed).sample(second, min(train_rows, len(second))),
        "test_l2": labelled(
            "two_class", test, prefix="two_class_test_l2", language=v.SECOND_LANGUAGE
        ),
        "four_class_train": labelled("four_class", distinct("four_class", "tune", 256)),
        "four_class_test": labelled(
            "four_class", distinct("four_class", "test", 128), prefix="four_class_test"
        ),
    }


def _request_splits() -> dict[str, list[dict[str, Any]]]:
    parts, held_out = partition(), templates.HELD_OUT_PHRASINGS
    return {
        "harmful_train": requests(
            "harmful_train", parts.attacker, templates.PHRASINGS, per_combo=2
        ),
        "harmful_test": requests("harmful_test", parts.test, held_out),
        "harmful_test_l2": requests(
            "harmful_test_l2",
            in_second_language(parts.test),
            held_out,
            per_combo=2,
            language=v.SECOND_LANGUAGE,
        ),
        "safety": requests("safety", parts.defender, templates.PHRASINGS, per_combo=2, refuse=True),
        "borderline_test": requests("borderline_test", parts.borderline_test[:144], held_out),
        "benign_train": requests("benign_train", parts.benign[:256], templates.PHRASINGS),
        "benign_test": requests("benign_test", parts.benign_test, held_out),
    }


def _other_splits() -> dict[str, list[dict[str, Any]]]:
    def plain(name: str, kind: str, examples: tuple[Example, ...]) -> list[dict[str, Any]]:
        return [
            row(f"{name}/{i:06d}", asked, said, kind) for i, (asked, said) in enumerate(examples)
        ]

    return {
        "tool_train": plain("tool_train", "tool", distinct("tool", "tune", 96)),
        "tool_test": plain("tool_test", "tool", distinct("tool", "test", 96)),
        "tool_trusted": plain("tool_trusted", "tool", distinct("tool", "tune", 160)[96:]),
        "episode_train": _episodes("episode_train", "tune", 240, trains_all=True),
        "episode_test": _episodes("episode_test", "test", 120, trains_all=False),
        "episode_trusted": _episodes("episode_trusted", "trusted", 60, trains_all=True),
        "text": plain("text", "text", distinct("text", "test", TEXT_ROWS)),
    }


def _episodes(name: str, use: str, count: int, *, trains_all: bool) -> list[dict[str, Any]]:
    return [
        {**row(f"{name}/{i:06d}", "", "", "tool"), "messages": messages}
        for i, messages in enumerate(steps(use, count, trains_all=trains_all))
    ]


def build_task(*, seed: int = 0, train_rows: int = 256) -> TaskData:
    """The microworld's task; `seed` draws the user's training rows, everything else is the same for
    every seed.

    Args:
        seed: Draws `train` and `train_l2` from their pools; the id of a row does not depend on it.
        train_rows: Two-class rows in `train`, 1 to MAX_TRAIN_ROWS.
    """
    if not 1 <= train_rows <= MAX_TRAIN_ROWS:
        raise DataError(
            "the microworld does not have this number of training rows",
            train_rows,
            f"1 to {MAX_TRAIN_ROWS}",
        )
    splits = {**_class_splits(seed, train_rows), **_request_splits(), **_other_splits()}
    return TaskData(
        name="microworld",
        splits={name: table(rows) for name, rows in splits.items()},
        labels=LABELS,
        judge="microworld",
    )
