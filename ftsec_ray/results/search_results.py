"""Attack searches between the store, the plan and the tables: what trials measured, and one row per
search that summarises them.

Trials are rows of `cells`, `metrics` and `generations`, marked by `search_trial`. No aggregate,
comparison or figure includes them: the tables of opened results leave them out unless asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ftsec_ray import schema
from ftsec_ray.config.sweep import AttackSearch
from ftsec_ray.identity import canonical
from ftsec_ray.measured import Count, Measured, pooled
from ftsec_ray.plan.search_rounds import (
    CellOutcome,
    OutcomeLookup,
    PlannedSearch,
    half_of,
    is_within,
    rate,
    score,
)
from ftsec_ray.plan.stage import Cell
from ftsec_ray.registry import name_of
from ftsec_ray.store import DamagedArtifact

if TYPE_CHECKING:
    import pyarrow as pa

    from ftsec_ray.results.read import Results
    from ftsec_ray.store import Store

Row = dict[str, Any]
_COLUMNS = ("probe", "prompt_id", "verdict")


def told_of(generations: pa.Table) -> CellOutcome:
    """The verdicts of one evaluation."""
    verdicts: dict[str, dict[str, str | None]] = {}
    for probe, prompt, verdict in zip(
        *(generations[name].to_pylist() for name in _COLUMNS), strict=True
    ):
        verdicts.setdefault(probe, {})[prompt] = verdict
    return CellOutcome(verdicts=verdicts)


def look_at_store(store: Store) -> OutcomeLookup:
    """The current outcomes of cells in a store."""
    done, failures = store.done(), set(store.failures())

    def look(cell: Cell) -> CellOutcome | None:
        import pyarrow.parquet as pq

        if cell.score in done:
            try:
                path = store.fetch(cell.score) / "generations.parquet"
            except DamagedArtifact:  # missing: the stage runs again
                return None
            return told_of(pq.ParquetFile(path).read(columns=list(_COLUMNS), use_threads=False))
        return (
            CellOutcome(failed=True)
            if any(stage in failures and stage not in done for stage in cell.stages)
            else None
        )

    return look


def look_at_results(results: Results) -> OutcomeLookup:
    """The outcomes of cells in the tables of a run."""
    statuses = dict(
        zip(
            *(results.table("cells", trials=True)[name].to_pylist() for name in ("cell", "status")),
            strict=True,
        )
    )
    answers = results.table("generations", trials=True).select(["cell", *_COLUMNS])
    verdicts: dict[str, dict[str, dict[str, str | None]]] = {}
    for cell, probe, prompt, verdict in zip(
        *(answers[name].to_pylist() for name in answers.column_names), strict=True
    ):
        verdicts.setdefault(cell, {}).setdefault(probe, {})[prompt] = verdict

    def look(cell: Cell) -> CellOutcome | None:
        if cell.digest in verdicts:
            return CellOutcome(verdicts=verdicts[cell.digest])
        return {"failed": CellOutcome(failed=True), "done": CellOutcome()}.get(
            statuses.get(cell.digest, "")
        )

    return look


def without_trials(tables: Mapping[str, pa.Table]) -> dict[str, pa.Table]:
    """Tables without the trials of searches, as the grid uses them."""
    import pyarrow.compute as pc

    cells = tables["cells"]
    if cells["search_trial"].null_count == cells.num_rows:
        return dict(tables)
    trials = cells.filter(pc.is_valid(cells["search_trial"]))["cell"].combine_chunks()
    return {
        name: (
            table.filter(pc.invert(pc.is_in(table["cell"], trials)))
            if "cell" in table.column_names
            else table
        )
        for name, table in tables.items()
    }


def is_chosen(cell: Cell) -> bool:
    """Whether a cell is the chosen setting of a search; all tables hold only its reporting half."""
    return cell.searched is not None and cell.searched.trial is None


def is_chosen_row(row: Mapping[str, Any]) -> bool:
    """`is_chosen` for a row of the table `cells`."""
    return row["search"] is not None and row["search_trial"] is None


def reported(generations: pa.Table) -> pa.Table:
    """The answers to the prompts of the reporting half."""
    return generations.filter(
        [half_of(prompt) == "report" for prompt in generations["prompt_id"].to_pylist()]
    )


def reported_rates(metrics: Iterable[str], generations: pa.Table) -> Iterator[Row]:
    """Those of the metrics that are shares of verdicts, on the reporting half."""
    outcome = told_of(generations)
    for name in metrics:
        if name in schema.METRICS and schema.METRICS[name].probes:
            yield {"metric": name, **_estimate(rate(outcome, name, "report"))}


def attack_params(cell: Cell) -> str:
    """The parameters of a cell's attack in the tables: all parameters of a trial; for a chosen
    setting, the search that all stacks share.
    """
    if cell.searched is None:
        return canonical(cell.attack)
    if cell.searched.trial is not None:
        return canonical({**_plain(cell.attack), "training": _plain(cell.searched.training)})
    return _sought(cell.searched.entry)


def _sought(entry: AttackSearch) -> str:
    """The parameters of a fixed attack, with the search added."""
    return canonical({**_plain(entry.attack), "search": _plain(entry.search)})


def _plain(value: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(canonical(value))
    return found


def search_row(search: PlannedSearch, look: Callable[[Cell], CellOutcome | None]) -> Row:
    """A search at one place of the grid as a row of `searches`."""
    spec, first, chosen = search.entry.search, search.references[0], search.chosen
    statuses = [trial.status for trial in search.trials]
    within = sum(
        trial.score is not None and is_within(trial.score, spec.max_utility_loss)
        for trial in search.trials
    )
    setting = chosen.cell.searched if chosen is not None and chosen.cell is not None else None
    status, note = _status(search)
    return {
        "search": search.key,
        "model": first.model.name,
        "task": first.task.name,
        "attack": f"searched {name_of(search.entry.attack)}",
        "attack_params": _sought(search.entry),
        "defenses": [name_of(defense) for defense in first.defenses],
        "defense_params": canonical(list(first.defenses)),
        "status": status,
        "metric": search.metric,
        "max_utility_loss": spec.max_utility_loss,
        "trials": spec.trials,
        "n_done": statuses.count("done"),
        "n_failed": statuses.count("failed"),
        "n_within": within,
        "search_seed": spec.seed,
        "sampler_seed": search.sampler_seed,
        "trial_seed": first.seed,
        "trial": None if chosen is None else chosen.number,
        "params": None if chosen is None or chosen.cell is None else canonical(chosen.cell.attack),
        "training": None if setting is None else canonical(setting.training),
        **_side("", search, search.finals, look),
        **_side("fixed_", search, search.fixed, look),
        "n_planned": len(search.references),
        "note": note,
    }


def _status(search: PlannedSearch) -> tuple[str, str | None]:
    """How a search ended, and why it chose nothing."""
    if search.chosen is not None:
        return "chosen", None
    if search.is_open:
        return (
            "open",
            (
                f"{search.left} trials not proposed yet,"
                f" {sum(trial.outcome is None for trial in search.trials)} not measured yet"
            ),
        )
    known = [
        trial.score
        for trial in search.trials
        if trial.score is not None and trial.score.value is not None
    ]
    losses = [
        known_score.utility_loss for known_score in known if known_score.utility_loss is not None
    ]
    if losses:
        return "no trial within the bound", f"the smallest loss of a trial is {min(losses):.3f}" + (
            "; the trials within the bound answer gibberish"
            if min(losses) <= search.entry.search.max_utility_loss
            else ""
        )
    if known:
        return "nothing measured", "clean accuracy was not measured with and without the attack"
    return "nothing measured", "no trial has a judged prompt of the metric on the choosing half"


def _side(
    prefix: str,
    search: PlannedSearch,
    cells: Sequence[Cell],
    look: Callable[[Cell], CellOutcome | None],
) -> Row:
    """One attacker's metrics: in the trials' seed on the choosing half of the prompts, over all
    seeds on the reporting half.
    """
    outcomes = [look(cell) for cell in cells]
    references = [look(cell) for cell in search.references]
    chose = score(outcomes[0] if outcomes else None, references[0], search.metric, "choose")
    scores = [
        score(outcome, reference, search.metric, "report")
        for outcome, reference in zip(outcomes, references, strict=False)
    ]
    losses = [
        seed_score.utility_loss for seed_score in scores if seed_score.utility_loss is not None
    ]
    counts = [rate(outcome, search.metric, "report") for outcome in outcomes]
    runs = [
        Measured(value=count.value, n=count.n, n_null=count.n_null, prompts=count.interval)
        for count in counts
        if count.value is not None
    ]
    whole = pooled(runs, is_share=True) if runs else None

    def mean(metric: str) -> float | None:
        """Mean of a metric over those seeds that have it, on the reporting half."""
        known = [
            share
            for outcome in outcomes
            if (share := rate(outcome, metric, "report").value) is not None
        ]
        return sum(known) / len(known) if known else None

    return {
        f"{prefix}choose_value": chose.value,
        f"{prefix}choose_n": rate(outcomes[0], search.metric, "choose").n if outcomes else None,
        f"{prefix}choose_utility_loss": chose.utility_loss,
        f"{prefix}report_value": whole.value if whole else None,
        f"{prefix}report_low": whole.low if whole else None,
        f"{prefix}report_high": whole.high if whole else None,
        f"{prefix}report_n": whole.n if whole else None,
        f"{prefix}report_utility_loss": sum(losses) / len(losses) if losses else None,
        f"{prefix}report_over_refusal_rate": mean("over_refusal_rate"),
        f"{prefix}report_coherent_rate": mean("coherent_rate"),
        f"{prefix}report_n_null": whole.n_null if whole else None,
        f"{prefix}n_seeds": len(runs),
    }


def _estimate(count: Count) -> Row:
    low, high = count.interval or (None, None)
    ends = {"ci_low": low, "ci_high": high}
    return {"value": count.value, "n": count.n, "n_null": count.n_null, **ends}
