"""The checks of a growing cluster, in a process of their own.

A run is a process, and a process that has used one Ray before does not get units started on nodes of another that have yet to come.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_cluster_grows_for_the_plan_and_shrinks_and_a_unit_that_fits_on_no_node_type_ends_the_run():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/schedule/growing_cluster.py"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "2 passed" in done.stdout
