"""Fine-tunes adapters on clean rows, so that a detector knows what clean models look like."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftsec_ray.lifecycle import StageKind

if TYPE_CHECKING:
    from ftsec_ray.lifecycle import Extra, Job

DEFAULT_SIZE = 8
"""Adapters, where the method does not say."""


def _size(method: Any) -> dict[str, int]:
    return {"size": int(getattr(method, "bank", DEFAULT_SIZE))}


KIND = StageKind(
    name="bank",
    position=65,
    takes=("model",),
    provides="clean_bank",
    settings=("sweep_training",),
    settings_of=_size,
    tunes=True,
    trains="always",
    prior_s={"": (2.0, 24.0)},
)


def run(job: Job) -> Extra:
    """Tune adapters that differ by seed and by a bootstrap of the user's rows."""
    from ftsec_ray.models.load import save_model
    from ftsec_ray.models.row_tokens import tell_cuts
    from ftsec_ray.training.loop import sft

    context = job.context()
    packs = context.training.quantization != "none"
    start = job.session.model(job.inputs["model"], on_host=packs)
    rows = job.session.rows(job.inputs["task"])
    tokens, flops = 0, 0.0
    for member in range(int(job.stage.params["size"])):
        picks = context.numpy_rng("bank", str(member)).integers(0, rows.num_rows, rows.num_rows)
        report = sft(
            start,
            rows.take(picks),
            context.training,
            seed=1_000 * (context.seed + 1) + member,
            runtime=context.runtime,
            workdir=context.workdir / str(member),
            base_digest=job.inputs["model"],
        )
        tell_cuts(context, report.cuts)
        folder = job.out / str(member)
        folder.mkdir()
        save_model(report.loaded, folder)
        tokens, flops = tokens + report.tokens, flops + report.flops
    return {"tokens": tokens, "flops": flops, "notes": context.notes}
