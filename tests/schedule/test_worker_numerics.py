"""Portable numerics are in force in every process that computes, whichever executor starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ftsec_ray import numerics
from ftsec_ray.execute.unit import run_unit
from ftsec_ray.store import Store
from tests.schedule.engine_runners import Bench, stage_of

ROOT = Path(__file__).parents[2]
PORTABLE = numerics.environment_of("portable")
RAY = [pytest.mark.ray, pytest.mark.timeout(600)]
CASES = {
    "local": ["alone"],
    "local-late": ["alone"],
    "local-group": ["rank0", "rank1"],
    "local-group-late": ["rank0", "rank1"],
    "tune": ["alone"],
    "tune-given-ray": ["alone"],
    "tune-group": ["rank0", "rank1"],
    "tune-data": ["block", "survey"],
}
"""Executor and sort of stage -> who must have said what is in force; `late` drivers have computed
with torch before. The case `tune` starts its own Ray, the others with it run on one at hand.
"""
MARKS = {
    "tune": RAY,
    "tune-data": RAY,
    "tune-given-ray": [*RAY, pytest.mark.slow],
    "tune-group": [*RAY, pytest.mark.slow],
}


def told_by(case, folder):
    """What the processes of a case say, and its driver, which is started with no variable of the
    table.
    """
    kept = {name: value for name, value in os.environ.items() if name not in PORTABLE}
    done = subprocess.run(
        [sys.executable, "-m", "tests.schedule.numerics_runners", case, str(folder)],
        env={**kept, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    driver = json.loads((folder / "driver.json").read_text())
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*-*.json"))], driver


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", [pytest.param(one, marks=MARKS.get(one, [])) for one in CASES])
def test_stages_compute_with_portable_numerics(case, tmp_path):
    told, driver = told_by(case, tmp_path)
    assert driver["failed"] == {}
    # The process of a pipeline's stage hands its blocks out, and itself imports no torch.
    cpu = None if case == "tune-data" else "AVX2"
    assert driver["record"] == {"mode": "portable", "cpu": cpu}
    assert sorted({one["who"] for one in told}) == CASES[case]
    for one in told:
        assert one["variables"] == PORTABLE
        assert (one["cpu"], one["mkl"], one["mode"]) == ("AVX2", "COMPATIBLE", "portable")
        assert set(one["threads"]) == {1}
    if case in ("local", "local-late"):
        is_beside = told[0]["pid"] != driver["pid"]
        assert is_beside == (case == "local-late")


def test_a_stage_that_would_compute_with_other_settings_fails_and_leaves_nothing(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    store = Store.open(tmp_path / "store")
    stage = stage_of("one", numerics="portable", log=str(tmp_path))
    runner = "tests.schedule.engine_runners:write"
    (verdict,) = run_unit([stage], store, Bench(store, None, 1.0), runner)
    assert (verdict.status, verdict.error_code) == ("failed", "environment")
    assert "{'MKL_CBWR': 'AVX2'}" in verdict.error
    assert not store.has(stage.digest)
    assert not (tmp_path / "log.txt").exists(), "it was not begun"
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert run_unit([stage], store, Bench(store, None, 1.0), runner)[0].is_good


def test_a_stage_that_changes_the_settings_fails(tmp_path):
    store = Store.open(tmp_path / "store")
    stage = stage_of("one", numerics="portable")

    def two_threads(stage, out, session):
        import torch

        torch.set_num_threads(2)
        return {}

    import torch

    try:
        (verdict,) = run_unit([stage], store, Bench(store, None, 1.0), two_threads)
    finally:
        torch.set_num_threads(1)
    assert verdict.error_code == "environment"
    assert "'threads': [2" in verdict.error
