"""The forest plot as inline SVG: a line per comparison, with its interval, what can be said and
utility.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ftsec_ray.report.figures import cut, mark_at, text_at


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a forest plot."""

    tone: str
    """better, worse, incoherent or open."""
    title: str
    about: str
    effect: float
    low: float
    high: float
    detectable: float | None
    words: str
    beside: str
    """Utility of the same two points."""
    facets: tuple[int, int, int]
    """Numbers of its model, attack and defense on the page, for its filters."""


_TONES = {
    "better": (0, "#0072b2"),
    "worse": (1, "#c24a00"),
    "incoherent": (6, "#3b1204"),
    "open": (7, "#6b7785"),
}
"""Tone -> marker shape and colour: blue is good for the defender, as on the grid."""
_WIDTH, _LEFT, _RIGHT, _LINE, _TOP = 1300, 330, 680, 30, 26


def forest(lines: Sequence[Line], *, title: str, shown: int) -> Markup:
    """Differences with their intervals, one line each, words and utility beside it; a pale bar is
    what could not have been seen.

    Args:
        lines: In order; the page's filters bring forward those beyond the first `shown`.
        title: What a screen reader says.
        shown: How many are drawn at first.
    """
    bottom = _TOP + _LINE * min(shown, len(lines))

    def x_at(value: float) -> float:
        return _LEFT + (value + 1) / 2 * (_RIGHT - _LEFT)

    parts, feet = [], []
    for tick in (-1, -0.5, 0, 0.5, 1):
        kind = "zero" if tick == 0 else "grid"
        parts.append(
            Markup('<line class="{3} rule" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(
                x_at(tick), _TOP - 6, bottom + 4, kind
            )
        )
        feet.append(
            text_at(
                "tick", x_at(tick), 18, f"{tick:+g}".replace("-", "−") if tick else "0", "middle"
            )
        )
    feet.append(text_at("axis", x_at(0), 31, "difference in attack success", "middle"))
    parts += [
        text_at("axis", x_at(-0.6), 12, "← less, better", "middle"),
        text_at("axis", x_at(0.6), 12, "more, worse →", "middle"),
        Markup('<g class="foot" transform="translate(0 {})">{}</g>').format(
            bottom, Markup("").join(feet)
        ),
    ]
    parts += [_drawn(line, index, x_at, is_shown=index < shown) for index, line in enumerate(lines)]
    svg = Markup(
        '<svg class="forest" viewBox="0 0 {} {}" data-top="{}" data-line="{}" data-shown="{}"'
        ' role="img" aria-label="{}">{}</svg>'
    )
    return svg.format(_WIDTH, bottom + 34, _TOP, _LINE, shown, title, Markup("").join(parts))


def _drawn(line: Line, index: int, x_at: Callable[[float], float], *, is_shown: bool) -> Markup:
    y = _LINE / 2
    shape, colour = _TONES[line.tone]
    parts = []
    if line.tone == "open" and line.detectable is not None:
        parts.append(
            Markup(
                '<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="14" fill="#e7ebef"/>'
            ).format(x_at(-line.detectable), y - 7, x_at(line.detectable) - x_at(-line.detectable))
        )
    parts += [
        Markup(
            '<line x1="{0:.1f}" x2="{1:.1f}" y1="{2:.1f}" y2="{2:.1f}" stroke="{3}"'
            ' stroke-width="1.8"/>'
        ).format(x_at(line.low), x_at(line.high), y, colour),
        mark_at(shape, colour, x_at(line.effect), y),
    ]
    right, number = (
        _RIGHT + 14,
        f"{line.effect:.2f} [{line.low:.2f}, {line.high:.2f}]".replace("-0.00", "0.00").replace(
            "-", "−"
        ),
    )
    for x, up, down in (
        (4, cut(line.title, 48), cut(line.about, 56)),
        (right, f"{number} {line.words}", line.beside),
    ):
        parts.append(Markup('<text class="name" x="{}" y="{:.1f}">{}</text>').format(x, y - 2, up))
        parts.append(
            Markup('<text class="tick" x="{}" y="{:.1f}">{}</text>').format(x, y + 10, down)
        )
    parts.append(
        Markup("<title>{}, {}: {}; {}</title>").format(
            line.title, line.about, line.words, line.beside
        )
    )
    model, attack, defense = line.facets
    group = Markup(
        '<g class="line{}" data-model="{}" data-attack="{}" data-defense="{}"'
        ' transform="translate(0 {})">{}</g>'
    )
    return group.format(
        "" if is_shown else " off",
        model,
        attack,
        defense,
        _TOP + _LINE * index,
        Markup("").join(parts),
    )
