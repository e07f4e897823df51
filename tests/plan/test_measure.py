"""Cells that are measured before the user's fine-tune, and beside them those after it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

import ftsec_ray
from ftsec_ray.errors import SpecError
from ftsec_ray.plan.build import build_plan
from ftsec_ray.registry import name_of
from ftsec_ray.results.stage_warnings import lines_of, warnings_of

MODEL = "ladder:0.2m"


def sweep(**more: Any) -> dict[str, Any]:
    return {
        "name": "moments",
        "models": [MODEL],
        "task": "microworld",
        "attacks": ["none"],
        "defenses": ["none"],
        "measure": ["before", "after"],
        **more,
    }


def test_without_the_key_nothing_changes():
    plain = sweep()
    del plain["measure"]
    assert (
        build_plan(ftsec_ray.load(plain)).digest
        == build_plan(ftsec_ray.load({**plain, "measure": "after"})).digest
    )


def test_a_model_before_its_fine_tune_is_a_model_of_its_own_without_the_stages_of_the_tune():
    plan = build_plan(ftsec_ray.load(sweep(defenses=["none", "vaccine"])))
    kinds = {
        (cell.model.name, len(cell.defenses)): Counter(step.kind for step in cell.steps)
        for cell in plan.cells
    }
    assert kinds[f"{MODEL}:before", 0] == Counter(["generate", "score"])
    assert kinds[f"{MODEL}:before", 1] == Counter(["prepare", "generate", "score"])
    assert kinds[MODEL, 1] == Counter(["prepare", "finetune", "generate", "score"])
    before, after = (
        next(c for c in plan.cells if c.model.measured == moment and c.defenses)
        for moment in ("before", "after")
    )
    assert before.of_kind("prepare")[0].digest == after.of_kind("prepare")[0].digest
    assert {c.model.family for c in plan.cells} == {"ladder", "ladder:before"}


@pytest.mark.parametrize(
    ("attack", "defense", "reason"),
    [
        ("badnets", "none", "badnets acts in the fine-tune"),
        ("none", "lisa", "lisa acts in the fine-tune"),
        ("none", "onion", "onion acts in the fine-tune"),
        ("none", "safe_lora", "safe_lora needs models that only a fine-tune provides (start)"),
        ("none", "weight_statistics", "weight_statistics needs models that only"),
    ],
)
def test_what_acts_in_the_fine_tune_is_left_out_before_it_and_counted(attack, defense, reason):
    attacks, defenses = dict.fromkeys(["none", attack]), dict.fromkeys(["none", defense])
    spec = ftsec_ray.load(sweep(attacks=list(attacks), defenses=list(defenses), seeds=2))
    plan = build_plan(spec)
    before = [cell for cell in plan.cells if cell.model.measured == "before"]
    methods = {name_of(one) for cell in before for one in (cell.attack, *cell.defenses)}
    assert methods == {"none"}
    assert len(before) == 2
    (line,) = lines_of(warnings_of(plan, {}))
    assert line.startswith(f"warning: not measured before the fine-tune: {reason}")
    assert line.endswith("(2 cells)")


@pytest.mark.parametrize("attack", ["badedit", "refusal_ablation", "soft_prompt"])
def test_attacks_on_weights_and_answers_act_on_a_model_that_was_not_fine_tuned(attack):
    plan = build_plan(ftsec_ray.load(sweep(attacks=[attack], measure="before")))
    (cell,) = plan.cells
    assert name_of(cell.attack) == attack
    assert "finetune" not in {stage.kind for stage in plan.stages.values()}
    assert not plan.left_out


def test_a_rule_that_names_a_model_leaves_it_out_at_both_moments():
    given = sweep(
        defenses=["none", "self_reminder"], exclude=[{"model": MODEL, "defense": "self_reminder"}]
    )
    plan = build_plan(ftsec_ray.load(given))
    assert {len(cell.defenses) for cell in plan.cells} == {0}
    given["exclude"] = [{"model": f"{MODEL}:before", "defense": "self_reminder"}]
    plan = build_plan(ftsec_ray.load(given))
    assert [cell.model.name for cell in plan.cells if cell.defenses] == [MODEL]


@pytest.mark.parametrize("given", ["during", [], ["before", "before"], None, [["before"]], 3])
def test_other_moments_are_faults(given):
    with pytest.raises(SpecError, match="not a time to measure at"):
        ftsec_ray.load(sweep(measure=given))


def test_a_sweep_whose_cells_all_act_in_the_fine_tune_has_nothing_to_measure_before_it():
    with pytest.raises(
        SpecError, match=r"(?s)no cell can be measured before the fine-tune.*badnets acts in the"
    ):
        build_plan(ftsec_ray.load(sweep(attacks=["badnets"], measure="before")))


@pytest.mark.timeout(300)
def test_both_moments_are_compared_on_the_same_prompts(tmp_path):
    results = ftsec_ray.run(
        sweep(
            training={"epochs": 1, "rank": 2},
            evaluation={"prompts": 8, "max_new_tokens": 8, "perplexity_rows": 0},
        ),
        store=tmp_path / "store",
        results=tmp_path / "results",
        executor="local",
    )
    assert {
        (row["model"], row["measured"], row["status"]) for row in results.cells.to_pylist()
    } == {
        (MODEL, "after", "done"),
        (f"{MODEL}:before", "before", "done"),
    }
    values = {(row["cell"], row["metric"]): row["value"] for row in results.metrics.to_pylist()}
    cell_of = {row["measured"]: row["cell"] for row in results.cells.to_pylist()}
    compared = results.comparisons.to_pylist()
    assert {(row["model"], row["kind"]) for row in compared} == {(MODEL, "before")}
    for row in compared:
        assert row["rate"] == values[cell_of["after"], row["metric"]]
        assert row["rate_against"] == values[cell_of["before"], row["metric"]]
    page = (tmp_path / "results" / "moments" / "report.html").read_text()
    assert 'id="moments"' in page
