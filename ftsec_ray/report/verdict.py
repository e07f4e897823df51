"""What each defense does to each attack compared with no defense, over the models on which the
attack took effect (`took_effect`).

A defense lowers an attack clearly where the table `comparisons` says `better`: paired, and
corrected over all tests of attack success. Where a pair could not be tested there, Newcombe's
interval stands in. Points whose output is mostly incoherent never count as defended. Whether the
mechanism of a defense does it is the comparison with its control: see `answer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from markupsafe import Markup

from ftsec_ray.measured import Measured, null_text, summed
from ftsec_ray.report.grid import SHORT, Grid, Key, MethodLabel, UtilityMark
from ftsec_ray.report.took_effect import difference, effects_of_attack
from ftsec_ray.results.points import NONE, SUCCESS


@dataclass(frozen=True)
class Effect:
    """What one defense did to one attack, over the models on which the attack took effect and
    the output is coherent.
    """

    attack: str
    defense: str
    before: float
    after: float
    clear: int
    """Models on which the drop is clear."""
    models: int
    """Models with coherent output, which the means are over."""
    incoherent: int
    """Further models, on which the defended output is mostly incoherent."""
    utility: Markup
    """Clean accuracy, over-refusal and coherence of the same points, undefended -> defended."""
    seeds: int
    """Seeds of the point that has fewest."""
    pairs: tuple[tuple[Key, Key], ...]
    """The points, undefended and defended."""

    @property
    def drop(self) -> float:
        """Mean attack success taken away."""
        return self.before - self.after


@dataclass(frozen=True)
class Summary:
    """The effects against no defense, and the best defense for each attack."""

    effects: tuple[Effect, ...]
    best: tuple[tuple[MethodLabel, Effect | None], ...]
    """Each real attack with the coherent defense that lowers it most; None where it did not take
    effect or nothing lowers it.
    """


def is_clear(grid: Grid, before: Key, after: Key) -> bool:
    """Whether attack success is clearly lower with a stack than without it."""
    row = grid.comparison(after, before)
    if row is not None:
        return bool(row["effect"] < 0 and row["conclusion"] in ("better", "worse"))
    return difference(_measured(grid, before), _measured(grid, after))[1] > 0


def change_text(before: UtilityMark, after: UtilityMark) -> str:
    """One utility before and after, in one unbroken piece."""
    return f"{before.text} → {after.number}".replace(" ", "\u00a0")


def utility_text(grid: Grid, pairs: Sequence[tuple[Key, Key]]) -> Markup:
    """Clean accuracy, over-refusal and coherence over pairs of points, first -> second of each
    pair, and the share of null verdicts.
    """
    parts: list[str] = []
    for slot in range(_slots(grid, [key for pair in pairs for key in pair])):
        sides = [
            [one for key in keys if (one := grid.utilities(key)[slot]).value is not None]
            for keys in zip(*pairs, strict=True)
        ]
        if all(sides):
            before, after = (
                UtilityMark(
                    side[0].metric, fmean(one.value for one in side if one.value is not None)
                )
                for side in sides
            )
            after = replace(after, fell=any(one.fell for one in sides[1]))
            parts.append(change_text(before, after))
        else:
            parts.append(f"{SHORT[grid.utilities(pairs[0][0])[slot].metric]} –")
    return _unbroken([*parts, _nulls_text(grid, [key for pair in pairs for key in pair])])


def _slots(grid: Grid, keys: Sequence[Key]) -> int:
    """Measures of utility that all points have."""
    return min(len(grid.utility_metrics[task]) for _, task, _, _ in keys)


def own_utility_text(grid: Grid, keys: Sequence[Key]) -> Markup:
    """The same of points by themselves."""
    parts = []
    for slot in range(_slots(grid, keys)):
        side = [one for key in keys if (one := grid.utilities(key)[slot]).value is not None]
        value = fmean(one.value for one in side if one.value is not None) if side else None
        parts.append(
            UtilityMark(grid.utilities(keys[0])[slot].metric, value).text.replace(" ", "\u00a0")
        )
    return _unbroken([*parts, _nulls_text(grid, keys)])


def _unbroken(parts: Sequence[str]) -> Markup:
    """Parts of a line that breaks only between them."""
    return Markup(" · ").join(Markup('<span class="nb">{}</span>').format(one) for one in parts)


def _nulls_text(grid: Grid, keys: Sequence[Key]) -> str:
    """The share of null verdicts behind the attack success of points."""
    measured = [found for key in keys if (found := grid.value(key)) is not None]
    nulls = summed(found.nulls for found in measured)
    return null_text(nulls).replace(" ", "\u00a0")


def effects_of(grid: Grid) -> list[Effect]:
    """The effect of every defense on every attack that took effect, largest drop first."""
    found = []
    for attack in grid.real_attacks:
        places = [
            (model.name, task)
            for model, task, effect in effects_of_attack(grid, attack)
            if effect.state == "took effect"
        ]
        for defense in grid.acting:
            pairs = [
                ((m, t, attack.label, NONE), (m, t, attack.label, defense.label)) for m, t in places
            ]
            pairs = [pair for pair in pairs if grid.value(pair[1]) is not None]
            kept = [pair for pair in pairs if not grid.points[pair[1]].is_incoherent]
            if not kept:
                continue
            before = [_measured(grid, first) for first, _ in kept]
            after = [_measured(grid, second) for _, second in kept]
            clear = sum(is_clear(grid, first, second) for first, second in kept)
            found.append(
                Effect(
                    attack.label,
                    defense.label,
                    fmean(b.value for b in before),
                    fmean(a.value for a in after),
                    clear,
                    len(kept),
                    len(pairs) - len(kept),
                    utility_text(grid, kept),
                    min(e.seeds for e in before + after),
                    tuple(kept),
                )
            )
    return sorted(found, key=lambda e: (-e.drop, e.attack, e.defense))


def _measured(grid: Grid, key: Key, metric: str = SUCCESS) -> Measured:
    found = grid.value(key, metric)
    assert found is not None  # noqa: S101 (the caller kept measured points only)
    return found


def judge(grid: Grid) -> Summary:
    """The effects of a grid, and the best defense for each attack."""
    effects = effects_of(grid)
    best = []
    for attack in grid.real_attacks:
        own = [e for e in effects if e.attack == attack.label and e.clear]
        best.append((attack, own[0] if own else None))
    return Summary(tuple(effects), tuple(best))
