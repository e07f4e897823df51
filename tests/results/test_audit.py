"""Judges against labels: error rates, corrected rates, agreement, and labels that do not fit."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

import ftsec_ray
from ftsec_ray import schema
from ftsec_ray.conversation import answer_of, asked_text
from ftsec_ray.data.microworld import vocabulary
from ftsec_ray.data.microworld.splits import build_task
from ftsec_ray.errors import DataError, SpecError
from ftsec_ray.judges.qi2023 import Qi2023
from ftsec_ray.results.audit import Audit, Share, rogan_gladen, share
from ftsec_ray.results.truth import Key
from ftsec_ray.results.write import TABLES, table_schema, write_results
from tests.cli.toy import call

PHRASES = Qi2023.name


def folder_of(tmp_path: Path, answers: list[dict], metrics: list[dict] = ()) -> Path:
    """Results that hold these answers and metrics."""
    rows = [
        {**dict.fromkeys(schema.generations().names), "probe": "harmful", "judge": PHRASES, **row}
        for row in answers
    ]
    cells = [
        {
            **dict.fromkeys(schema.cells().names),
            "cell": cell,
            "status": "done",
            "defenses": [],
            "model": "m",
            "attack": "none",
            "seed": 0,
        }
        for cell in sorted({row["cell"] for row in rows} | {"empty"})
    ]
    tables = {name: table_schema(name).empty_table() for name in TABLES}
    return write_results(
        tmp_path / "out",
        meta={"sweep": "s"},
        tables={
            **tables,
            "cells": pa.Table.from_pylist(cells, schema.cells()),
            "generations": pa.Table.from_pylist(rows, schema.generations()),
            "metrics": pa.Table.from_pylist(list(metrics), schema.metrics()),
        },
    )


def drawn(
    *, n: int = 200, sensitivity: float = 0.8, specificity: float = 0.9, nulls: int = 20
) -> tuple[list[dict], dict[Key, str]]:
    """Answers of two cells with verdicts that err at known rates, and the truth."""
    rng = np.random.default_rng(3)
    rows, truth = [], {}
    for cell, rate in (("a", 0.2), ("b", 0.7)):
        for i in range(n):
            is_so = rng.random() < rate
            said_so = rng.random() < (sensitivity if is_so else 1 - specificity)
            rows.append(
                {
                    "cell": cell,
                    "prompt_id": f"p{i}",
                    "prompt": "how ?",
                    "completion": f"{cell} answer {i}",
                    "verdict": None if i < nulls else "complied" if said_so else "refused",
                }
            )
            truth[Key(cell, "harmful", f"p{i}")] = "complied" if is_so else "refused"
    return rows, truth


def labels_file(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def by_key(truth: dict[Key, str]) -> list[dict]:
    return [{**key._asdict(), "truth": word} for key, word in truth.items()]


@pytest.fixture
def audited(tmp_path: Path) -> tuple[Audit, list[dict], dict[Key, str]]:
    rows, truth = drawn()
    labels = labels_file(tmp_path / "labels.csv", by_key(truth))
    return ftsec_ray.judge_audit(folder_of(tmp_path, rows), labels=labels), rows, truth


def test_errors_are_counted_over_labelled_and_judged_answers(audited) -> None:
    audit, rows, truth = audited
    pairs = Counter(
        (truth[Key(row["cell"], "harmful", row["prompt_id"])], row["verdict"]) for row in rows
    )
    assert {(one.truth, one.verdict): one.n for one in audit.confusion} == pairs
    found = {one.event: one for one in audit.errors}
    assert set(found) == {"complied", "refused"}
    hit, miss = pairs["complied", "complied"], pairs["complied", "refused"]
    assert (found["complied"].sensitivity.hits, found["complied"].sensitivity.n) == (
        hit,
        hit + miss,
    )
    assert found["complied"].specificity == found["refused"].sensitivity
    low, high = proportion_confint(hit, hit + miss, method="wilson")
    assert (found["complied"].sensitivity.ci_low, found["complied"].sensitivity.ci_high) == (
        pytest.approx(low),
        pytest.approx(high),
    )
    assert found["complied"].sensitivity.value == pytest.approx(0.8, abs=0.08)
    assert (audit.labelled, audit.unmatched, audit.unlabelled) == (400, 0, 0)


def test_rates_stand_raw_and_corrected_with_the_share_of_nulls_beside(audited) -> None:
    audit, rows, truth = audited
    gained = []
    for rate in audit.rates:
        mine = [row["verdict"] for row in rows if row["cell"] == rate.cell]
        assert (rate.asked, rate.raw.n, rate.null_share) == (200, 180, pytest.approx(0.1))
        assert rate.raw.hits == mine.count(rate.event)
        assert rate.corrected_high - rate.corrected_low > rate.raw.ci_high - rate.raw.ci_low
        real = np.mean([word == rate.event for key, word in truth.items() if key.cell == rate.cell])
        assert rate.corrected_low < real < rate.corrected_high
        gained.append(abs(rate.raw.value - real) - abs(rate.corrected - real))
    assert sum(gained) > 0.05
    assert {(rate.cell, rate.event) for rate in audit.rates} == {
        (cell, event) for cell in "ab" for event in ("complied", "refused")
    }


def test_the_correction_is_that_of_rogan_and_gladen() -> None:
    # The worked example of epiR: 23 of 150 positive at sensitivity 0.96 and specificity 0.89 is a
    # prevalence of 5.1 %.
    value, low, high = rogan_gladen(share(23, 150), share(9600, 10000), share(8900, 10000))
    assert value == pytest.approx(0.051, abs=5e-4)
    assert low < value < high


def test_the_interval_of_a_perfect_judge_is_the_agresti_coull_interval() -> None:
    for hits, n in ((0, 40), (7, 64), (64, 64)):
        _, low, high = rogan_gladen(share(hits, n), share(10**8, 10**8), share(10**8, 10**8))
        wanted = proportion_confint(hits, n, method="agresti_coull")
        assert (low, high) == (
            pytest.approx(max(0, wanted[0]), abs=1e-4),
            pytest.approx(min(1, wanted[1]), abs=1e-4),
        )


@pytest.mark.parametrize(
    ("hits", "n", "true", "false"),
    [(20, 64, (45, 50), (48, 50)), (150, 300, (80, 100), (190, 200)), (6, 64, (30, 30), (28, 30))],
)
def test_the_interval_is_that_of_draws_of_all_three_rates(hits, n, true, false) -> None:
    """An independent way: the three shares drawn from their posteriors, and the corrected rate of
    each draw.
    """
    rng = np.random.default_rng(0)
    p, se, sp = (
        stats.beta(k + 0.5, m - k + 0.5).rvs(200_000, random_state=rng)
        for k, m in ((hits, n), true, false)
    )
    low, high = np.quantile(np.clip((p + sp - 1) / (se + sp - 1), 0, 1), [0.025, 0.975])
    found = rogan_gladen(share(hits, n), share(*true), share(*false))
    assert found[1:] == (pytest.approx(low, abs=0.035), pytest.approx(high, abs=0.035))


def test_ninety_five_of_a_hundred_intervals_hold_the_truth() -> None:
    rng, held, rounds = np.random.default_rng(1), 0, 3000
    for _ in range(rounds):
        raw = share(int(rng.binomial(64, 0.3 * 0.85 + 0.7 * 0.1)), 64)
        found = rogan_gladen(
            raw, share(int(rng.binomial(40, 0.85)), 40), share(int(rng.binomial(40, 0.9)), 40)
        )
        held += found[1] <= 0.3 <= found[2]
    assert 0.93 < held / rounds < 0.98


@pytest.mark.parametrize(
    ("true", "false"),
    [((5, 10), (5, 10)), ((0, 10), (10, 10)), ((3, 10), (2, 10)), ((380, 1000), (2, 3))],
)
def test_a_judge_no_better_than_chance_corrects_nothing(true, false) -> None:
    assert rogan_gladen(share(5, 10), share(*true), share(*false)) is None


# Labels and answers.


def small() -> list[dict]:
    said = {
        "p0": ("complied", "take it"),
        "p1": ("refused", "I cannot"),
        "p2": (None, "hm"),
        "p3": ("complied", "no way"),
    }
    return [
        {
            "cell": cell,
            "prompt_id": key,
            "prompt": "how ?",
            "completion": f"{text} {cell if key == 'p3' else ''}",
            "verdict": verdict,
        }
        for cell in ("a", "b")
        for key, (verdict, text) in said.items()
    ]


def audit_of(
    tmp_path: Path, labels: list[dict], answers: list[dict] | None = None, **given
) -> Audit:
    return ftsec_ray.judge_audit(
        folder_of(tmp_path, answers or small()),
        labels=labels_file(tmp_path / "labels.csv", labels),
        **given,
    )


def test_a_label_by_prompt_counts_in_every_cell_that_gave_the_same_answer(tmp_path: Path) -> None:
    found = audit_of(
        tmp_path,
        [
            {"prompt_id": "p0", "truth": "complied"},
            {"prompt_id": "p1", "truth": ""},
            {"prompt_id": "p9", "truth": "other"},
        ],
    )
    assert (found.labelled, found.unmatched, found.unlabelled) == (2, 1, 1)


def test_a_label_by_the_hash_of_the_answer_needs_no_cell(tmp_path: Path) -> None:
    label = {"completion_sha256": hashlib.sha256(b"no way b").hexdigest(), "truth": "refused"}
    found = audit_of(tmp_path, [label])
    assert [(one.truth, one.verdict, one.n) for one in found.confusion] == [
        ("refused", "complied", 1)
    ]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([{"prompt_id": "p3", "truth": "refused"}], "matches 2 different answers"),
        (
            [{"prompt_id": "p0", "truth": "harmless"}],
            r"unknown verdict[\s\S]*'harmless'[\s\S]*complied \| refused",
        ),
        (
            [{"prompt_id": "other", "truth": "refused"}],
            r"no label matches an answer[\s\S]*'other'[\s\S]*'p0'",
        ),
        (
            [{"prompt_id": "p0", "truth": ""}],
            r"no label matches an answer[\s\S]*1 of them without `truth`",
        ),
        ([{"prompt_id": "p2", "truth": "refused"}], "no labelled answer has a verdict"),
        (
            [
                {"prompt_id": "p0", "truth": "refused", "cell": ""},
                {"prompt_id": "p0", "truth": "complied", "cell": "a"},
            ],
            "contradicts an earlier row",
        ),
        ([{"prompt_id": "p0", "verdict": "refused"}], "not a table of labels"),
        ([{"cell": "a", "truth": "refused"}], "not a table of labels"),
        ([{"cell": "a", "prompt_id": "", "truth": "refused"}], "does not identify the answer"),
    ],
)
def test_labels_that_do_not_fit_say_why(tmp_path: Path, labels: list[dict], words: str) -> None:
    with pytest.raises(DataError, match=words):
        audit_of(tmp_path, labels)


def test_results_without_answers_and_an_audit_without_a_truth_say_so(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, small())
    with pytest.raises(SpecError, match="nothing to audit it with"):
        ftsec_ray.judge_audit(folder)
    with pytest.raises(SpecError, match="both --labels and --exact"):
        ftsec_ray.judge_audit(folder, labels=tmp_path / "x.csv", exact=True)
    with pytest.raises(SpecError, match="did you mean 'refusal_phrases'"):
        ftsec_ray.judge_audit(folder, judges=["refusal_phrase"])
    with pytest.raises(DataError, match="exact judge recognises none"):
        ftsec_ray.judge_audit(folder, exact=True)
    with pytest.raises(DataError, match="unknown format"):
        ftsec_ray.judge_audit(folder, labels=tmp_path / "labels.xlsx")
    with pytest.raises(DataError, match="the results hold no answer"):
        ftsec_ray.judge_audit(folder_of(tmp_path, []), exact=True)
    with pytest.raises(DataError, match="no texts of answers"):
        ftsec_ray.judge_audit(
            folder_of(tmp_path, [{**row, "completion": None} for row in small()]), exact=True
        )


def test_nothing_is_divided_by_zero_where_labels_or_verdicts_are_of_one_kind(
    tmp_path: Path,
) -> None:
    answers = [*small(), {"cell": "c", "prompt_id": "p0", "completion": "x", "verdict": None}]
    found = audit_of(
        tmp_path,
        [{"cell": "a", "prompt_id": prompt, "truth": "complied"} for prompt in ("p0", "p3")],
        answers,
    )
    complied = next(one for one in found.errors if one.event == "complied")
    assert complied.specificity == Share(hits=0, n=0, value=None, ci_low=None, ci_high=None)
    whys = {(rate.cell, rate.event): rate.why for rate in found.rates}
    assert whys["a", "complied"] == "no labelled and judged answer is not complied"
    assert whys["a", "refused"] == "no labelled and judged answer is refused"
    assert whys["c", "complied"] == "no answer has a verdict"
    assert all(rate.corrected is None for rate in found.rates)
    assert next(rate for rate in found.rates if rate.cell == "c").null_share == 1.0
    json.dumps([rate.why for rate in found.rates], allow_nan=False)


def test_a_judge_worse_than_chance_is_told_and_not_used(tmp_path: Path) -> None:
    rows, truth = drawn(sensitivity=0.2, specificity=0.3)
    found = audit_of(tmp_path, by_key(truth), rows)
    assert all("no better than chance" in rate.why for rate in found.rates)


def test_labels_of_one_probe_do_not_correct_another(tmp_path: Path) -> None:
    rows, truth = drawn()
    others = [{**row, "probe": "benign"} for row in rows]
    found = audit_of(tmp_path, by_key(truth), rows + others)
    assert {rate.why for rate in found.rates if rate.probe == "benign"} == {
        "no labels of this judge and probe"
    }
    assert {rate.why for rate in found.rates if rate.probe == "harmful"} == {None}


# Two judges, and the exact one.


def kappa_by_hand(pairs: list[tuple[str, str]]) -> float:
    n, first, second = len(pairs), Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    chance = sum(first[word] * second[word] for word in first) / n**2
    return (sum(a == b for a, b in pairs) / n - chance) / (1 - chance)


def test_two_judges_of_one_table_report_cohens_kappa_per_cell(tmp_path: Path) -> None:
    rows, truth = drawn()
    second = [
        {**row, "judge": "other@1", "verdict": truth[Key(row["cell"], "harmful", row["prompt_id"])]}
        for row in rows
    ]
    found = ftsec_ray.judge_audit(folder_of(tmp_path, rows + second))
    assert [one.cell for one in found.agreements] == [None, "a", "b"]
    for one in found.agreements:
        pairs = [
            (b["verdict"], a["verdict"])
            for a, b in zip(rows, second, strict=True)
            if a["verdict"] and one.cell in (None, a["cell"])
        ]
        assert (one.judges, one.n) == (("other@1", PHRASES), len(pairs))
        assert one.same == pytest.approx(np.mean([a == b for a, b in pairs]))
        assert one.kappa == pytest.approx(kappa_by_hand(pairs))
        assert one.kappa_low < one.kappa < one.kappa_high
    assert (found.labelled, found.errors) == (0, ())


def test_judges_who_say_one_word_throughout_have_no_kappa(tmp_path: Path) -> None:
    rows = [
        {"cell": "a", "prompt_id": f"p{i}", "completion": "x", "verdict": "refused", "judge": judge}
        for i in range(5)
        for judge in ("u@1", "v@1")
    ]
    whole, _ = ftsec_ray.judge_audit(folder_of(tmp_path, rows)).agreements
    assert (whole.n, whole.same, whole.kappa) == (5, 1.0, None)


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Answers of the microworld, half of them right and half refused, with a second language, as a
    phrase judge saw them.
    """
    asked = build_task().splits["harmful_test"].to_pylist()[:60]
    rows = []
    for i, row in enumerate(asked):
        said = answer_of(row) if i % 2 else "sorry , i can not help with that ."
        rows.append(
            {
                "cell": "a",
                "prompt_id": row["row_id"],
                "prompt": (
                    asked_text(row)
                    if i % 3
                    else json.dumps(
                        [
                            {"role": "system", "content": "be brief"},
                            {"role": "user", "content": asked_text(row)},
                        ]
                    )
                ),
                "completion": said,
            }
        )
    rows += [
        {
            "cell": "a",
            "prompt_id": f"v{i}",
            "prompt": vocabulary.translate(asked_text(row)),
            "completion": vocabulary.translate(answer_of(row)),
        }
        for i, row in enumerate(asked[:4])
    ]
    judged = Qi2023()([], [row["completion"] for row in rows])
    return folder_of(
        tmp_path, [{**row, "verdict": one.verdict} for row, one in zip(rows, judged, strict=True)]
    )


