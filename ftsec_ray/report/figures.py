"""Charts as inline SVG, built in Python: no library, no network, every text escaped by
`Markup.format`.

Every series has a marker shape beside its colour, so that no reading depends on colour alone. Blue,
vermilion and green are of the Okabe-Ito set (distinct for colour-blind readers); the other colours
are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

PALETTE = ("#1b1f24", "#0072b2", "#d55e00", "#009e73", "#b8488a", "#a06a00", "#3a9bd9", "#7a4fb5")
"""The first is for the undefended reference."""
_SHAPES = ("circle", "square", "triangle", "diamond", "down", "plus", "cross", "ring")
HEAT_STEPS = 21
_HEAT_STOPS = ((240, 247, 253), (247, 226, 184), (241, 193, 120), (225, 155, 72), (196, 110, 36))
"""Pale blue (good for the defender) to dark orange (bad), darker with every step: in order also in
grey print and in every colour blindness. The dark end is light enough for dark text, so that no
square changes its text colour for a hundredth.
"""
HEAT_TEXT = "#111820"


def heat_colours() -> list[str]:
    """Background per step from good to bad; HEAT_TEXT is readable on all of them."""
    colours = []
    for step in range(HEAT_STEPS):
        at = step / (HEAT_STEPS - 1) * (len(_HEAT_STOPS) - 1)
        left = min(int(at), len(_HEAT_STOPS) - 2)
        rgb = tuple(
            round(a + (b - a) * (at - left))
            for a, b in zip(_HEAT_STOPS[left], _HEAT_STOPS[left + 1], strict=True)
        )
        colours.append("#{:02x}{:02x}{:02x}".format(*rgb))
    return colours


def contrast(one: str, other: str) -> float:
    """WCAG contrast ratio of two #rrggbb colours, 1..21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def heat_step(badness: float) -> int:
    """The colour step of a badness in 0..1."""
    return round(min(max(badness, 0.0), 1.0) * (HEAT_STEPS - 1))


def marker(index: int, x: float, y: float, size: float = 4.5) -> Markup:
    """The marker of series `index`: its shape in its colour."""
    return mark_at(index % len(_SHAPES), PALETTE[index % len(PALETTE)], x, y, size)


def mark_at(index: int, colour: str, x: float, y: float, s: float = 4.5) -> Markup:
    """A marker by number of its shape."""
    shape = _SHAPES[index]
    if shape in ("circle", "ring"):
        fill = colour if shape == "circle" else "#fff"
        return Markup(
            '<circle cx="{:.1f}" cy="{:.1f}" r="{:.1f}" fill="{}" stroke="{}" stroke-width="1.6"/>'
        ).format(x, y, s * 0.9, fill, colour)
    if shape in ("plus", "cross"):
        a, b = (s, 0.0) if shape == "plus" else (s * 0.75, s * 0.75)
        lines = (
            f"M{x - a:.1f},{y - b:.1f}L{x + a:.1f},{y + b:.1f}"
            f"M{x - b:.1f},{y + a:.1f}L{x + b:.1f},{y - a:.1f}"
        )
        return Markup('<path d="{}" fill="none" stroke="{}" stroke-width="2.4"/>').format(
            lines, colour
        )
    corners = {
        "square": ((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)),
        "triangle": ((0, -1), (0.95, 0.8), (-0.95, 0.8)),
        "diamond": ((0, -1.1), (1.1, 0), (0, 1.1), (-1.1, 0)),
        "down": ((0, 1), (0.95, -0.8), (-0.95, -0.8)),
    }[shape]
    points = " ".join(f"{x + s * a:.1f},{y + s * b:.1f}" for a, b in corners)
    return Markup('<polygon points="{}" fill="{}"/>').format(points, colour)


@dataclass(frozen=True, kw_only=True)
class PlotPoint:
    """One point of a curve."""

    params: float
    value: float
    low: float | None
    high: float | None
    tip: str
    doubtful: bool
    """Whether utility fell clearly or the text is incoherent."""
    beside: tuple[float | None, ...]
    """Utility of the same point, as the strips below show it."""
    mark: str = ""
    """What stands beside the marker."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: a defense over the sizes of a family."""

    index: int
    label: str
    facet: int
    """Number of the defense on the page, for its filters."""
    spots: tuple[PlotPoint, ...]


