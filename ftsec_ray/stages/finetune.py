"""Fine-tunes the model on the rows, with all methods that act during training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftsec_ray.lifecycle import StageKind

if TYPE_CHECKING:
    from ftsec_ray.lifecycle import Extra, Job

KIND = StageKind(
    name="finetune",
    position=60,
    hooks={"shape_training": "Training -> Training"},
    acts="all",
    takes=("model", "rows"),
    gives="model",
    roles=("reference", "unaligned", "start", "clean_bank"),
    names_input="start",
    settings=("training",),
    tunes=True,
    trains="always",
    prior_s={"": (1.0, 4.0)},
)


def run(job: Job) -> Extra:
    """Supervised fine-tuning, alone or as one process of a worker group."""
    from ftsec_ray.models.precision import tell_rounding
    from ftsec_ray.models.row_tokens import tell_cuts
    from ftsec_ray.training.loop import sft

    context = job.context()

    def shape(training: Any) -> Any:
        for method in job.methods():
            training = method.shape_training(training, context)  # type: ignore[attr-defined]
        return training

    report = sft(
        job.session.model(job.inputs["model"], on_host=context.training.quantization != "none"),
        job.session.rows(job.inputs["rows"]),
        context.training,
        seed=context.seed,
        runtime=context.runtime,
        workdir=context.workdir,
        shape=shape,
        base_digest=job.inputs["model"],
    )
    tell_cuts(context, report.cuts)
    tell_rounding(context, report.rounding_lost, report.loaded)
    return job.finish(
        report.loaded,
        tokens=report.tokens,
        flops=report.flops,
        losses=report.losses,
        notes=context.notes,
    )
