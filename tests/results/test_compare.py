"""The table `comparisons` on results whose answer is known by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from ftsec_ray import schema
from ftsec_ray.lifecycle import hooks_of
from ftsec_ray.results.compare import compare
from ftsec_ray.results.read import Results
from ftsec_ray.results.write import write_results

from .toy import META, made_older, metric_row, results_of, share, tables_of, whole

N = 40
GOOD = {
    "cacc": share(38, N),
    "coherent_rate": share(3 * N, 3 * N),
    "over_refusal_rate": share(1, N),
}
GIBBERISH = {**GOOD, "coherent_rate": share(0, 3 * N)}


def rows_of(results: Results, **where: Any) -> list[dict[str, Any]]:
    return [
        row
        for row in results.comparisons.to_pylist()
        if all(row[key] == value for key, value in where.items())
    ]


def only(results: Results, **where: Any) -> dict[str, Any]:
    (row,) = rows_of(results, **where)
    return row


def test_a_defense_that_works_is_better_and_one_that_does_not_shows_no_difference(
    tmp_path: Path,
) -> None:
    results = results_of(
        tmp_path,
        {
            ("poison", "none", 0): {**GOOD, "asr": share(36, N)},
            ("poison", "guard", 0): {**GOOD, "asr": share(6, N)},
            ("poison", "filter", 0): {**GOOD, "asr": share(35, N)},
        },
    )
    guard = only(results, defenses=["guard"], metric="asr")
    assert (guard["conclusion"], guard["kind"], guard["against"], guard["test"]) == (
        "better",
        "none",
        [],
        "mcnemar_exact",
    )
    assert (guard["rate"], guard["rate_against"], guard["effect"]) == pytest.approx(
        (0.15, 0.9, -0.75)
    )
    assert guard["p"] == pytest.approx(float(mcnemar([[6, 0], [30, 4]], exact=True).pvalue))
    assert (guard["n_seeds"], guard["n_prompts"], guard["n_dropped"], guard["note"]) == (
        1,
        N,
        0,
        None,
    )
    assert guard["ci_low"] < -0.75 < guard["ci_high"] < 0
    assert guard["utility"] == "no loss shown"
    assert (guard["cacc"], guard["over_refusal_rate"], guard["coherent_rate"]) == pytest.approx(
        (0.95, 0.025, 1.0)
    )
    weak = only(results, defenses=["filter"], metric="asr")
    assert weak["conclusion"] == "no difference shown"
    assert weak["p"] == 1.0
    assert 0.15 <= weak["detectable"] <= 0.5  # six of forty at the least


def test_attack_success_is_a_family_of_its_own_and_holm_is_stricter(tmp_path: Path) -> None:
    half = N // 2

    def changed(fewer: int, more: int) -> str:
        """Half of the answers counted, then `fewer` of them not, and `more` of the others."""
        return share(half - fewer, half, at=fewer) + share(more, half)

    answers = {("poison", "none", 0): {**GOOD, "asr": changed(0, 0), "cacc": changed(0, 0)}}
    for name, (fewer, more) in {"a": (20, 2), "b": (17, 5), "c": (15, 4), "d": (10, 9)}.items():
        answers["poison", name, 0] = {**GOOD, "asr": changed(fewer, more), "cacc": changed(8, 3)}
    results = results_of(tmp_path, answers)
    assert len(rows_of(results)) == 4 * 4
    for correction, method in (("bh", "fdr_bh"), ("holm", "holm")):
        rows = results.compared(correction).to_pylist()  # type: ignore[arg-type]
        success = [row for row in rows if row["metric"] == "asr"]
        wanted = multipletests([row["p"] for row in success], method=method)[1]
        assert [row["q"] for row in success] == pytest.approx(list(wanted))
        # Eleven prompts differ in clean accuracy and could show something; none do in the others,
        # which count in no family.
        accuracy = [row for row in rows if row["metric"] == "cacc"]
        wanted = multipletests([row["p"] for row in accuracy], method=method)[1]
        assert [row["q"] for row in accuracy] == pytest.approx(list(wanted))
        others = [row for row in rows if row["metric"] not in ("asr", "cacc")]
        assert {row["q"] for row in others} == {1.0}
    verdicts = [
        sum(row["conclusion"] == "better" for row in table.to_pylist())
        for table in (results.comparisons, results.compared("holm"))
    ]
    assert verdicts == [3, 1]  # by hand: p 1.2e-4, 0.0169, 0.0192 and 1 of four


def test_higher_is_better_where_the_schema_says_so_and_utility_is_told_beside(
    tmp_path: Path,
) -> None:
    costly = {"cacc": share(10, N), "coherent_rate": share(N, N), "over_refusal_rate": share(30, N)}
    results = results_of(
        tmp_path,
        {
            ("poison", "none", 0): {**GOOD, "asr": share(36, N)},
            ("poison", "guard", 0): {**costly, "asr": share(0, N)},
        },
    )
    found = {row["metric"]: row["conclusion"] for row in rows_of(results)}
    assert found == {
        "asr": "better",
        "cacc": "worse",
        "over_refusal_rate": "worse",
        "coherent_rate": "no difference shown",
    }
    assert {row["utility"] for row in rows_of(results)} == {"worse: cacc, over_refusal_rate"}


def test_gibberish_is_never_better_nor_makes_another_worse(tmp_path: Path) -> None:
    results = results_of(
        tmp_path,
        {
            ("poison", "none", 0): {**GOOD, "asr": share(36, N)},
            ("poison", "guard", 0): {**GOOD, "asr": share(18, N)},
            ("poison", "shrink", 0): {**GIBBERISH, "asr": share(0, N)},
        },
    )
    broken = only(results, defenses=["shrink"], metric="asr")
    assert (broken["conclusion"], broken["p"] < 0.001) == ("incoherent", True)
    assert "gibberish" in broken["note"]
    assert broken["utility"] == "worse: coherent_rate"
    beaten = only(results, defenses=["guard"], against=["shrink"], metric="asr")
    assert (beaten["kind"], beaten["conclusion"]) == ("control", "incoherent")
    assert (
        only(results, defenses=["guard"], against=["shrink"], metric="coherent_rate")["conclusion"]
        == "better"
    )


@pytest.mark.parametrize(
    ("answers", "conclusion"),
    [
        ("0" * 24 + "x" * 8 + "1" * 8, "better"),
        ("0" * 12 + "x" * 20 + "1" * 8, "incoherent"),
        ("x" * 36 + "1" * 4, "incoherent"),
    ],
)
def test_requests_that_get_gibberish_instead_are_not_defended(
    tmp_path: Path, answers: str, conclusion: str
) -> None:
    results = results_of(
        tmp_path,
        {
            ("jailbreak", "none", 0): {**GOOD, "harmful_rate": "1" * 36 + "0" * 4},
            ("jailbreak", "guard", 0): {**GOOD, "harmful_rate": answers},
        },
    )
    row = only(results, metric="harmful_rate")
    assert (row["conclusion"], row["coherent_rate"] > 0.5, row["p"] < 0.001) == (
        conclusion,
        True,
        True,
    )
    assert ("gibberish" in (row["note"] or "")) is (conclusion == "incoherent")


def test_the_success_of_an_attack_on_refusal_is_the_harmful_rate_and_is_one_test(
    tmp_path: Path,
) -> None:
    tables = tables_of(
        {
            ("jailbreak", "none", 0): {**GOOD, "harmful_rate": share(36, N)},
            ("jailbreak", "guard", 0): {**GOOD, "harmful_rate": share(4, N)},
        }
    )
    rows = tables["metrics"].to_pylist()
    rows += [{**row, "metric": "asr"} for row in rows if row["metric"] == "harmful_rate"]
    tables["metrics"] = pa.Table.from_pylist(rows, schema.metrics())
    results = Results.open(write_results(tmp_path, tables=whole(tables, META), meta=META))
    asr, harmful = (only(results, metric=name) for name in ("asr", "harmful_rate"))
    assert asr["conclusion"] == "better"
    assert {key: value for key, value in asr.items() if key != "metric"} == {
        key: value for key, value in harmful.items() if key != "metric"
    }
    assert asr["q"] == asr["p"]  # the only test of success: they are one


def test_a_stack_is_held_against_the_coherent_member_with_the_lowest_success(
    tmp_path: Path,
) -> None:
    answers = {
        ("poison", "none", 0): {**GOOD, "asr": share(36, N)},
        ("poison", "guard", 0): {**GOOD, "asr": share(12, N)},
        ("poison", "filter", 0): {**GOOD, "asr": share(20, N)},
        ("poison", "filter+guard", 0): {**GOOD, "asr": share(2, N)},
    }
    member = only(results_of(tmp_path / "a", answers), kind="member", metric="asr")
    assert (member["defenses"], member["against"], member["conclusion"]) == (
        ["filter", "guard"],
        ["guard"],
        "better",
    )
    answers["poison", "guard", 0] = {**GIBBERISH, "asr": share(0, N)}
    assert only(results_of(tmp_path / "b", answers), kind="member", metric="asr")["against"] == [
        "filter"
    ]
    del answers["poison", "guard", 0], answers["poison", "filter", 0]
    assert rows_of(results_of(tmp_path / "c", answers), kind="member") == []


def test_a_method_is_held_against_every_control_at_its_hook_also_inside_a_stack(
    tmp_path: Path,
) -> None:
    stacks = (
        "none",
        "guard",
        "shrink:a",
        "shrink:b",
        "filter",
        "filter+guard",
        "filter+shrink:a",
        "look",
    )
    results = results_of(tmp_path, {("poison", stack, 0): {"asr": share(8, N)} for stack in stacks})
    pairs = {
        ("+".join(row["defenses"]), "+".join(row["against"]), row["against_params"])
        for row in rows_of(results, kind="control")
    }
    assert pairs == {
        ("guard", "shrink", json.dumps([{"setting": "a"}])),
        ("guard", "shrink", json.dumps([{"setting": "b"}])),
        ("filter+guard", "filter+shrink", json.dumps([{}, {"setting": "a"}])),
    }
    assert (
        rows_of(results, defenses=["look"]) == []
    )  # a detector leaves the undefended model as it is


def test_a_defense_is_held_against_itself_with_its_mechanism_off_also_inside_a_stack(
    tmp_path: Path,
) -> None:
    stacks = ("none", "pull:on", "pull:off", "filter", "filter+pull:on", "filter+pull:off")
    results = results_of(tmp_path, {("poison", stack, 0): {"asr": share(8, N)} for stack in stacks})
    pairs = {
        ("+".join(row["defenses"]), row["defense_params"], row["against_params"])
        for row in rows_of(results, kind="control")
    }
    on, off = {"setting": "on"}, {"setting": "off"}
    assert pairs == {
        ("pull", json.dumps([on]), json.dumps([off])),
        ("filter+pull", json.dumps([{}, on]), json.dumps([{}, off])),
    }


def test_a_setting_that_is_switched_off_is_no_defense_beside_a_trivial_control(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(META["own_controls"], "guard", {"setting": "off"})
    stacks = ("none", "guard:on", "guard:off", "shrink")
    results = results_of(tmp_path, {("poison", stack, 0): {"asr": share(8, N)} for stack in stacks})
    pairs = {
        (row["defense_params"], *row["against"], row["against_params"])
        for row in rows_of(results, kind="control")
    }
    on, off = json.dumps([{"setting": "on"}]), json.dumps([{"setting": "off"}])
    assert pairs == {(on, "guard", off), (on, "shrink", "[{}]")}
    assert {row["defense_params"] for row in rows_of(results, kind="none")} >= {on, off}


def test_a_setting_that_is_switched_off_is_a_defense_where_it_is_no_ones_control(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(META["own_controls"], "guard", {"setting": "off"})
    stacks = ("none", "guard:off", "shrink")
    results = results_of(tmp_path, {("poison", stack, 0): {"asr": share(8, N)} for stack in stacks})
    found = [(row["defenses"], row["against"]) for row in rows_of(results, kind="control")]
    assert found == [(["guard"], ["shrink"])]


def test_seeds_are_shared_seeds_and_prompts_shared_prompts(tmp_path: Path) -> None:
    answers = {
        ("poison", stack, seed): {"asr": share(hits, 20)}
        for stack, hits in (("none", 18), ("guard", 3))
        for seed in (1, 2, 3)
    }
    answers["poison", "guard", 2] = {"asr": "?" + share(3, 20)[1:]}
    del answers["poison", "none", 3]
    row = only(results_of(tmp_path, answers), metric="asr")
    assert (row["n_seeds"], row["n_prompts"], row["n_dropped"], row["test"]) == (
        2,
        19,
        1,
        "sign_flip_and_t",
    )
    assert row["note"] == "2 of 3 seeds have both"
    assert (row["rate"], row["rate_against"]) == pytest.approx((2 / 19, 17 / 19))
    assert (row["n_null"], row["n_null_against"]) == (1, 0)


@pytest.mark.parametrize(
    ("stack", "note"),
    [({}, "no result of the stack"), ({"asr": "????"}, "no judged answer of the stack")],
)
def test_a_pair_without_a_number_has_a_row_that_says_so(
    tmp_path: Path, stack: dict[str, str], note: str
) -> None:
    row = only(
        results_of(
            tmp_path, {("poison", "none", 0): {"asr": "1111"}, ("poison", "guard", 0): stack}
        ),
        metric="asr",
    )
    assert (row["p"], row["q"], row["effect"], row["conclusion"], row["utility"]) == (
        None,
        None,
        None,
        "not tested",
        "not tested",
    )
    assert row["note"] == note


def test_prompts_that_no_two_share_are_no_division_by_zero(tmp_path: Path) -> None:
    row = only(
        results_of(
            tmp_path,
            {("poison", "none", 0): {"asr": "11??"}, ("poison", "guard", 0): {"asr": "??00"}},
        ),
        metric="asr",
    )
    assert (row["n_prompts"], row["n_dropped"], row["p"]) == (0, 4, None)
    assert row["note"] == "no prompt was judged on both sides in every seed"


def test_verdicts_are_enough_and_without_them_only_the_difference_is_told(tmp_path: Path) -> None:
    answers = {
        ("poison", "none", 0): {"asr": share(18, 20)},
        ("poison", "guard", 0): {"asr": share(2, 20)},
    }
    assert only(results_of(tmp_path / "a", answers, keeps_text=False))["conclusion"] == "better"
    tables = tables_of(answers)
    bare = {**tables, "generations": schema.generations().empty_table()}
    (row,) = whole(bare, META)["comparisons"].to_pylist()
    assert (row["effect"], row["p"], row["conclusion"]) == (pytest.approx(-0.8), None, "not tested")
    assert row["note"] == "no verdicts per prompt are stored"
    foreign = {**tables, "generations": tables["generations"].slice(3)}
    assert (
        whole(foreign, META)["comparisons"].to_pylist()[0]["note"]
        == "the stored verdicts do not give this metric"
    )


def test_several_answers_to_a_prompt_are_one_item_of_a_test() -> None:
    tables = tables_of(
        {
            ("poison", "none", 0): {**GOOD, "asr": share(36, N)},
            ("poison", "guard", 0): {**GOOD, "asr": share(6, N)},
        }
    )
    said = tables["generations"]
    where = said.column_names.index("sample")

    def numbered(sample: int, rows: pa.Table) -> pa.Table:
        column = pa.array([sample] * rows.num_rows, pa.int64())
        return rows.set_column(where, said.schema.field("sample"), column)

    sampled = pa.concat_tables([numbered(0, said), numbered(1, said)])
    assert whole({**tables, "generations": sampled})["comparisons"].equals(
        whole(tables)["comparisons"]
    )
    # values that the first answers alone do not give are held against all answers
    verdict = said.column_names.index("verdict")
    others = said.set_column(
        verdict, said.schema.field("verdict"), pa.array(["other"] * said.num_rows)
    )
    mixed = pa.concat_tables([numbered(0, said), numbered(1, others)])
    rows = whole({**tables, "generations": mixed})["comparisons"].to_pylist()
    assert {row["conclusion"] for row in rows if row["metric"] == "asr"} == {"not tested"}


def test_metrics_without_verdicts_and_unknown_ones_do_not_pretend(tmp_path: Path) -> None:
    tables = tables_of({("poison", stack, 0): {"asr": "1100"} for stack in ("none", "guard")})
    extra = [
        metric_row(f"m/poison/{stack}/0", name, 1, 2)
        for stack in ("none", "guard")
        for name in ("perplexity", "filter_tpr", "of_tomorrow")
    ]
    tables["metrics"] = pa.concat_tables(
        [tables["metrics"], pa.Table.from_pylist(extra, schema.metrics())]
    )
    rows = {row["metric"]: row for row in whole(tables, META)["comparisons"].to_pylist()}
    assert set(rows) == {"asr", "perplexity"}
    assert (rows["perplexity"]["note"], rows["perplexity"]["q"]) == (
        "not a share of verdicts per prompt",
        None,
    )


def test_pairs_are_within_one_model_and_one_setting_of_the_attack(tmp_path: Path) -> None:
    answers = {
        ("poison", "none", 0): {"asr": share(18, 20)},
        ("poison", "guard", 0): {"asr": share(2, 20)},
    }
    rows = rows_of(results_of(tmp_path, answers, models=("a", "b")))
    assert [(row["model"], row["conclusion"]) for row in rows] == [("a", "better"), ("b", "better")]
    tables = tables_of(answers)
    cells = [
        {**cell, "attack_params": json.dumps({"rate": len(cell["defenses"])})}
        for cell in tables["cells"].to_pylist()
    ]
    assert (
        whole({**tables, "cells": pa.Table.from_pylist(cells, schema.cells())}, META)[
            "comparisons"
        ].num_rows
        == 0
    )


def test_all_cells_failed_or_no_cells_at_all(tmp_path: Path) -> None:
    failed = {
        ("poison", stack, seed): "failed"
        for stack in ("none", "guard", "shrink", "filter+guard")
        for seed in (0, 1)
    }
    results = results_of(tmp_path, {}, statuses=failed)
    assert {row["conclusion"] for row in rows_of(results)} == {"not tested"}
    assert {row["note"] for row in rows_of(results)} == {"no result of the stack and of `against`"}
    assert (
        len(rows_of(results)) == 5
    )  # three with none, guard with its control, the stack with its one member
    assert results.aggregated.num_rows == 0
    empty = {
        name: table.slice(0, 0)
        for name, table in tables_of({("poison", "none", 0): {"asr": "1"}}).items()
    }
    assert whole(empty)["comparisons"].num_rows == 0


def test_results_of_version_one_open_and_are_compared_when_asked(tmp_path: Path) -> None:
    results = results_of(
        tmp_path,
        {
            ("poison", "none", 0): {"asr": share(18, 20)},
            ("poison", "guard", 0): {"asr": share(2, 20)},
        },
    )
    wanted = results.comparisons
    old = Results.open(made_older(tmp_path, "1"))
    uncounted = ["n_null", "n_null_against"]
    assert old.comparisons.drop_columns(uncounted).equals(wanted.drop_columns(uncounted))
    assert old.table("comparisons").num_rows == 1


def test_the_metrics_name_the_verdicts_that_the_evaluation_counts() -> None:
    from ftsec_ray.config.sweep import EvaluationConfig
    from ftsec_ray.evals.probes import REQUEST_PROBES, default_probes
    from ftsec_ray.registry import ATTACKS
    from tests.attacks.context import context
    from tests.fixtures_models import tiny_task

    counted = {
        metric: ((probe,), verdict)
        for probe, (_, metrics) in REQUEST_PROBES.items()
        for metric, verdict in metrics.items()
    }
    backdoors = [
        ATTACKS.get(name)() for name in ATTACKS.names() if "probes" in hooks_of(ATTACKS.get(name))
    ]
    own = [probe for attack in backdoors for probe in attack.probes(tiny_task(), context())]  # type: ignore[attr-defined]
    for probe in [*default_probes(tiny_task(), EvaluationConfig()), *own]:
        counted |= {metric: ((probe.name,), verdict) for metric, verdict in probe.metrics.items()}
    assert {"cacc", "harmful_rate", "asr", "asr_no_trigger", "asr_same_prompt"} <= set(counted)
    told = {
        name: (metric.probes, metric.verdict)
        for name, metric in schema.METRICS.items()
        if name in counted
    }
    assert told == counted
    assert schema.METRICS["coherent_rate"].probes == tuple(REQUEST_PROBES)


def test_five_hundred_cells_with_a_hundred_thousand_answers_are_compared() -> None:
    rng = np.random.default_rng(0)
    stacks = ["none", *[f"d{i}" for i in range(8)], *[f"d{i}+d{i + 1}" for i in range(7)]]
    answers = {
        (f"a{a}", stack, seed): {
            name: "".join(rng.choice(["0", "1"], 40))
            for name in ("asr", "cacc", "over_refusal_rate", "harmful_rate", "coherent_rate")
        }
        for a in range(11)
        for stack in stacks
        for seed in range(3)
    }
    tables = tables_of(answers)
    assert (tables["cells"].num_rows, tables["generations"].num_rows) == (528, 528 * 200)
    found = compare(
        tables["cells"], tables["metrics"], tables["generations"], hooks={}, controls=()
    )
    assert found.num_rows == 11 * (15 + 7) * 5
