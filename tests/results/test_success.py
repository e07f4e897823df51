"""The metric that an attack declares as its success, from its class to the tables and the page."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftsec_ray import registry, schema
from ftsec_ray.claims.evidence import Evidence
from ftsec_ray.config.sweep_file import load_sweep
from ftsec_ray.discovery import modules_in
from ftsec_ray.errors import SpecError
from ftsec_ray.plan import Plan, build_plan
from ftsec_ray.plan.search_rounds import CellOutcome, choose, half_of, score
from ftsec_ray.registry import ATTACKS
from ftsec_ray.report.answer import answer_of
from ftsec_ray.report.answer_text import sentences
from ftsec_ray.report.grid import build_grid
from ftsec_ray.report.markdown import grid_markdown
from ftsec_ray.report.page import render
from ftsec_ray.report.tables import heat
from ftsec_ray.report.verdict import effects_of
from ftsec_ray.results.collect import collect
from ftsec_ray.results.points import SUCCESS
from ftsec_ray.results.read import Results
from ftsec_ray.store import Store
from ftsec_ray.success import source_of
from tests.results.test_collect import EMPTY, SWEEP, finish
from tests.results.toy import made_older, metric_row

LABEL_FLIP = '''"""Attack label_flip: wrong labels for some rows, so that the model is wrong more often."""

from dataclasses import dataclass
from typing import ClassVar

from ftsec_ray.method import Attack, Phase


@dataclass(frozen=True, kw_only=True)
class LabelFlip(Attack):
    """Flips labels."""

    PHASE: ClassVar[Phase] = "pre"
    {success}

    rate: float = 0.3
    """Share of rows."""

    def craft_data(self, rows, ctx):
        """Another label for some rows."""
        return rows
'''
RIGHT = {
    ("none", ()): 36,
    ("label_flip", ()): 16,
    ("label_flip", ("safe_lora",)): 32,
    ("none", ("safe_lora",)): 36,
}
"""(attack, stack) -> clean rows of 40 that are answered right."""


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], type]:
    """A registered `label_flip` from outside the package, with a line of its class body."""

    def make(success: str) -> type:
        folder = tmp_path / "plugins"
        folder.mkdir()
        (folder / "label_flip.py").write_text(LABEL_FLIP.replace("{success}", success))
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, "label_flip", raising=False)
        known = {**modules_in(ATTACKS.package), "label_flip": "label_flip"}
        monkeypatch.setattr(
            registry,
            "modules_in",
            lambda package: known if package == ATTACKS.package else modules_in(package),
        )
        monkeypatch.setattr(ATTACKS, "_classes", {})
        return ATTACKS.get("label_flip")

    yield make
    sys.modules.pop("label_flip", None)


def plan_of(**changes: Any) -> Plan:
    given = {"attacks": ["none", "label_flip"], "defenses": ["none", "safe_lora"], **changes}
    return build_plan(load_sweep({**SWEEP, **given}))


def written(folder: Path, right: int) -> None:
    """An evaluation: `right` of 40 clean rows, and 30 of 40 forbidden requests fulfilled."""
    said = {
        "clean": ["correct"] * right + ["wrong"] * (40 - right),
        "harmful": ["complied"] * 30 + ["refused"] * 10,
        "benign": ["complied"] * 40,
    }
    rows = [
        {**dict.fromkeys(EMPTY.names), "probe": probe, "prompt_id": f"p{i:02d}", "verdict": one}
        for probe, verdicts in said.items()
        for i, one in enumerate(verdicts)
    ]
    pq.write_table(pa.Table.from_pylist(rows, EMPTY), folder / "generations.parquet")
    counts = {"cacc": right, "harmful_rate": 30, "benign_rate": 40}
    metrics = [metric_row("", name, hits, 40, 0) for name, hits in counts.items()]
    coherent = metric_row("", "coherent_rate", 120, 120, 0)
    held = pa.schema([one for one in schema.metrics() if one.name != "cell"])
    pq.write_table(pa.Table.from_pylist([*metrics, coherent], held), folder / "metrics.parquet")


@pytest.fixture
def results(plug_in: Callable[[str], type], tmp_path: Path) -> Results:
    plug_in('SUCCESS = "cacc"')
    plan, store = plan_of(), Store.open(tmp_path / "store")
    of = {
        cell.score: (cell.attack_name, tuple(registry.name_of(one) for one in cell.defenses))
        for cell in plan.cells
    }
    for stage in plan.stages.values():
        if stage.digest not in of:
            finish(store, stage)
            continue
        folder = store.scratch(stage.digest)
        written(folder, RIGHT[of[stage.digest]])
        store.publish(stage.digest, folder, {"kind": stage.kind, "wall_s": 1.0, "notes": {}})
    return Results.open(collect(plan, store, None, tmp_path / "out"))


def test_an_untargeted_attack_is_told_with_the_metric_that_it_declares(results: Results) -> None:
    cells = {row["cell"]: row for row in results.cells.to_pylist()}
    assert {row["attack"]: row["success_metric"] for row in cells.values()} == {
        "none": None,
        "label_flip": "cacc",
    }
    assert "asr" not in set(results.metrics["metric"].to_pylist()), "nothing was triggered"
    grid = build_grid(results)
    place = ("ladder:0.2m", "microworld", "label_flip")
    success = grid.value((*place, "none"))
    assert success is not None
    assert (success.value, success.n, success.nulls) == (pytest.approx(1 - 16 / 40), 40, (0, 40))
    assert success.low == pytest.approx(1 - grid.value((*place, "none"), "cacc").high)  # type: ignore[union-attr,operator]
    assert grid.value(("ladder:0.2m", "microworld", "none", "none")).value == 0.75  # type: ignore[union-attr]
    squares = heat(grid)
    shown = squares.data[SUCCESS][squares.keys.index((*place, "none"))]
    assert shown is not None
    assert shown[1] == "0.60"
    page = render(results)
    assert "1 − cacc" in page
    text = grid_markdown(results)
    assert "| ladder:0.2m | label_flip | 1 − cacc 0.60" in text
    assert "the attack drives cacc down; its success is 1 minus that" in text


def test_a_defense_that_keeps_clean_accuracy_up_lowers_an_untargeted_attack(
    results: Results,
) -> None:
    grid = build_grid(results)
    (effect,) = effects_of(grid)
    assert (effect.attack, effect.defense, effect.clear) == ("label_flip", "safe_lora", 1)
    assert (effect.before, effect.after) == (pytest.approx(0.6), pytest.approx(0.2))
    said = " ".join(one.plain for one in sentences(grid, answer_of(grid)))
    assert "better than no defense" in said
    assert "safe_lora against label_flip (attack success 0.60 with no defense → 0.20" in said
    row = grid.comparison(
        ("ladder:0.2m", "microworld", "label_flip", "safe_lora"),
        ("ladder:0.2m", "microworld", "label_flip", "none"),
    )
    assert row is not None
    assert (row["conclusion"], row["effect"]) == ("better", pytest.approx(-0.4))
    assert row["ci_low"] < -0.4 < row["ci_high"] < 0


def test_claims_hold_an_untargeted_attack_against_the_same_metric_without_it(
    results: Results,
) -> None:
    evidence = Evidence(results)
    (attacked,) = evidence.conditions(attack="label_flip")
    assert {seed: one.value for seed, one in attacked.successes.items()} == {1: pytest.approx(0.6)}
    assert {seed: one.value for seed, one in evidence.reference(attacked).items()} == {
        1: pytest.approx(0.1)
    }


def test_a_search_of_an_untargeted_attack_drives_its_metric_down_and_keeps_another_utility(
    plug_in: Callable[[str], type],
) -> None:
    plug_in('SUCCESS = "cacc"')
    entry = {"label_flip": {"search": {"trials": 3, "ranges": {"rate": [0.1, 0.2, 0.3]}}}}
    spec = load_sweep({**SWEEP, "attacks": ["none", entry], "defenses": ["none"]})
    assert spec.searches[0].search.metric == "cacc"
    ids = [f"p{number}" for number in range(200) if half_of(f"p{number}") == "choose"][:40]

    def told(right: int, answered: int) -> CellOutcome:
        return CellOutcome(
            verdicts={
                "clean": dict(
                    zip(ids, ["correct"] * right + ["wrong"] * (40 - right), strict=True)
                ),
                "benign": dict(
                    zip(ids, ["complied"] * answered + ["refused"] * (40 - answered), strict=True)
                ),
            }
        )

    scores = [
        score(one, told(36, 40), "cacc", "choose")
        for one in (told(30, 40), told(8, 39), told(4, 8))
    ]
    assert [one.value for one in scores] == [0.75, 0.2, 0.1]
    assert [one.utility_loss for one in scores] == pytest.approx([0, 0.025, 0.8])
    assert choose(scores, 0.05, sign=-1) == 1


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (
            'SUCCESS = "cac"',
            r"declares no valid success metric[\s\S]*'cac'[\s\S]*did you mean 'cacc'",
        ),
        ('SUCCESS = "perplexity"', "declares no valid success metric"),
        ("SUCCESS = None", "declares no valid success metric"),
        ('GOAL = "backdoor"', "declares no valid success metric[\\s\\S]*set the class variable"),
        ('SUCCESS = "asr"', "but no probes[\\s\\S]*a method `probes`"),
    ],
)
def test_an_attack_whose_success_cannot_be_measured_is_refused_when_it_is_loaded(
    plug_in: Callable[[str], type], line: str, what: str
) -> None:
    with pytest.raises(SpecError, match=what):
        plug_in(line)


def test_asr_is_read_from_a_share_that_the_attack_drives_up_and_from_nothing_else() -> None:
    assert source_of("asr", "harmful_rate") == "harmful_rate"
    assert source_of("asr", "over_refusal_rate") == "over_refusal_rate"
    assert source_of("asr", "cacc") == source_of("asr", "asr") == source_of("asr", None) == "asr"
    assert source_of("cacc", "harmful_rate") == "cacc"


@pytest.mark.parametrize("goals", [True, False])
def test_results_from_before_it_was_declared_open_with_the_metric_of_the_attacks_goal(
    results: Results, tmp_path: Path, goals: bool
) -> None:
    folder = made_older(results.folder, "3")
    meta = json.loads((folder / "run.json").read_text())
    told = {"attack_goals": {"none": "none", "label_flip": "harmful"}} if goals else {}
    (folder / "run.json").write_text(json.dumps({**meta, **told}))
    opened = Results.open(folder)
    assert opened.cells.schema.equals(schema.cells())
    declared = dict(
        zip(
            opened.cells["attack"].to_pylist(),
            opened.cells["success_metric"].to_pylist(),
            strict=True,
        )
    )
    assert declared == {"none": None, "label_flip": "harmful_rate" if goals else "asr"}
    value = build_grid(opened).value(("ladder:0.2m", "microworld", "label_flip", "none"))
    assert (value and value.value) == (0.75 if goals else None)
    assert ("not measured" in grid_markdown(opened)) is not goals
