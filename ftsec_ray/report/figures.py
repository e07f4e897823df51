"""Charts as inline SVG, built in Python: no library, no network, every text escaped by `Markup.format`.

Colours are the Okabe-Ito set (distinct for colour-blind readers) with a marker shape per series, so that no reading
depends on colour alone.
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
MAX_NAMES = 13
"""Names beside the dots of one scatter that do not run into each other."""
_HEAT_STOPS = ((84, 146, 205), (165, 204, 234), (247, 246, 242), (250, 200, 140), (222, 122, 42))
"""Blue (good for the defender) over near-white to orange: blue against orange stays apart in every colour blindness. The
ends stay light enough for dark text, so that no square changes its text colour for a hundredth."""
HEAT_TEXT = "#111820"


def heat_colours() -> list[str]:
    """Background per step from good to bad; HEAT_TEXT is readable on all of them."""
    colours = []
    for step in range(HEAT_STEPS):
        at = step / (HEAT_STEPS - 1) * (len(_HEAT_STOPS) - 1)
        left = min(int(at), len(_HEAT_STOPS) - 2)
        rgb = tuple(round(a + (b - a) * (at - left)) for a, b in zip(_HEAT_STOPS[left], _HEAT_STOPS[left + 1], strict=True))
        colours.append("#{:02x}{:02x}{:02x}".format(*rgb))
    return colours


def contrast(one: str, other: str) -> float:
    """WCAG contrast ratio of two #rrggbb colours, 1..21."""
    def luminance(colour: str) -> float:
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def heat_step(badness: float) -> int:
    """The colour step of a badness in 0..1."""
    return round(min(max(badness, 0.0), 1.0) * (HEAT_STEPS - 1))


def marker(index: int, x: float, y: float, size: float = 4.5) -> Markup:
    """The marker of series `index`: its shape in its colour."""
    return _mark(index % len(_SHAPES), PALETTE[index % len(PALETTE)], x, y, size)


def _mark(index: int, colour: str, x: float, y: float, s: float = 4.5) -> Markup:
    """A marker by number of its shape."""
    shape = _SHAPES[index]
    if shape in ("circle", "ring"):
        fill = colour if shape == "circle" else "#fff"
        return Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{:.1f}" fill="{}" stroke="{}" stroke-width="1.6"/>').format(x, y, s * .9, fill, colour)
    if shape in ("plus", "cross"):
        a, b = (s, 0.0) if shape == "plus" else (s * .75, s * .75)
        lines = f"M{x - a:.1f},{y - b:.1f}L{x + a:.1f},{y + b:.1f}M{x - b:.1f},{y + a:.1f}L{x + b:.1f},{y - a:.1f}"
        return Markup('<path d="{}" fill="none" stroke="{}" stroke-width="2.4"/>').format(lines, colour)
    corners = {"square": ((-.8, -.8), (.8, -.8), (.8, .8), (-.8, .8)), "triangle": ((0, -1), (.95, .8), (-.95, .8)),
               "diamond": ((0, -1.1), (1.1, 0), (0, 1.1), (-1.1, 0)), "down": ((0, 1), (.95, -.8), (-.95, -.8))}[shape]
    points = " ".join(f"{x + s * a:.1f},{y + s * b:.1f}" for a, b in corners)
    return Markup('<polygon points="{}" fill="{}"/>').format(points, colour)


def legend_marker(index: int) -> Markup:
    """A small marker with its line for legends."""
    dash = Markup(' stroke-dasharray="5 3"') if index == 0 else Markup("")
    line = Markup('<line x1="1" y1="7" x2="27" y2="7" stroke="{}" stroke-width="2"{}/>').format(PALETTE[index % len(PALETTE)], dash)
    return Markup('<svg class="key" width="28" height="14" viewBox="0 0 28 14" aria-hidden="true">{}{}</svg>').format(line, marker(index, 14, 7))


@dataclass(frozen=True)
class Series:
    """One line: (parameters, value, low, high, tooltip, whether utility fell or the text is incoherent) per model size."""

    index: int
    label: str
    points: tuple[tuple[float, float, float | None, float | None, str, bool], ...]


_RING = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="7.2" fill="none" stroke="#3b1204" stroke-width="1.3"/>')
_W, _H, _L, _R, _T, _B = 330, 220, 48, 12, 10, 38


def _y(value: float) -> float:
    return _T + (1 - value) * (_H - _T - _B)