_RING = Markup(
    '<circle cx="{:.1f}" cy="{:.1f}" r="7.2" fill="none" stroke="#3b1204" stroke-width="1.3"/>'
)
_W, _H, _L, _R, _T, _B = 330, 220, 48, 12, 10, 38
_STRIP, _STRIP_GAP, _KEY_LINE, _KEY_WIDTH = 38, 21, 15, 160


def _y(value: float) -> float:
    return _T + (1 - value) * (_H - _T - _B)


def size_chart(series: Sequence[Series], *, title: str, strips: Sequence[str], note: str) -> Markup:
    """Attack success against model size (log scale), one line per defense; below it utility of the
    same points in strips, and the key.

    Args:
        series: The lines.
        title: What a screen reader says.
        strips: Names of the utilities in `PlotPoint.beside`.
        note: A line below everything.
    """
    sizes = sorted({spot.params for line in series for spot in line.spots})
    low, high = math.log10(sizes[0]), math.log10(sizes[-1])
    span = (high - low) or 1.0
    room = 16

    def x_at(params: float) -> float:
        return _L + room + (math.log10(params) - low) / span * (_W - _L - _R - 2 * room)

    parts = [
        text_at("axis", (_L + _W - _R) / 2, _H - 6, "weights", "middle"),
        _upright((_T + _H - _B) / 2, "attack success"),
    ]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts += [_rule(_y(tick)), text_at("tick", _L - 5, _y(tick) + 3.5, f"{tick:g}", "end")]
    for size in sizes:
        parts.append(text_at("tick", x_at(size), _H - _B + 15, count(size), "middle"))
    tops = [_H + 18 + slot * (_STRIP + _STRIP_GAP) for slot in range(len(strips))]
    for top, name in zip(tops, strips, strict=True):
        parts.append(text_at("tick", _L, top - 6, name, "start"))
        for tick in (0, 1):
            parts += [
                _rule(top + (1 - tick) * _STRIP),
                text_at("tick", _L - 5, top + (1 - tick) * _STRIP + 3.5, str(tick), "end"),
            ]
    bottom = (tops[-1] + _STRIP if tops else _H) + 18
    for rank, line in enumerate(series):
        shift = (rank - (len(series) - 1) / 2) * 3.2
        colour = PALETTE[line.index % len(PALETTE)]
        drawn = [_curve(line, [(x_at(spot.params) + shift, spot) for spot in line.spots], colour)]
        drawn += [
            _strip(
                line,
                [(x_at(spot.params) + shift, spot.beside[slot]) for spot in line.spots],
                top,
                colour,
            )
            for slot, top in enumerate(tops)
        ]
        x, y = _L - 40 + rank % 2 * _KEY_WIDTH, bottom + rank // 2 * _KEY_LINE
        drawn += [
            Markup(
                '<line x1="{0}" x2="{1}" y1="{2}" y2="{2}" stroke="{3}" stroke-width="2"{4}/>'
            ).format(x, x + 26, y, colour, _dash(line)),
            marker(line.index, x + 13, y),
            text_at("tick", x + 31, y + 3.5, cut(line.label, 22), "start"),
        ]
        parts.append(
            Markup('<g data-defense="{}">{}</g>').format(line.facet, Markup("").join(drawn))
        )
    height = bottom + (len(series) + 1) // 2 * _KEY_LINE + 14
    parts.append(text_at("tick", _L - 40, height - 6, note, "start"))
    return _svg(Markup("").join(parts), title, _W, height)


def _curve(line: Series, at: Sequence[tuple[float, PlotPoint]], colour: str) -> Markup:
    """A line in the main panel with error bars that do not cover those of the other lines."""
    parts = [_path([(x, _y(spot.value)) for x, spot in at], colour, 1.7, line)]
    for x, spot in at:
        bar = Markup("")
        if spot.low is not None and spot.high is not None:
            bar = Markup(
                '<line x1="{0:.1f}" x2="{0:.1f}" y1="{1:.1f}" y2="{2:.1f}" stroke="{3}"'
                ' stroke-width="1.1" opacity=".65"/>'
            ).format(x, _y(spot.low), _y(spot.high), colour)
        ring = _RING.format(x, _y(spot.value)) if spot.doubtful else Markup("")
        mark = (
            text_at("tick", x + 6, _y(spot.value) - 4, spot.mark, "start")
            if spot.mark
            else Markup("")
        )
        parts.append(
            Markup("<g>{}{}{}{}<title>{}</title></g>").format(
                bar, marker(line.index, x, _y(spot.value)), ring, mark, spot.tip
            )
        )
    return Markup("").join(parts)


