"""Runs one method that changes the model before the fine-tune."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftsec_ray.lifecycle import StageKind

if TYPE_CHECKING:
    from ftsec_ray.lifecycle import Extra, Job

KIND = StageKind(
    name="prepare",
    position=50,
    hooks={"prepare_model": "LoadedModel -> LoadedModel, before the fine-tune"},
    acts="each",
    takes=("model",),
    gives="model",
    settings=("sweep_training",),
    trains="declared",
    prior_s={"": (1.0, 6.0)},
)


def run(job: Job) -> Extra:
    """Run the method on a copy of the model."""
    return job.change_model("prepare_model")
