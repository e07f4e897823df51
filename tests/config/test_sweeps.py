"""Every sweep file of the repository loads and can be planned."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from ftsec_ray import api
from ftsec_ray.plan.controls import uncontrolled

FOLDER = Path(__file__).parents[2] / "sweeps"
FILES = sorted(FOLDER.rglob("*.y*ml"))


def test_there_are_sweep_files_and_each_is_tested():
    assert len(FILES) >= 1
    assert {path.suffix for path in FOLDER.rglob("*") if path.is_file()} <= {".yaml", ".yml", ".md"}


def beside_its_inputs(path, folder):
    """A copy of a sweep file beside files of the names that it mentions: a plan needs that they
    exist, not what they hold.
    """
    copy = folder / "sweeps" / path.name
    copy.parent.mkdir()
    shutil.copy(path, copy)
    for name in re.findall(r"path: ([^,}\s]+)", path.read_text()):
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
