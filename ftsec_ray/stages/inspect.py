"""Runs a detector on the fine-tuned model.

It runs before any defense revises the model, so that it does not depend on other defenses.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from ftsec_ray.lifecycle import StageKind

if TYPE_CHECKING:
    from ftsec_ray.lifecycle import Extra, Job

KIND = StageKind(
    name="inspect",
    position=70,
    hooks={"inspect": "LoadedModel -> Inspection"},
    acts="each",
    by="defenses",
    takes=("model",),
    answers="all",
    roles=("reference", "unaligned", "start", "clean_bank"),
    settings=("training",),
    prior_s={"": (1.0, 2.0)},
)


def run(job: Job) -> Extra:
    """Write the detector's result as `inspection.json`."""
    (method,) = job.methods()
    context = job.context()
    inspection = method.inspect(job.session.model(job.inputs["model"]), context)  # type: ignore[attr-defined]
    text = json.dumps(asdict(inspection), sort_keys=True)
    (job.out / "inspection.json").write_text(text, encoding="utf-8")
    return {"notes": context.notes}