def _axes(x_label: str, y_label: str) -> Markup:
    parts = [Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>').format((_L + _W - _R) / 2, _H - 4, x_label),
             Markup('<text class="axis" transform="translate(10 {}) rotate(-90)" text-anchor="middle">{}</text>')
             .format((_T + _H - _B) / 2, y_label)]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(_L, _W - _R, _y(tick), _y(tick)))
        parts.append(Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{:g}</text>').format(_L - 5, _y(tick) + 3.5, tick))
    return Markup("").join(parts)


def size_chart(series: Sequence[Series], *, title: str) -> Markup:
    """Attack success against model size (log scale), one line per defense, with error bars that do not cover each other."""
    sizes = sorted({point[0] for line in series for point in line.points})
    low, high = math.log10(sizes[0]), math.log10(sizes[-1])
    span = (high - low) or 1.0
    room = 16

    def x_at(params: float) -> float:
        return _L + room + (math.log10(params) - low) / span * (_W - _L - _R - 2 * room)
    parts = [_axes("weights", "attack success")]
    for size in sizes:
        parts.append(Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(x_at(size), _H - _B + 15, count(size)))
    for rank, line in enumerate(series):
        shift = (rank - (len(series) - 1) / 2) * 3.2
        colour = PALETTE[line.index % len(PALETTE)]
        at = [(x_at(p[0]) + shift, _y(p[1])) for p in line.points]
        path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in at)
        dash = Markup(' stroke-dasharray="5 3"') if line.index == 0 else Markup("")
        bars = []
        for (x, y), (_, _, below, above, tip, doubtful) in zip(at, line.points, strict=True):
            bar = Markup("")
            if below is not None and above is not None:
                bar = Markup('<line x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}" stroke="{}" stroke-width="1.1" opacity=".65"/>').format(
                    x, x, _y(below), _y(above), colour)
            ring = _RING.format(x, y) if doubtful else Markup("")
            bars.append(Markup("<g>{}{}{}<title>{}</title></g>").format(bar, marker(line.index, x, y), ring, tip))
        parts.append(Markup('<path d="{}" fill="none" stroke="{}" stroke-width="1.7" opacity=".8"{}/>').format(path, colour, dash))
        parts += bars
    return _svg(Markup("").join(parts), title)


@dataclass(frozen=True)
class Dot:
    """One defense in the scatter: mean utility and mean safety over the attacks, the worst attack below it."""

    label: str
    utility: float
    safety: float
    worst: float
    on_front: bool
    is_reference: bool
    incoherent: bool
    tip: str


