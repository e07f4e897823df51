"""Every sweep file of the repository loads and can be planned."""

from __future__ import annotations

import pytest

from ftsec_ray import api
from ftsec_ray.plan.controls import uncontrolled
from tests.shipped_sweeps import FILES, FOLDER, beside_its_inputs

DOCUMENTS = {"README.md", "READING_RESULTS.md", "RESULTS.md"}


def test_there_are_sweep_files_and_each_is_tested():
    assert len(FILES) >= 1
    besides = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()}
    assert besides - {path.name for path in FILES} - DOCUMENTS == {
        "benchmarks/ag_news_choice.yaml",
        "refusal_judge.py",
        "report.png",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_sweep_file_is_planned_and_named_after_its_file(path, tmp_path):
    plan = api.make_plan(beside_its_inputs(path, tmp_path))
    assert plan.spec.name == path.stem
    assert plan.spec.question.endswith("?")
    spec = plan.spec
    product = (
        len(spec.models)
        * len(spec.tasks)
        * len(spec.attacks)
        * len(spec.defenses)
        * len(spec.seeds)
    )
    assert 0 < sum(cell.searched is None for cell in plan.cells) <= product
    assert (len(plan.cells) > product) == bool(spec.searches)
    assert len(plan.cells) == product or spec.exclude or spec.searches


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_defense_of_a_sweep_file_has_its_control_beside_it(path, tmp_path):
    assert uncontrolled(api.load(beside_its_inputs(path, tmp_path))) == []
