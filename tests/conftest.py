"""Settings of all tests: portable numerics, no network, one thread, no window, no Ray from outside."""

from __future__ import annotations

import os

from ftsec_ray.numerics import cpu_fault, put_in_force

# So that stages of the ladder, which most sweeps of the tests hold, run in the tests' own process.
if cpu_fault() is None:
    put_in_force("portable")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# The window in which the tests are watched does not set the width of tables that go into a pipe.
os.environ.pop("COLUMNS", None)
# A Ray that is already running on the machine is not ours to use.
os.environ.pop("RAY_ADDRESS", None)
