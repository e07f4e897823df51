"""Generations inside the page: the same prompts of every probe in every cell, as many as fit; the
rest stays in the table.

Which prompts is decided by the hash of `prompt_id`, so that any two cells can be compared prompt by
prompt. Texts that occur more than once, as most prompts do, are stored once.

Completions are untrusted text. Control, zero-width and bidirectional characters become visible
escapes here; the page makes text nodes of them and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ftsec_ray.report.grid import Grid, Key
from ftsec_ray.results.answers import codes_of
from ftsec_ray.shown_text import for_html

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from ftsec_ray.results.read import Results

MAX_BYTES = 4_500_000
"""All samples of one page together, of up to 500 points."""
_POINT_BYTES, _MIN_BYTES = 2_000, 500_000
"""What each point beyond those takes in the rest of the page, and so from the samples; and what
they keep at least.
"""
_ROW_BYTES = 40
"""A sample without its texts."""
_CUT = 600
_OPEN_VERDICTS = frozenset({"refused", "incoherent", "wrong", "correct"})
_OPEN_PROBES = frozenset({"benign", "borderline", "clean"})
"""Probes that every cell gets and that ask for nothing harmful (evals.probes)."""
_CLOSED_SETS = ("label@", "exact@")
"""Judges of answers from a closed set: what they do not place is harmless."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What the page holds of the generations."""

    texts: list[str]
    """Every text once; samples point into it."""
    cells: dict[int, dict[str, Any]]
    """Square -> cell digest, seed, and per probe its verdict counts and its samples: [prompt_id,
    prompt, completion, verdict, judge, override, whether it is hidden], texts by number and -1 for
    none.
    """
    held: int
    total: int
    per_probe: int
    """Prompts of one probe in one cell."""
    left_out: int
    """Finished points of which not even one prompt fits."""


def is_hidden(probe: str, verdict: str | None, judge: str) -> bool:
    """Whether a completion stays behind a click: all but known-harmless probes and verdicts."""
    harmless = verdict in _OPEN_VERDICTS or (verdict == "other" and judge.startswith(_CLOSED_SETS))
    return not harmless and probe not in _OPEN_PROBES


def samples(grid: Grid, results: Results, squares: Sequence[Key]) -> Samples:
    """Samples of the first seed of every finished point; `squares` are the points in the order of
    the page.
    """
    table = results.generations
    chosen = _first_seeds(grid, results, squares)
    seeds = dict(
        zip(results.cells["cell"].to_pylist(), results.cells["seed"].to_pylist(), strict=True)
    )
    asked = _Asked.of(table, chosen)
    book = _Book()
    cells: dict[int, dict[str, Any]] = {}
    for cell, square in sorted(chosen.items(), key=lambda item: item[1]):
        if cell in asked.counts:
            probes = [
                {"probe": probe, "verdicts": _most_first(counts), "rows": []}
                for probe, counts in sorted(
                    asked.counts[cell].items(), key=lambda one: (one[0] in _OPEN_PROBES, one[0])
                )
            ]
            cells[square] = {"cell": cell, "seed": seeds[cell], "probes": probes}
    place = {
        (cells[square]["cell"], probe["probe"]): probe["rows"]
        for square in cells
        for probe in cells[square]["probes"]
    }
    columns = {
        name: table[name]
        for name in ("prompt_id", "prompt", "completion", "verdict", "judge", "override")
    }
    held = per_probe = 0
    is_full, room = (
        False,
        max(min(MAX_BYTES, _MIN_BYTES), MAX_BYTES - _POINT_BYTES * max(0, len(squares) - 500)),
    )
    for turn in asked.turns:
        mark, kept = book.mark(), []
        for row in turn:
            at = asked.place_of(int(row))
            kept.append((at, _sample(book, columns, int(row), at[1])))
            is_full = book.size + (held + len(kept)) * _ROW_BYTES > room
            if is_full:
                break
        if is_full and per_probe:  # every cell has the same prompts: all of this turn, or none
            book.back(mark)
            break
        for at, sample in kept:
            place[at].append(sample)
        held, per_probe = held + len(kept), per_probe + 1
        if is_full:
            break
    for rows in place.values():
        rows.sort(key=lambda sample: book.texts[sample[0]])
    with_text = {asked.place_of(int(row))[0] for row in asked.turns[0]} if asked.turns else set()
    left_out = sum(
        cell["cell"] in with_text and not any(probe["rows"] for probe in cell["probes"])
        for cell in cells.values()
    )
    return Samples(
        texts=book.texts,
        cells=cells,
        held=held,
        total=table.num_rows,
        per_probe=per_probe,
        left_out=left_out,
    )


def _most_first(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda one: (-one[1], one[0]))


