"""Settings of all tests: portable numerics, no network, one thread, no window, no Ray from outside."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest

from ftsec_ray.numerics import cpu_fault, put_in_force

# So that stages of the ladder, which most sweeps of the tests hold, run in the tests' own process.
# FTSEC_TEST_KERNELS=native leaves the choice of kernels to the machine and to its environment.
if cpu_fault() is None and os.environ.get("FTSEC_TEST_KERNELS") != "native":
    put_in_force("portable")
os.environ.setdefault("OMP_NUM_THREADS", "1")
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


@pytest.fixture(autouse=True)
def torch_starts_anew() -> None:
    """What a test draws from torch's own generator does not depend on the tests before it, or on
    chance: a new process seeds it anew.
    """
    import torch

    torch.default_generator.manual_seed(0)


@pytest.fixture
def float64() -> Iterator[None]:
    """The test computes in float64, where rounding cannot be taken for a mistake."""
    from tests.numeric import float64

    with float64():
        yield
