"""Runs one method that changes the fine-tuned model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftsec_ray.lifecycle import StageKind

if TYPE_CHECKING:
    from ftsec_ray.lifecycle import Extra, Job

KIND = StageKind(
    name="revise",
    position=80,
    hooks={"revise_model": "LoadedModel -> LoadedModel, after the fine-tune"},
    acts="each",
    takes=("model",),
    gives="model",
    roles=("reference", "unaligned", "start", "clean_bank"),
    settings=("training",),
    trains="declared",
    prior_s={"": (1.0, 1.0)},
)


def run(job: Job) -> Extra:
    """Run the method on a copy of the model."""
    return job.change_model("revise_model")