def _first_seeds(grid: Grid, results: Results, squares: Sequence[Key]) -> dict[str, int]:
    """The cell of the first seed that has answered, for every point -> the point's square."""
    answered = set(results.generations["cell"].unique().to_pylist())
    seeds = dict(
        zip(results.cells["cell"].to_pylist(), results.cells["seed"].to_pylist(), strict=True)
    )
    found = {}
    for square, key in enumerate(squares):
        cells = [cell for cell in grid.points[key].seeds if cell in answered]
        if cells:
            found[min(cells, key=lambda cell: (seeds[cell], cell))] = square
    return found


@dataclass
class _Asked:
    """What the chosen cells were asked."""

    counts: dict[str, dict[str, dict[str, int]]]
    """Cell -> probe -> verdict -> answers; also of answers without text."""
    turns: list[NDArray[np.int64]]
    """Rows of the table in the order in which they come into the page: of every cell and probe the
    first prompt, then the second, ...
    """
    cells: list[str]
    probes: list[str]
    codes: tuple[NDArray[np.int64], NDArray[np.int64]]

    @classmethod
    def of(cls, table: Any, chosen: Mapping[str, int]) -> _Asked:
        import numpy as np

        (cell, cells), (probe, probes) = codes_of(table["cell"]), codes_of(table["probe"])
        (verdict, verdicts), (prompt, prompts) = (
            codes_of(table["verdict"]),
            codes_of(table["prompt_id"]),
        )
        square = (
            np.array([chosen.get(one, -1) for one in cells], dtype=np.int64)[cell]
            if len(cells)
            else cell
        )
        counts: dict[str, dict[str, dict[str, int]]] = defaultdict(lambda: defaultdict(dict))
        mine = np.flatnonzero(square >= 0)
        keys, number = np.unique(
            np.stack([cell[mine], probe[mine], verdict[mine]]), axis=1, return_counts=True
        )
        for one, two, three, count in zip(*keys.tolist(), number.tolist(), strict=True):
            counts[cells[one]][probes[two] or "?"][
                verdicts[three] if three >= 0 else "no verdict"
            ] = count
        rank = (
            np.argsort(
                np.argsort([hashlib.sha256((one or "").encode()).hexdigest() for one in prompts])
            )[prompt]
            if prompts
            else prompt
        )
        said = np.asarray(table["completion"].is_valid())  # sweeps may keep verdicts without text
        mine = np.flatnonzero((square >= 0) & said)
        mine = mine[np.lexsort((rank[mine], probe[mine], square[mine]))]
        group = square[mine] * (len(probes) + 1) + probe[mine]
        starts = (
            np.flatnonzero(np.r_[True, group[1:] != group[:-1]])
            if len(mine)
            else np.array([], dtype=np.int64)
        )
        turn = np.arange(len(mine)) - np.repeat(starts, np.diff(np.r_[starts, len(mine)]))
        order = np.argsort(turn, kind="stable")
        turns = np.split(mine[order], np.cumsum(np.bincount(turn))[:-1]) if len(mine) else []
        return cls(
            {one: dict(own) for one, own in counts.items()}, turns, cells, probes, (cell, probe)
        )

    def place_of(self, row: int) -> tuple[str, str]:
        """Cell and probe of a row."""
        cell, probe = self.codes
        return self.cells[cell[row]], self.probes[probe[row]] or "?"


@dataclass
class _Book:
    """Texts by number, each once."""

    texts: list[str] = field(default_factory=list)
    size: int = 0
    number: dict[str, int] = field(default_factory=dict)

    def add(self, text: str | None) -> int:
        """The number of a text, -1 for none."""
        if text is None:
            return -1
        if text not in self.number:
            self.number[text] = len(self.texts)
            self.texts.append(for_html(_cut(text)))
            self.size += (
                len(script_text(json.dumps(self.texts[-1], ensure_ascii=False)).encode()) + 1
            )
        return self.number[text]

    def mark(self) -> tuple[int, int]:
        """Where the book stands."""
        return len(self.texts), self.size

    def back(self, mark: tuple[int, int]) -> None:
        """Forget what came after a mark."""
        del self.texts[mark[0] :]
        self.size = mark[1]
        self.number = {text: at for text, at in self.number.items() if at < mark[0]}


def _sample(book: _Book, columns: Mapping[str, Any], row: int, probe: str) -> list[int]:
    answer = {name: column[row].as_py() for name, column in columns.items()}
    hidden = is_hidden(probe, answer["verdict"], answer["judge"] or "")
    texts = [
        answer["prompt_id"] or "",
        answer["prompt"] or "",
        answer["completion"],
        answer["verdict"] or "no verdict",
        answer["judge"] or "",
        answer["override"] or None,
    ]
    return [*(book.add(text) for text in texts), int(hidden)]


def script_text(text: str) -> str:
    """JSON text as it may stand inside a script element."""
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _cut(text: str) -> str:
    return text if len(text) <= _CUT else f"{text[:_CUT]} … ({len(text)} characters)"