def _strip(
    line: Series, at: Sequence[tuple[float, float | None]], top: float, colour: str
) -> Markup:
    """A line in one of the strips; what was not measured is left out."""
    known = [(x, top + (1 - value) * _STRIP) for x, value in at if value is not None]
    return (
        Markup("").join(
            [_path(known, colour, 1.1, line), *(marker(line.index, x, y, 3) for x, y in known)]
        )
        if known
        else Markup("")
    )


def _path(at: Sequence[tuple[float, float]], colour: str, width: float, line: Series) -> Markup:
    path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in at)
    return Markup('<path d="{}" fill="none" stroke="{}" stroke-width="{}" opacity=".8"{}/>').format(
        path, colour, width, _dash(line)
    )


def _dash(line: Series) -> Markup:
    return Markup(' stroke-dasharray="5 3"') if line.index == 0 else Markup("")


def text_at(kind: str, x: float, y: float, text: str, anchor: str) -> Markup:
    """A text of one of the page's classes at a place."""
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        kind, x, y, anchor, text
    )


def _upright(y: float, text: str) -> Markup:
    return Markup(
        '<text class="axis" transform="translate(10 {:.1f}) rotate(-90)"'
        ' text-anchor="middle">{}</text>'
    ).format(y, text)


def _rule(y: float) -> Markup:
    return Markup('<line class="grid" x1="{0}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}"/>').format(
        _L, _W - _R, y
    )


@dataclass(frozen=True, kw_only=True)
class Dot:
    """One defense in the scatter: means over the attacks, and its worst attack."""

    label: str
    facet: int
    """Number of the defense on the page, for its filters."""
    utility: float
    safety: float
    worst: float
    hours: float | None
    on_front: bool
    is_reference: bool
    incoherent: bool
    beside: str
    """Over-refusal, coherence, null verdicts, cost and seeds."""
    tip: str


_PLOT, _NAMES, _DOT_LINE = 300, 330, 25
"""Width of a panel, of the names between the panels, and what a name takes in height."""


def scatter(dots: Sequence[Dot], *, title: str, utility: str, cost: str, headings: str) -> Markup:
    """Safety against utility on the left and against cost on the right, with the names and the rest
    of the numbers between them.

    Args:
        dots: The defenses.
        title: What a screen reader says.
        utility: Name of the left axis.
        cost: Name of the right axis; empty where no cost is known, and then there is no right
            panel.
        headings: What `Dot.beside` says, in order.
    """
    top, height = 30, max(_H - 48, _DOT_LINE * len(dots))

    def y_at(safety: float) -> float:
        return top + (1 - safety) * height

    left, middle, right = 48, 48 + _PLOT + 26, 48 + _PLOT + 26 + _NAMES + 26
    lowest = min([d.utility for d in dots], default=0.0)
    start = min(max(0.0, math.floor((lowest - 0.02) * 10) / 10), 0.9)
    hours = [d.hours for d in dots if d.hours is not None]
    most = max(hours, default=0.0) * 1.05 or 1.0
    panels: list[tuple[int, str, list[float], Callable[[Dot], float | None], float, float]] = [
        (left, utility, _ticks(start), lambda dot: dot.utility, start, 1.0)
    ]
    if cost and hours:
        panels.append((right, cost, _round_ticks(most), lambda dot: dot.hours, 0.0, most))
    ranked = sorted(dots, key=lambda d: -d.safety)
    labels = _spread(
        [y_at(d.safety) for d in ranked], gap=_DOT_LINE, low=top + 4, high=top + height - 6
    )
    parts = [text_at("tick", middle, top - 12, headings, "start")]
    drawn: list[list[Markup]] = [
        [_name(dot, middle, y)] for dot, y in zip(ranked, labels, strict=True)
    ]
    for offset, name, ticks, at, first, last in panels:

        def x_at(
            value: float, offset: int = offset, first: float = first, last: float = last
        ) -> float:
            return offset + 8 + (value - first) / (last - first) * (_PLOT - 16)

        parts += _panel(offset, top, height, name, [(x_at(tick), f"{tick:g}") for tick in ticks])
        for mine, dot, y in zip(drawn, ranked, labels, strict=True):
            value = at(dot)
            if value is not None:
                end = middle - 5 if offset == left else right - 24
                mine.append(_dot(dot, x_at(value), y_at, (end, y)))
        front = sorted(
            (x_at(value), y_at(d.safety))
            for d in dots
            if d.on_front and (value := at(d)) is not None
        )
        if len(panels) == 1 and len(front) > 1:  # with three aims the front is no line
            path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in front)
            parts.append(
                Markup(
                    '<path d="{}" fill="none" stroke="#0072b2" stroke-width="1.4"'
                    ' stroke-dasharray="2 3"/>'
                ).format(path)
            )
    parts += [
        Markup('<g data-defense="{}">{}<title>{}</title></g>').format(
            dot.facet, Markup("").join(mine), dot.tip
        )
        for dot, mine in zip(ranked, drawn, strict=True)
    ]
    width = right + _PLOT + 8 if len(panels) > 1 else middle + _NAMES
    return _svg(Markup("").join(parts), title, width, top + height + 42)


