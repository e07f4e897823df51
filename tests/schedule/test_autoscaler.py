"""The checks of a growing cluster, in a process of their own.

A process that has started a Ray of its own asks for tokens from then on, by an environment variable
that Ray sets, and so do its children; the nodes of the cluster of this test know of none, and start
no unit for it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_cluster_grows_for_the_plan_and_shrinks_and_a_unit_that_fits_on_no_node_type_ends_the_run():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/schedule/growing_cluster.py",
    ]
    plain = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    done = subprocess.run(
        command, cwd=ROOT, env=plain, check=False, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "2 passed" in done.stdout
