"""Warnings that a plan gives by itself."""

from __future__ import annotations

import ftsec_ray
from ftsec_ray.plan.build import build_plan
from ftsec_ray.results.stage_warnings import warnings_of

HUB = {
    "id": f"owner/model@{'a' * 40}",
    "name": "published",
    "family": "f",
    "aligned": False,
    "parameters": 1_000_000,
}


def test_generated_tasks_warn_of_models_whose_words_their_judge_does_not_know() -> None:
    sweep = {
        "name": "w",
        "models": ["ladder:0.1m", HUB],
        "task": [{"kind": "agent", "name": "tools"}, "alpaca"],
        "attacks": ["none", "badnets"],
        "defenses": ["none"],
        "exclude": [{"task": "alpaca", "model": "ladder:0.1m"}],
    }
    (warning,) = warnings_of(build_plan(ftsec_ray.load(sweep)), {})
    assert "task tools" in warning.text
    assert "coherence of published mean nothing" in warning.text
    assert "`splits`" in warning.text
    assert warning.cells == 2
    assert "2 cells" in warning.line()


def test_models_of_the_ladder_on_a_generated_task_warn_of_nothing() -> None:
    sweep = {
        "name": "w",
        "models": ["ladder:0.1m"],
        "task": "microworld",
        "attacks": ["none"],
        "defenses": ["none"],
    }
    assert warnings_of(build_plan(ftsec_ray.load(sweep)), {}) == []