def scatter(dots: Sequence[Dot], *, title: str, x_label: str) -> Markup:
    """Safety against utility, one dot per defense, the Pareto front joined, names beside the dots."""
    lowest = min([d.utility for d in dots], default=0.0)
    start = max(0.0, math.floor((lowest - 0.02) * 10) / 10)
    start = min(start, 0.9)

    def x_at(value: float) -> float:
        return _L + 8 + (value - start) / (1 - start) * (_W - _L - _R - 100)
    parts = [_axes(x_label, "safety: 1 − attack success")]
    for tick in _ticks(start):
        parts.append(Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{:g}</text>').format(x_at(tick), _H - _B + 15, tick))
        parts.append(Markup('<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="{1:.1f}" y2="{2:.1f}"/>').format(x_at(tick), _y(1), _y(0)))
    front = sorted((d.utility, d.safety) for d in dots if d.on_front)
    if len(front) > 1:
        path = "M" + "L".join(f"{x_at(u):.1f},{_y(s):.1f}" for u, s in front)
        parts.append(Markup('<path d="{}" fill="none" stroke="#0072b2" stroke-width="1.4" stroke-dasharray="2 3"/>').format(path))
    ranked = sorted(dots, key=lambda d: -d.safety)
    named = [d for d in ranked if len(ranked) <= MAX_NAMES or d.on_front or d.is_reference][:MAX_NAMES]
    places = dict(zip([d.label for d in named], _spread([_y(d.safety) for d in named], gap=12.5, low=_T + 4, high=_H - _B), strict=True))
    parts += [_dot(dot, x_at(dot.utility), places.get(dot.label)) for dot in ranked]
    return _svg(Markup("").join(parts), title)


def _dot(dot: Dot, x: float, label_y: float | None) -> Markup:
    y = _y(dot.safety)
    colour = "#1b1f24" if dot.is_reference else "#0072b2" if dot.on_front else "#6b7785"
    fill = "#fff" if dot.incoherent else colour
    whisker = Markup('<line x1="{0:.1f}" x2="{0:.1f}" y1="{1:.1f}" y2="{2:.1f}" stroke="{3}" stroke-width="1" opacity=".35"/>').format(
        x, y, _y(dot.worst), colour)
    circle = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="4.6" fill="{}" stroke="{}" stroke-width="1.6"/>').format(x, y, fill, colour)
    if label_y is None:
        return Markup("<g>{}{}<title>{}</title></g>").format(whisker, circle, dot.tip)
    lead_x = _W - _R - 84
    leader = Markup('<path d="M{:.1f},{:.1f}L{:.1f},{:.1f}" stroke="#9aa5b1" stroke-width=".7" fill="none"/>').format(x + 5, y, lead_x - 3, label_y)
    name = dot.label if len(dot.label) <= 17 else dot.label[:16] + "…"
    text = Markup('<text class="dot{}" x="{:.1f}" y="{:.1f}">{}</text>').format(" front" if dot.on_front else "", lead_x, label_y + 3.5, name)
    return Markup("<g>{}{}{}{}<title>{}</title></g>").format(leader, whisker, circle, text, dot.tip)


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


_TONES = {"better": (0, "#0072b2"), "worse": (1, "#c24a00"), "incoherent": (6, "#3b1204"), "open": (7, "#6b7785")}
"""Tone -> marker shape and colour: blue is good for the defender, as on the grid."""
FOREST_WIDTH, _FOREST_LEFT, _FOREST_RIGHT, _FOREST_LINE = 1180, 330, 730, 30


def forest(lines: Sequence[Line], *, title: str) -> Markup:
    """Differences with their intervals, one line each, words and utility beside it; a pale bar is what could not have been seen."""
    top, height = 26, 26 + _FOREST_LINE * len(lines) + 34

    def x_at(value: float) -> float:
        return _FOREST_LEFT + (value + 1) / 2 * (_FOREST_RIGHT - _FOREST_LEFT)
    parts = []
    for tick in (-1, -0.5, 0, 0.5, 1):
        kind = "zero" if tick == 0 else "grid"
        parts.append(Markup('<line class="{3}" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(x_at(tick), top - 6, height - 30, kind))
        parts.append(Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            x_at(tick), height - 16, f"{tick:+g}".replace("-", "−") if tick else "0"))
    parts += [Markup('<text class="axis" x="{:.1f}" y="{}" text-anchor="middle">difference in attack success</text>').format(x_at(0), height - 3),
              Markup('<text class="axis" x="{:.1f}" y="12" text-anchor="middle">← less, better</text>').format(x_at(-0.6)),
              Markup('<text class="axis" x="{:.1f}" y="12" text-anchor="middle">more, worse →</text>').format(x_at(0.6))]
    parts += [_forest_line(line, top + _FOREST_LINE * (index + 0.5), x_at) for index, line in enumerate(lines)]
    svg = Markup('<svg class="forest" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>')
    return svg.format(FOREST_WIDTH, height, title, Markup("").join(parts))


def _forest_line(line: Line, y: float, x_at: Callable[[float], float]) -> Markup:
    shape, colour = _TONES[line.tone]
    parts = []
    if line.tone == "open" and line.detectable is not None:
        parts.append(Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="14" fill="#e7ebef"/>').format(
            x_at(-line.detectable), y - 7, x_at(line.detectable) - x_at(-line.detectable)))
    parts += [Markup('<line x1="{0:.1f}" x2="{1:.1f}" y1="{2:.1f}" y2="{2:.1f}" stroke="{3}" stroke-width="1.8"/>').format(
        x_at(line.low), x_at(line.high), y, colour), _mark(shape, colour, x_at(line.effect), y)]
    right, number = _FOREST_RIGHT + 14, f"{line.effect:.2f} [{line.low:.2f}, {line.high:.2f}]".replace("-0.00", "0.00").replace("-", "−")
    for x, up, down in ((4, _cut(line.title, 52), _cut(line.about, 62)), (right, f"{number} {line.words}", line.beside)):
        parts.append(Markup('<text class="name" x="{}" y="{:.1f}">{}</text>').format(x, y - 2, up))
        parts.append(Markup('<text class="tick" x="{}" y="{:.1f}">{}</text>').format(x, y + 10, down))
    parts.append(Markup("<title>{}, {}: {}; {}</title>").format(line.title, line.about, line.words, line.beside))
    return Markup("<g>{}</g>").format(Markup("").join(parts))


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length - 1] + "…"


def _spread(wanted: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Positions near `wanted` (ascending) that keep `gap` between neighbours and stay inside the panel while there is room."""
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


def _svg(body: Markup, title: str) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(_W, _H, title, body)


def count(value: float | None) -> str:
    """A count of weights as people write it: 0.2M, 7B."""
    if not value:
        return "?"
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size or (unit == "M" and value >= 1e5):
            return f"{value / size:.2g}{unit}" if value / size < 100 else f"{value / size:.0f}{unit}"
    return f"{value:.0f}"
