"""Fine-tunes a bank of clean adapters, with which a detector compares a suspect model.

The adapters are fine-tuned like the suspect, but without the attack: from the same model, with the
same defenses, training settings and number of steps, on all clean rows of the task. They differ
only by their seed. Suspects with the same model, defenses and settings share a bank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ftsec_ray.lifecycle import StageKind

if TYPE_CHECKING:
    from ftsec_ray.lifecycle import Extra, Job
    from ftsec_ray.training.setup import Training

DEFAULT_SIZE = 8
"""Number of adapters if the method does not set it."""


def _size(method: Any) -> dict[str, int]:
    return {"size": int(getattr(method, "bank", DEFAULT_SIZE))}


KIND = StageKind(
    name="bank",
    position=65,
    version=2,
    takes=("model", "rows"),
    roles=("reference", "unaligned", "start"),
    provides="clean_bank",
    shaped_as="finetune",
    settings=("training",),
    settings_of=_size,
    tunes=True,
    trains="always",
    prior_s={"": (2.0, 24.0)},
)


def run(job: Job) -> Extra:
    """Fine-tune adapters that differ by their seed: row order, initial weights, dropout."""
    from ftsec_ray.models.load import save_model
    from ftsec_ray.models.row_tokens import tell_cuts
    from ftsec_ray.training.loop import plain_training, sft

    context = job.context()
    packs = context.training.quantization != "none"
    start = job.session.model(job.inputs["model"], on_host=packs)
    rows = job.session.rows(job.inputs["task"])
    suspected = job.session.rows(job.inputs["rows"])
    steps = plain_training(
        start, suspected, context.training, seed=context.seed, runtime=context.runtime
    ).steps

    def shape(training: Training) -> Training:
        training = replace(training, steps=steps)
        for method in job.methods():
            training = method.shape_training(training, context)  # type: ignore[attr-defined]
        return training

    tokens, flops = 0, 0.0
    for member in range(int(job.stage.params["size"])):
        report = sft(
            start,
            rows,
            context.training,
            seed=1_000 * (context.seed + 1) + member,
            runtime=context.runtime,
            workdir=context.workdir / str(member),
            shape=shape,
            base_digest=job.inputs["model"],
        )
        tell_cuts(context, report.cuts)
        folder = job.out / str(member)
        folder.mkdir()
        save_model(report.loaded, folder)
        tokens, flops = tokens + report.tokens, flops + report.flops
    notes = {**context.notes, "rows": rows.num_rows, "steps": steps}
    return {"tokens": tokens, "flops": flops, "notes": notes}