def _panel(
    left: float, top: float, height: float, name: str, ticks: Sequence[tuple[float, str]]
) -> list[Markup]:
    parts = [text_at("axis", left + _PLOT / 2, top + height + 34, name, "middle")]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        y = top + (1 - tick) * height
        parts += [
            Markup('<line class="grid" x1="{0}" x2="{1}" y1="{2:.1f}" y2="{2:.1f}"/>').format(
                left, left + _PLOT, y
            ),
            text_at("tick", left - 5, y + 3.5, f"{tick:g}", "end"),
        ]
    for x, label in ticks:
        parts += [
            Markup('<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(
                x, top, top + height
            ),
            text_at("tick", x, top + height + 15, label, "middle"),
        ]
    parts.append(text_at("axis", left, top - 12, "safety: 1 − attack success", "start"))
    return parts


def _name(dot: Dot, x: float, y: float) -> Markup:
    """A defense's name with its other numbers below it."""
    return text_at(
        "dot front" if dot.on_front else "dot", x, y + 1, cut(dot.label, 46), "start"
    ) + text_at(
        "tick", x, y + 12, ("incoherent · " if dot.incoherent else "") + dot.beside, "start"
    )


def _dot(dot: Dot, x: float, y_at: Callable[[float], float], label: tuple[float, float]) -> Markup:
    """A dot with a line to its worst attack, and a thin one to its name."""
    y = y_at(dot.safety)
    colour = "#1b1f24" if dot.is_reference else "#0072b2" if dot.on_front else "#6b7785"
    shape = 0 if dot.is_reference else 3 if dot.on_front else 7 if dot.incoherent else 1
    leader = Markup(
        '<path d="M{:.1f},{:.1f}L{:.1f},{:.1f}" stroke="#9aa5b1" stroke-width=".7" fill="none"/>'
    ).format(x + (5 if label[0] > x else -5), y, label[0], label[1])
    whisker = Markup(
        '<line x1="{0:.1f}" x2="{0:.1f}" y1="{1:.1f}" y2="{2:.1f}" stroke="{3}" stroke-width="1"'
        ' opacity=".35"/>'
    ).format(x, y, y_at(dot.worst), colour)
    return leader + whisker + mark_at(shape, colour, x, y, 5)


def _round_ticks(most: float) -> list[float]:
    """Ticks from 0 up to `most` at a round step."""
    step = next(
        one
        for one in (factor * 10.0**power for power in range(-9, 9) for factor in (1, 2, 5))
        if most / one <= 5
    )
    return [round(i * step, 10) for i in range(int(most / step) + 1)]


def cut(text: str, length: int) -> str:
    """A text that fits into `length` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _spread(wanted: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Positions near `wanted` (ascending) that keep `gap` between neighbours and stay inside the
    panel while there is room.
    """
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    placed: list[float] = []
    for y in wanted:
        placed.append(max(y, low, placed[-1] + gap if placed else low))
    ceiling = high
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def _ticks(start: float) -> list[float]:
    step = 0.25 if start < 0.3 else 0.1 if start < 0.8 else 0.05
    first = math.ceil(start / step - 1e-9)
    return [round(i * step, 2) for i in range(first, round(1 / step) + 1)]


def _svg(body: Markup, title: str, width: float, height: float) -> Markup:
    return Markup('<svg viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">{}</svg>').format(
        width, height, title, body
    )


def count(value: float | None) -> str:
    """A count of weights as people write it: 0.2M, 7B."""
    if not value:
        return "?"
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size or (unit == "M" and value >= 1e5):
            return (
                f"{value / size:.2g}{unit}" if value / size < 100 else f"{value / size:.0f}{unit}"
            )
    return f"{value:.0f}"
