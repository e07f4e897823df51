"""Settings of all tests: portable numerics, no network, one thread, no window, no Ray from outside."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest

from ftsec_ray.numerics import environment_of

# Stages of the ladder, which most sweeps of the tests hold, then run in the process of the tests.
os.environ.update(environment_of("portable"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# The window in which the tests are watched does not set the width of tables that go into a pipe.
os.environ.pop("COLUMNS", None)
# A Ray that is already running on the machine is not ours to use.
os.environ.pop("RAY_ADDRESS", None)

# How long one example takes says how busy the machine is.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture
def float64() -> Iterator[None]:
    """The test computes in float64, where rounding cannot be taken for a mistake."""
    from tests.numeric import float64

    with float64():
        yield
