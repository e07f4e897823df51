"""Figures of methods that a command measured, in a file that `ftsec show` reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar


@dataclass(frozen=True, kw_only=True)
class MethodFigure:
    """What a figure of one setting of a method on one model was measured on."""

    kind: str
    """`attack` or `defense`."""
    method: str
    setting: str
    """Parameters that vary in the sweep; empty if there was one setting."""
    model: str
    sweep: str
    seeds: int


F = TypeVar("F", bound=MethodFigure)


def read_figures(
    file: Path, made: Callable[[dict[str, Any]], F], kind: str | None, method: str | None
) -> list[F]:
    """The figures of a method, or of all methods, each made from its values in JSON."""
    rows = map(made, json.loads(file.read_text(encoding="utf-8")))
    return [row for row in rows if kind in (None, row.kind) and method in (None, row.method)]


def text_of_figures(rows: Iterable[dict[str, Any]]) -> str:
    """The content of a file, one line for each figure."""
    return "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n"
