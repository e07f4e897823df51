"""Aligns a model before any method acts: a ladder model on the microworld, a loaded model on the
task's refusals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ftsec_ray.lifecycle import StageKind

if TYPE_CHECKING:
    from ftsec_ray.config.sweep import AlignSpec
    from ftsec_ray.context import LoadedModel
    from ftsec_ray.lifecycle import Extra, Job
    from ftsec_ray.training.loop import TuneReport

_ROWS = 1_536
"""Rows, over all epochs, to which the prior refers."""


def _amount(params: Mapping[str, Any]) -> float:
    """Training rows of the stage, in units of the prior; 1 for a ladder model."""
    align = params.get("align")
    if align is None:
        return 1.0
    return float((align["safety_rows"] + align["benign_rows"]) * align["epochs"] / _ROWS)


KIND = StageKind(name="align", position=30, prior_s={"": (2.0, 15.0)}, amount_of=_amount)


def run(job: Job) -> Extra:
    """Fine-tune a copy of the model on refusals and benign answers."""
    from ftsec_ray.models.load import copy_model
    from ftsec_ray.models.precision import tell_rounding
    from ftsec_ray.models.row_tokens import tell_cuts
    from ftsec_ray.plan.decode import align_of

    base = copy_model(job.session.model(job.inputs["model"]))
    info = replace(base.info, name=base.info.name.removesuffix("-base"), aligned=True)
    align = align_of(job.stage)
    if align is None:
        return _align_ladder(job, replace(base, info=info))
    report = _align_loaded(job, base, align)
    context = job.context()
    tell_cuts(context, report.cuts)
    tell_rounding(context, report.rounding_lost, report.loaded)
    return job.finish(
        replace(report.loaded, info=info),
        tokens=report.tokens,
        flops=report.flops,
        losses=report.losses,
        notes=context.notes,
    )


def _align_ladder(job: Job, base: LoadedModel) -> Extra:
    """Align a model of the ladder on the microworld's own alignment rows."""
    from ftsec_ray.conversation import as_chat
    from ftsec_ray.data.microworld import alignment_rows
    from ftsec_ray.models import ladder
    from ftsec_ray.training.pretrain import PretrainConfig, pretrain

    shape = ladder.ladder_size(base.info.name.removeprefix("ladder:"))
    chats = [as_chat(row["messages"]) for row in alignment_rows().to_pylist()]
    config = PretrainConfig(
        steps=shape.align_steps,
        batch_tokens=shape.align_batch_tokens,
        learning_rate=shape.align_learning_rate,
        prompt_weight=0.0,
    )
    losses = pretrain(base.model, base.tokenizer, chats, config)
    tokens = shape.align_steps * shape.align_batch_tokens
    return job.finish(base, tokens=tokens, flops=6.0 * shape.parameters * tokens, losses=losses)


def _align_loaded(job: Job, base: LoadedModel, align: AlignSpec) -> TuneReport:
    """Align a loaded model by supervised fine-tuning of all weights on refusals and benign rows."""
    import pyarrow as pa

    from ftsec_ray.config.sweep import TrainingConfig
    from ftsec_ray.training.loop import sft

    task = job.session.task(job.inputs["task"])
    parts = [task.split("safety").slice(0, align.safety_rows)]
    if align.benign_rows:
        parts.append(task.split("benign_train").slice(0, align.benign_rows))
    config = TrainingConfig(
        adapter="full",
        epochs=align.epochs,
        learning_rate=align.learning_rate,
        batch_size=align.batch_size,
        max_length=align.max_length,
    )
    return sft(
        base,
        pa.concat_tables(parts),
        config,
        seed=0,
        runtime=job.runtime,
        workdir=job.session.workdir(job.stage.digest),
    )
