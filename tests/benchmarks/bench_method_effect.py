"""What each method does to attack success, as the results of a finished sweep say.

    python -m tests.benchmarks.bench_method_effect SWEEP [SWEEP ...] [--results FOLDER] [--write]

An attack stands beside its base rate, without a defense. A defense stands, for each attack that
took effect on the model, beside no defense and beside the control that it does least well against,
with what the report's answer concludes. A defense that is in the sweep as another one's control
alone, a stack of several, and a detector have no line.

`--write` puts the figures into `ftsec_ray/cli/method_effects.json`, which `ftsec show METHOD`
reads; figures of other sweeps stay there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from ftsec_ray import api
from ftsec_ray.cli.method_effects import FILE, MeasuredEffect, effects_of, text_of_effects
from ftsec_ray.measured import Measured
from ftsec_ray.report.answer import answer_of
from ftsec_ray.report.grid import Grid, Key, MethodLabel, build_grid
from ftsec_ray.report.took_effect import attack_effect, final_slices
from ftsec_ray.results.points import NONE


def interval(measured: Measured) -> tuple[float | None, float | None]:
    """The interval over seeds; with one seed, that over prompts."""
    return measured.over_seeds or measured.prompts or (None, None)


def attacks(grid: Grid, sweep: str) -> Iterator[MeasuredEffect]:
    """Every setting of every attack on every model, undefended."""
    for model, task in final_slices(grid):
        for attack in grid.real_attacks:
            found = attack_effect(grid, model.name, task, attack)
            if found is None:
                continue
            key = (model.name, task, attack.label, NONE)
            base = {} if found.base is None else {"base rate": found.base.value}
            yield figure(
                grid, key, sweep, attack, found.success, beside=base, conclusion=found.state
            )


def defenses(grid: Grid, sweep: str) -> Iterator[MeasuredEffect]:
    """Every setting of every single defense that acts, against every attack that took effect on the
    model; the conclusion is that of the report's answer.
    """
    answer = answer_of(grid)
    single = [one for one in grid.acting if len(one.phases) == 1]
    for defense in single:
        for attack in grid.real_attacks:
            pair = answer.pair(attack.label, defense.label)
            for found in pair.models if pair else ():
                own, none = grid.value(found.own), grid.value((*found.own[:3], NONE))
                if own is None or none is None:
                    continue
                beside, conclusion = {"no defense": none.value}, "it has no control here"
                if found.control is not None and (control := grid.value(found.control)):
                    beside["control"] = control.value
                    losses = ", ".join(dict.fromkeys(loss.metric for loss in found.losses))
                    conclusion = f"{found.word}{f', at a loss of {losses}' if losses else ''}"
                yield figure(
                    grid, found.own, sweep, defense, own,
                    attack=attack.label, beside=beside, conclusion=conclusion,
                )  # fmt: skip


def figure(
    grid: Grid, key: Key, sweep: str, method: MethodLabel, own: Measured, *,
    beside: dict[str, float], conclusion: str, attack: str = "",
) -> MeasuredEffect:  # fmt: skip
    """The figure of one point."""
    coherent = grid.value(key, "coherent_rate")
    if coherent is not None and grid.points[key].is_incoherent:
        conclusion += f"; coherent answers {coherent.value:.2f}"
    low, high = interval(own)
    return MeasuredEffect(
        kind="defense" if attack else "attack",
        method=method.name,
        setting=method.settings,
        model=key[0],
        sweep=sweep,
        seeds=own.seeds,
        attack=attack,
        metric=grid.points[key].success_metric,
        value=own.value,
        low=low,
        high=high,
        beside=beside,
        conclusion=conclusion,
    )


def main() -> None:
    """Print one line per figure; with `--write`, also update the file that `ftsec show` reads."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweeps", nargs="+")
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    rows: list[MeasuredEffect] = []
    names = set()
    for file in given.sweeps:
        name = api.make_plan(file).spec.name
        names.add(name)
        grid = build_grid(api.open_results(api.results_folder(given.results, name)))
        rows += [*attacks(grid, name), *defenses(grid, name)]
    for row in rows:
        print(f"{row.method} {row.text}")
    if given.write:
        kept = [row for row in effects_of() if row.sweep not in names]
        FILE.write_text(text_of_effects([*kept, *rows]), encoding="utf-8")


if __name__ == "__main__":
    main()
