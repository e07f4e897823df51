"""The sentences of the answer: at most five, as HTML, Markdown and plain text."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from ftsec_ray.models.ladder import FAMILY
from ftsec_ray.report.answer import Answer, AttackOnModels, PairResult, answer_of
from ftsec_ray.report.grid import WORDS, Grid, build_grid
from ftsec_ray.report.took_effect import text_over
from ftsec_ray.shown_text import for_markdown

if TYPE_CHECKING:
    from ftsec_ray.results.read import Results

MAX_NAMED = 4
"""Pairs that one sentence names; the table below the sentences holds all."""
WIDTH = 80
"""Columns of the answer in a terminal."""


@dataclass(frozen=True)
class Sentence:
    """One sentence: its tone (`lead`, `good`, `bad`, `note`) and its text."""

    tone: str
    text: Markup

    @property
    def plain(self) -> str:
        """Without markup."""
        return "".join(self._parts)

    @property
    def markdown(self) -> str:
        """In Markdown, with the names as plain text."""
        return "".join(
            for_markdown(part) if index % 2 else part for index, part in enumerate(self._parts)
        )

    @property
    def _parts(self) -> list[str]:
        """Texts and names by turns: names in code type are the only markup of a sentence."""
        parts = re.split("</?code>", self.text.replace("\u00a0", " "))
        return [html.unescape(part) for part in parts]


def sentences(grid: Grid, answer: Answer) -> list[Sentence]:
    """What is better than its control and at what utility, what is not, which attacks did not take
    effect, and what the data cannot say.
    """
    found = [
        *_credit(grid, answer),
        *_not_better(answer),
        *_without_effect(answer),
        *_limits(grid, answer),
    ]
    return [Sentence("lead", found[0].text), *found[1:]]


def answer_lines(results: Results, width: int = WIDTH) -> list[str]:
    """The answer for a terminal of so many columns, each sentence an item of a list, at most 80
    columns wide.
    """
    grid = build_grid(results)
    return [
        line
        for one in sentences(grid, answer_of(grid))
        for line in textwrap.wrap(
            one.plain,
            min(width, WIDTH),
            initial_indent="- ",
            subsequent_indent="  ",
            break_on_hyphens=False,
            break_long_words=False,
        )
    ]


def answer_markdown(grid: Grid) -> str:
    """The same as a Markdown list."""
    return "\n".join(f"- {one.markdown}" for one in sentences(grid, answer_of(grid)))


def code(name: str) -> Markup:
    """A name in code type, escaped."""
    return Markup("<code>{}</code>").format(name)


def listed(names: Iterable[str]) -> Markup:
    """Names as a list in a sentence."""
    return _and([code(name) for name in names])


def _and(parts: Sequence[Markup]) -> Markup:
    if len(parts) < 2:
        return Markup("").join(parts)
    return Markup(", ").join(parts[:-1]) + Markup(" and ") + parts[-1]


def _credit(grid: Grid, answer: Answer) -> list[Sentence]:
    """The first one or two sentences: what is credited, without and with a loss of utility."""
    if not any(one.effects for one in answer.attacks):
        return [Sentence("note", Markup("No attack is measured without a defense yet."))]
    if not any(one.state == "took effect" for one in answer.attacks):
        text = Markup(
            "No attack took effect without a defense, so this sweep shows no defense at work."
        )
        return [Sentence("note", text)]
    if not answer.pairs:
        text = Markup("This sweep compares no defense: it shows which attacks took effect, {}.")
        worked = [one for one in answer.attacks if one.state == "took effect"]
        return [Sentence("note", text.format(_and([_with_base(a) for a in worked])))]
    if not answer.controls:
        return [_without_controls(grid, answer)]
    credited = _ranked([pair for pair in answer.pairs if pair.credited])
    if not credited:
        text = Markup(
            "No defense is better than its own control against an attack that took effect."
        )
        return [Sentence("bad", text)]
    kept = [pair for pair in credited if not pair.losses]
    paid = [pair for pair in credited if pair.losses]
    found = []
    if kept:
        text = Markup("Better than its own control, with no loss of utility shown: {}.")
        found.append(Sentence("good", text.format(_pairs(grid, answer, kept))))
    if paid:
        text = Markup("Better than its own control, but at a loss of utility: {}.")
        found.append(Sentence("bad", text.format(_pairs(grid, answer, paid))))
    return found


def _without_controls(grid: Grid, answer: Answer) -> Sentence:
    below = [pair for pair in answer.pairs if any(one.is_below_none for one in pair.models)]
    text = Markup("No defense has a control in this sweep, so none is credited with an effect")
    if not below:
        is_tested = any(one.is_tested_against_none for pair in answer.pairs for one in pair.models)
        return Sentence(
            "bad",
            text
            + (
                Markup(", and none is better than no defense.")
                if is_tested
                else Markup(", and no comparison with no defense could be tested.")
            ),
        )
    return Sentence(
        "note",
        text
        + Markup("; better than no defense, which a control might be too: {}.").format(
            _pairs(grid, answer, _ranked(below))
        ),
    )


def _ranked(pairs: Iterable[PairResult]) -> list[PairResult]:
    """Those on the largest share of models first, then by the size of the difference."""
    return sorted(
        pairs,
        key=lambda pair: (
            -len(pair.credited) / len(pair.models),
            (pair.after or 0.0) - (pair.before or 0.0),
            pair.attack.label,
            pair.defense.label,
        ),
    )


def _pairs(grid: Grid, answer: Answer, pairs: Sequence[PairResult]) -> Markup:
    several = len(grid.slices()) > 1
    parts = []
    for index, pair in enumerate(pairs[:MAX_NAMED]):
        inside = [_success_text(pair, is_first=index == 0)]
        inside += [f"{WORDS[one.metric]} {one.before:.2f} → {one.after:.2f}" for one in pair.losses]
        parts.append(
            Markup("{} against {}{} ({})").format(
                code(answer.names[pair.defense.label]),
                code(pair.attack.label),
                _where(pair) if several else "",
                ", ".join(inside),
            )
        )
    if len(pairs) > MAX_NAMED:
        parts.append(Markup("{} more in the table").format(len(pairs) - MAX_NAMED))
    return Markup("; ").join(parts)


def _success_text(pair: PairResult, *, is_first: bool) -> str:
    """Attack success with the control and with the defense; what the arrow means, once."""
    before, after = f"{pair.before:.2f}", f"{pair.after:.2f}"
    if not is_first:
        return f"{before} → {after}".replace(" ", "\u00a0")
    other = "no defense" if pair.word == "no control" else "the control"
    return f"attack success {before} with {other} → {after} with the defense"


def _where(pair: PairResult) -> Markup:
    """On which model, or on how many."""
    if len(pair.models) == 1:
        return Markup(" on {}").format(code(pair.models[0].own[0]))
    count = len(pair.credited) or sum(one.is_below_none for one in pair.models)
    return Markup(" on {} of {} models").format(count, len(pair.models))


def _not_better(answer: Answer) -> list[Sentence]:
    """What is not shown better than its control, by attack."""
    parts, detectable = [], []
    for attack in answer.attacks:
        tested = [
            pair
            for pair in answer.pairs
            if pair.attack == attack.attack and pair.word not in ("no control", "not tested")
        ]
        failed = [pair for pair in tested if not pair.credited]
        detectable += [
            one.detectable for pair in failed for one in pair.models if one.detectable is not None
        ]
        if failed:
            parts.append(_failed_text(answer, attack, failed, is_all=failed == tested))
    if not parts:
        return []
    seen = (
        f"; a difference of {max(detectable):.2f} would have been shown four times in five"
        if detectable
        else ""
    )
    text = Markup("Not shown better than its own control: {}{}{}.")
    return [Sentence("bad", text.format(Markup("; ").join(parts), _below_none(answer), seen))]


def _below_none(answer: Answer) -> Markup:
    """Which of these are better than no defense all the same; empty if none is."""
    pairs = [
        pair
        for pair in answer.pairs
        if not pair.credited
        and pair.word in ("no difference shown", "mixed")
        and any(one.is_below_none for one in pair.models)
    ]
    if not pairs:
        return Markup("")
    named = [
        Markup("{} against {}").format(
            code(answer.names[pair.defense.label]), code(pair.attack.label)
        )
        for pair in pairs[:MAX_NAMED]
    ]
    more = f" and {len(pairs) - MAX_NAMED} more" if len(pairs) > MAX_NAMED else ""
    text = Markup("; of these, better than no defense: {}{}")
    return text.format(Markup(", ").join(named), more)


def _failed_text(
    answer: Answer, attack: AttackOnModels, failed: Sequence[PairResult], *, is_all: bool
) -> Markup:
    words = {"worse": " (worse)", "incoherent": " (incoherent)"}
    marked = [pair for pair in failed if pair.word in words]
    if is_all and len(failed) > 2:
        inside = Markup("every defense")
        if marked:
            inside += Markup(" ({})").format(
                Markup(", ").join(
                    Markup("{} {}").format(code(answer.names[pair.defense.label]), pair.word)
                    for pair in marked
                )
            )
    else:
        inside = _and(
            [code(answer.names[pair.defense.label]) + words.get(pair.word, "") for pair in failed]
        )
    return Markup("{} against {}").format(inside, code(attack.attack.label))


def _with_base(attack: AttackOnModels) -> Markup:
    return Markup("{} ({})").format(code(attack.attack.label), text_over(attack.effects))


def _without_effect(answer: Answer) -> list[Sentence]:
    """The attacks that did not take effect, with their number beside the base rate."""
    weak, unknown = [], []
    for attack in answer.attacks:
        took = any(effect.state == "took effect" for effect in attack.effects)
        lacking = [one for one in attack.on if one[2].state == "did not take effect"]
        if lacking and not took:
            weak.append(_with_base(attack))
        else:
            weak += [
                Markup("{} on {} ({})").format(code(attack.attack.label), code(model), effect.text)
                for model, _, effect in lacking
            ]
        if attack.state == "not known":
            unknown.append(_with_base(attack))
    parts = []
    if weak:
        parts.append(Markup("Did not take effect without a defense: {}").format(_and(weak)))
    if unknown:
        text = Markup("{} whether it took effect without a defense: {}")
        parts.append(text.format("not known" if parts else "Not known", _and(unknown)))
    if not parts:
        return []
    tail = Markup("; nothing here says that a defense stops such an attack.")
    return [Sentence("note", Markup("; ").join(parts) + tail)]


def _limits(grid: Grid, answer: Answer) -> list[Sentence]:
    """What the data cannot say."""
    makers: tuple[Callable[[Grid, Answer], Markup | None], ...] = (
        _seeds_limit,
        _controls_limit,
        _untested_limit,
        _missing_limit,
        _ladder_limit,
    )
    parts = [part for make in makers if (part := make(grid, answer)) is not None]
    if not parts:
        return []
    text = Markup("The data cannot say {}.")
    return [Sentence("note", text.format(Markup("; ").join(parts)))]


def _seeds_limit(grid: Grid, answer: Answer) -> Markup | None:
    del answer
    single = sum(len(point.seeds) == 1 for point in grid.points.values())
    if not single:
        return None
    where = "1 seed" if single == len(grid.points) else f"{single} points have 1 seed"
    return Markup("how much another training run would differ ({})").format(where)


def _controls_limit(grid: Grid, answer: Answer) -> Markup | None:
    del grid
    lacking = {
        answer.names[pair.defense.label]: None
        for pair in answer.pairs
        if pair.defense.label not in answer.controls
    }
    if not lacking or not answer.controls:
        return None
    return Markup("whether the mechanism of {} does anything (no control)").format(listed(lacking))


def _untested_limit(grid: Grid, answer: Answer) -> Markup | None:
    del grid
    untested = [pair for pair in answer.pairs if pair.word == "not tested"]
    if not untested:
        return None
    named = [
        Markup("{} against {}").format(
            code(answer.names[pair.defense.label]), code(pair.attack.label)
        )
        for pair in untested[:MAX_NAMED]
    ]
    if len(untested) > MAX_NAMED:
        named.append(Markup("{} more").format(len(untested) - MAX_NAMED))
    return Markup("anything about {} (not tested)").format(_and(named))


def _missing_limit(grid: Grid, answer: Answer) -> Markup | None:
    del answer
    lacking = sum(point.status != "done" for point in grid.points.values())
    if not lacking:
        return None
    return Markup("what {} of {} points show (failed or pending)").format(lacking, len(grid.points))


def _ladder_limit(grid: Grid, answer: Answer) -> Markup | None:
    del answer
    if not grid.models or len(ladder_models(grid)) < len(grid.models):
        return None
    return Markup("how real models behave (all models here are small test models)")


def ladder_models(grid: Grid) -> list[str]:
    """The models of the sweep that are small test models of the ladder."""
    return [
        model.name
        for model in grid.models
        if model.family == FAMILY or model.name.startswith(f"{FAMILY}:")
    ]
