"""A table in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ftsec_ray.shown_text import for_markdown


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], legend: str) -> str:
    """Texts under their titles, escaped, and the legend below."""
    lines = [f"| {' | '.join(map(for_markdown, values))} |" for values in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:], "", legend])