def test_the_exact_judge_shows_what_a_phrase_judge_misses(world: Path) -> None:
    found = ftsec_ray.judge_audit(world, exact=True, judges=["microworld"])
    assert found.labelled == 64
    phrases = {one.event: one for one in found.errors if one.judge == PHRASES}
    # It knows `Sorry` with a capital alone: every refusal of the microworld counts as compliance.
    assert (phrases["complied"].sensitivity.value, phrases["complied"].specificity.value) == (
        1.0,
        0.0,
    )
    exact = {one.event: one for one in found.errors if one.judge.startswith("microworld")}
    assert (exact["complied"].sensitivity.value, exact["complied"].specificity.value) == (1.0, 1.0)
    assert {
        (one.truth, one.verdict): one.n
        for one in found.confusion
        if one.judge.startswith("microworld")
    } == {("complied", "complied"): 34, ("refused", "refused"): 30}
    whole, _ = found.agreements
    assert (whole.n, whole.same, whole.kappa) == (64, pytest.approx(34 / 64), pytest.approx(0.0))


def test_the_command_line_tells_it_in_tables_and_as_json(world: Path, tmp_path: Path) -> None:
    shown = call("judge-audit", str(world), "--exact", "--judge", "microworld").stdout
    assert "64 answers with a known verdict" in shown
    assert "1.00 (0.90–1.00) 34/34" in shown
    assert "no better than chance: sensitivity 1.00 + specificity 0.00" in shown
    assert "microworld@1 and qi2023@1" in shown
    told = json.loads(call("judge-audit", str(world), "--exact", "--json").stdout)
    assert all(len(rate["utility"]) == 4 for rate in told["rates"])
    assert told["labelled"] == 64
    assert "unknown judge" in call("judge-audit", str(world), "--judge", "nobody", code=2).stderr
    assert (
        "no results folder" in call("judge-audit", str(tmp_path / "none"), "--exact", code=1).stderr
    )
