"""The answer as a table: a line per defense, a column per attack, one word and two numbers each."""

from __future__ import annotations

from dataclasses import dataclass

from ftsec_ray.report.answer import Answer, AttackOnModels, ModelResult, PairResult
from ftsec_ray.report.grid import WORDS, Grid, Key, MethodLabel, Model
from ftsec_ray.report.took_effect import final_slices, text_over
from ftsec_ray.results.points import NONE

SIGNS = {
    "better": "●",
    "worse": "■",
    "mixed": "◐",
    "incoherent": "×",
    "no difference shown": "○",
    "not tested": "?",
    "no control": "–",
    "no effect": "–",
}
"""Word -> the sign in front of it, so that no meaning is in colour alone."""


@dataclass(frozen=True, kw_only=True)
class AnswerCell:
    """One defense against one attack."""

    word: str
    text: str
    """The word as it is shown, with the number of models where there are several."""
    numbers: str
    title: str
    """All of it in one sentence, for hover and screen readers."""
    opened: tuple[Key, Key] | None
    """The two points that a click opens."""

    @property
    def sign(self) -> str:
        """The sign of the word."""
        return SIGNS[self.word]

    @property
    def tone(self) -> str:
        """better, worse, incoherent or open: how the word is coloured."""
        return self.word if self.word in ("better", "worse", "incoherent") else "open"


@dataclass(frozen=True, kw_only=True)
class AnswerLine:
    """One defense."""

    defense: MethodLabel
    name: str
    controls: tuple[str, ...]
    cells: tuple[AnswerCell | None, ...]
    """In the order of the attacks; None where nothing was planned."""
    cost: str
    """Utility that is clearly worse than without a defense, with its numbers."""


@dataclass(frozen=True, kw_only=True)
class AnswerTable:
    """The whole table."""

    attacks: tuple[tuple[MethodLabel, str, str], ...]
    """Attack, its state in words, and its success beside the base rate."""
    lines: tuple[AnswerLine, ...]


def answer_table(grid: Grid, answer: Answer) -> AnswerTable | None:
    """The table; None without a defense or without an attack."""
    lines = tuple(
        AnswerLine(
            defense=defense,
            name=answer.names[defense.label],
            controls=answer.controls.get(defense.label, ()),
            cells=tuple(_cell(grid, answer, attack, defense) for attack in answer.attacks),
            cost=_cost(grid, defense),
        )
        for defense in grid.acting
        if defense.label not in answer.only_controls
    )
    if not lines or not answer.attacks:
        return None
    heads = tuple((one.attack, one.state, text_over(one.effects)) for one in answer.attacks)
    return AnswerTable(attacks=heads, lines=lines)


def _cell(
    grid: Grid, answer: Answer, attack: AttackOnModels, defense: MethodLabel
) -> AnswerCell | None:
    pair = answer.pair(attack.attack.label, defense.label)
    if pair is None:
        planned = any(
            (model, task, attack.attack.label, defense.label) in grid.points
            for model, task, _ in attack.on
        )
        if not planned:
            return None
        return AnswerCell(
            word="no effect", text="–", numbers="", title=f"the attack {attack.state}", opened=None
        )
    return _shown(pair)


def _shown(pair: PairResult) -> AnswerCell:
    best = pair.opened
    count = pair.counts[best.word] if best is not None else len(pair.models)
    several = len(pair.models) > 1
    text = pair.word + (f" ({count} of {len(pair.models)})" if several else "")
    if pair.word == "mixed":
        text = "better on some models, worse on others"
    numbers = (
        "" if pair.before is None or pair.after is None else f"{pair.before:.2f} → {pair.after:.2f}"
    )
    against = "without a defense" if pair.word == "no control" else "with the control"
    counted = f"{text} models" if several else text
    title = (
        f"{pair.defense.label} against {pair.attack.label}: {counted}; attack success {against}"
        f" → with the defense {numbers or 'not measured'}"
    ) + "".join(
        f"; {WORDS[loss.metric]} worse, {loss.before:.2f} → {loss.after:.2f}"
        for loss in pair.losses
    )
    return AnswerCell(
        word=pair.word,
        text=text,
        numbers=numbers,
        title=title,
        opened=None if best is None else _opened(best),
    )


def _opened(result: ModelResult) -> tuple[Key, Key]:
    return result.own, result.control or (*result.own[:3], NONE)


def _cost(grid: Grid, defense: MethodLabel) -> str:
    """What is clearly worse with the defense than without, where no attack acts."""
    slices = final_slices(grid)
    metrics = dict.fromkeys(name for _, task in slices for name in grid.utility_metrics[task])
    parts, is_tested = [], False
    for metric in metrics:
        rows = [
            row
            for model, task in slices
            if (
                row := grid.comparison(
                    _clean(model, task, defense.label), _clean(model, task), metric
                )
            )
        ]
        is_tested = is_tested or bool(rows)
        worse = [row for row in rows if row["conclusion"] == "worse"]
        if worse:
            most = max(worse, key=lambda row: abs(row["effect"]))
            parts.append(f"{WORDS[metric]} {most['rate_against']:.2f} → {most['rate']:.2f}")
    return ", ".join(parts) or ("no loss shown" if is_tested else "not tested")


def _clean(model: Model, task: str, defense: str = NONE) -> Key:
    """The point of a stack without an attack."""
    return model.name, task, NONE, defense
