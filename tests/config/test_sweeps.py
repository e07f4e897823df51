"""Every sweep file of the repository loads and can be planned."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from ftsec_ray import api
from ftsec_ray.plan.controls import uncontrolled

FOLDER = Path(__file__).parents[2] / "sweeps"
FILES = sorted(FOLDER.glob("*.yaml"))


def test_there_are_sweep_files_and_each_is_tested():
    assert len(FILES) >= 1
    besides = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()}
    assert besides - {path.name for path in FILES} - {"README.md"} == {
        "benchmarks/ag_news_choice.yaml",
        "refusal_judge.py",
    }


def beside_its_inputs(path, folder):
    """A copy of a sweep file beside files of the names that it mentions: a plan needs that they
    exist, not what they hold.
    """
    copy = folder / "sweeps" / path.name
    copy.parent.mkdir()
    shutil.copy(path, copy)
    shutil.copytree(FOLDER / "benchmarks", copy.parent / "benchmarks")
    benchmarks = (FOLDER / "benchmarks").glob("*.yaml")
    data = [
        name for file in benchmarks for name in re.findall(r"test: ([^,}\s]+)", file.read_text())
    ]
    named = re.findall(r"(?:path|model): (\.\.[^,}\s]+)", path.read_text())
    for name in named + [name.removeprefix("../") for name in data]:
        given = copy.parent / name
        given.parent.mkdir(parents=True, exist_ok=True)
        given.write_text(name)
    return copy


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
