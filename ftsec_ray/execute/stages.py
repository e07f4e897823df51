"""What each kind of stage does: inputs from the session, files into a folder, measurements back.

The lifecycle is the table `RUNNERS`. A stage knows its inputs by role, and gives a method exactly
the context of context.py; everything else (publishing, records, retries) is the engine's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftsec_ray.config.sweep import AlignSpec, TrainingConfig
from ftsec_ray.context import LoadedModel, ModelInfo, StageContext
from ftsec_ray.data.rows import count_rows, count_true, filter_report, write_table
from ftsec_ray.data.tasks import load_task, save_task
from ftsec_ray.errors import StageError
from ftsec_ray.evals.evaluate import evaluate
from ftsec_ray.evals.probes import default_probes
from ftsec_ray.execute.blocks import craft_in_blocks
from ftsec_ray.execute.session import CRAFTED, Session
from ftsec_ray.method import Method, RowWise
from ftsec_ray.models.convert import load_source
from ftsec_ray.models.generator import Generator
from ftsec_ray.models.load import copy_model, merged, save_model
from ftsec_ray.plan.decode import align_of, evaluation_of, methods_of, task_of, training_of
from ftsec_ray.registry import name_of
from ftsec_ray.training.loop import TuneReport, sft

if TYPE_CHECKING:
    from ftsec_ray.plan.stage import Stage

Extra = dict[str, Any]


@dataclass(frozen=True)
class StageJob:
    """One stage at work: what it is, where it writes, and what the worker holds."""

    stage: Stage
    out: Path
    session: Session

    @property
    def inputs(self) -> Mapping[str, str]:
        """Role -> digest."""
        return dict(self.stage.inputs)

    def methods(self) -> list[Method]:
        """The methods that act in this stage, in order, with their parameters."""
        return methods_of(self.stage)

    def context(self, *, workdir: Path | None = None) -> StageContext:
        """What the stage's hooks may ask; `workdir` in place of the scratch that survives a
        kill.
        """
        return StageContext(
            seed=self.stage.seed or 0,
            task=self.session.task(self.inputs["task"]),
            runtime=self.session.runtime,
            workdir=workdir or self.session.workdir(self.stage.digest),
            load=self._load,
            training=training_of(self.stage) if "training" in self.stage.params else None,
        )

    def _load(self, role: str) -> LoadedModel:
        name, _, member = role.partition(":")
        if name not in self.inputs:
            raise StageError(
                "a method asked for a model that it did not declare",
                role,
                " | ".join(sorted(self.inputs)),
                f"add {name!r} to the NEEDS of the method",
            )
        return self.session.model(self.inputs[name], member=member)

    def finish(self, loaded: LoadedModel, **extra: Any) -> Extra:
        """Write a model, keep it in memory for the next stage, and report on it."""
        save_model(loaded, self.out)
        if not loaded.has_adapter or loaded.base_digest:
            self.session.remember(self.stage.digest, loaded)
        return {"notes": {"info": asdict(loaded.info), **extra.pop("notes", {})}, **extra}


def run_stage(stage: Stage, out: Path, session: Session) -> Extra:
    """Run one stage into the folder `out`; returns tokens, flops and notes for its record."""
    return RUNNERS[stage.kind](StageJob(stage, out, session))


def _task(job: StageJob) -> Extra:
    task = load_task(task_of(job.stage))
    save_task(task, job.out)
    return {
        "notes": {"splits": {name: table.num_rows for name, table in sorted(task.splits.items())}}
    }


def _source(job: StageJob) -> Extra:
    given = {**job.stage.params, **job.stage.where}
    name = str(given["source"])
    if name.startswith("ladder:"):
        return _ladder(job, name.removeprefix("ladder:").removesuffix("-base"))
    loaded = load_source(
        str(given.get("path") or given["id"]),
        name=str(given["model"]),
        family=str(given["family"]),
        aligned=bool(given["aligned"]),
        revision=given.get("revision"),
        trust_remote_code=bool(given.get("trust_remote_code", False)),
    )
    loaded.model.to(job.session.runtime.device)
    return job.finish(loaded)


def _ladder(job: StageJob, size: str) -> Extra:
    """Pre-train a model of the ladder on the microworld."""
    from ftsec_ray.data.microworld import pretraining_chats
    from ftsec_ray.models import ladder
    from ftsec_ray.training.pretrain import PretrainConfig, pretrain

    shape = ladder.ladder_size(size)
    chats = pretraining_chats()
    tokenizer = ladder.build_tokenizer(message["content"] for chat in chats for message in chat)
    model = ladder.build_model(size, seed=0).to(job.session.runtime.device)
    config = PretrainConfig(
        steps=shape.steps, batch_tokens=shape.batch_tokens, learning_rate=shape.learning_rate
    )
    losses = pretrain(model, tokenizer, chats, config)
    tokens = shape.steps * shape.batch_tokens
    loaded = LoadedModel(
        model,
        tokenizer,
        ModelInfo(
            name=f"ladder:{size}-base",
            family=ladder.FAMILY,
            parameters=shape.parameters,
            aligned=False,
        ),
    )
    return job.finish(
        loaded,
        tokens=tokens,
        flops=6.0 * shape.parameters * tokens,
        notes={"losses": _thin(losses)},
    )


def _align(job: StageJob) -> Extra:
    base = copy_model(job.session.model(job.inputs["model"]))
    info = replace(base.info, name=base.info.name.removesuffix("-base"), aligned=True)
    align = align_of(job.stage)
    if align is None:
        return _align_ladder(job, replace(base, info=info))
    report = _align_real(job, base, align)
    return job.finish(
        replace(report.loaded, info=info),
        tokens=report.tokens,
        flops=report.flops,
        notes={"losses": _thin(report.losses)},
    )


def _align_ladder(job: StageJob, base: LoadedModel) -> Extra:
    """Align a model of the ladder on the microworld's own alignment rows."""
    from ftsec_ray.data.microworld import alignment_rows
    from ftsec_ray.models import ladder
    from ftsec_ray.models.chat import chat_of
    from ftsec_ray.training.pretrain import PretrainConfig, pretrain

    shape = ladder.ladder_size(base.info.name.removeprefix("ladder:"))
    chats = [
        [*chat_of(row), {"role": "assistant", "content": row["response"]}]
        for row in alignment_rows().to_pylist()
    ]
    config = PretrainConfig(
        steps=shape.align_steps,
        batch_tokens=shape.align_batch_tokens,
        learning_rate=shape.align_learning_rate,
        prompt_weight=0.0,
    )
    losses = pretrain(base.model, base.tokenizer, chats, config)
    tokens = shape.align_steps * shape.align_batch_tokens
    return job.finish(
        base, tokens=tokens, flops=6.0 * shape.parameters * tokens, notes={"losses": _thin(losses)}
    )


def _align_real(job: StageJob, base: LoadedModel, align: AlignSpec) -> TuneReport:
    """Align a loaded model by full SFT on the task's refusals, mixed with benign rows."""
    import pyarrow as pa

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
        runtime=job.session.runtime,
        workdir=job.session.workdir(job.stage.digest),
    )


def _change(job: StageJob, hook: str) -> Extra:
    """Let one method change a copy of the model, before or after tuning."""
    (method,) = job.methods()
    context = job.context()
    loaded = getattr(method, hook)(copy_model(job.session.model(job.inputs["model"])), context)
    return job.finish(loaded, notes=context.notes)


def _craft(job: StageJob) -> Extra:
    (method,) = job.methods()
    file = job.session.rows_file(job.inputs["rows"])
    if isinstance(method, RowWise) and count_rows(file) > job.session.runtime.ray_above:
        notes = craft_in_blocks(job, method, file)
    else:
        notes = _craft_at_once(job, method)
    if notes["rows"] == 0:
        raise StageError(
            f"{name_of(method)} left no rows to tune on", 0, "at least one row", "weaken its filter"
        )
    return {"notes": notes}


def _craft_at_once(job: StageJob, method: Method) -> dict[str, Any]:
    """Let a method change a whole set in memory."""
    context = job.context()
    before = job.session.rows(job.inputs["rows"])
    after = method.craft_data(before, context)  # type: ignore[attr-defined]
    write_table(after, job.out / CRAFTED)
    report = filter_report(before, after) if method.KIND == "defense" else {}
    poisoned = count_true(after.column("poisoned"))
    return {
        **report,
        **context.notes,
        **context.counts,
        "rows": after.num_rows,
        "poisoned": poisoned,
    }


def _tune(job: StageJob) -> Extra:
    context = job.context()

    def shape(training: Any) -> Any:
        for method in job.methods():
            training = method.shape_training(training, context)  # type: ignore[attr-defined]
        return training

    report = sft(
        job.session.model(job.inputs["model"]),
        job.session.rows(job.inputs["rows"]),
        context.training,
        seed=context.seed,
        runtime=context.runtime,
        workdir=context.workdir,
        shape=shape,
        base_digest=job.inputs["model"],
    )
    return job.finish(
        report.loaded,
        tokens=report.tokens,
        flops=report.flops,
        notes={"losses": _thin(report.losses), **context.notes},
    )


def _bank(job: StageJob) -> Extra:
    """Tune clean adapters that differ by seed and by a bootstrap of the user's rows: what clean
    looks like.
    """
    context = job.context()
    start, rows = job.session.model(job.inputs["model"]), job.session.rows(job.inputs["task"])
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
        folder = job.out / str(member)
        folder.mkdir()
        save_model(report.loaded, folder)
        tokens, flops = tokens + report.tokens, flops + report.flops
    return {"tokens": tokens, "flops": flops}


def _inspect(job: StageJob) -> Extra:
    (method,) = job.methods()
    context = job.context()
    found = method.inspect(job.session.model(job.inputs["model"]), context)  # type: ignore[attr-defined]
    (job.out / "inspection.json").write_text(
        json.dumps(asdict(found), sort_keys=True), encoding="utf-8"
    )
    return {"notes": context.notes}


def _evaluate(job: StageJob) -> Extra:
    from pyarrow import parquet

    context = job.context()
    config = evaluation_of(job.stage)
    loaded = job.session.model(job.inputs["model"])
    generator = Generator(
        merged(loaded) if loaded.has_adapter else loaded
    )  # folded in once, not at every token
    probes = default_probes(context.task, config)
    for method in job.methods():
        if hasattr(method, "wrap_generation"):
            generator = method.wrap_generation(generator, context)
        if hasattr(method, "probes"):
            probes += method.probes(context.task, context)
    found = evaluate(generator, context.task, probes, config, runtime=context.runtime)
    parquet.write_table(found.metrics, job.out / "metrics.parquet")
    parquet.write_table(found.generations, job.out / "generations.parquet", compression="zstd")
    return {"notes": {"info": asdict(generator.loaded.info), **context.notes}}


def _thin(losses: list[float], keep: int = 50) -> list[float]:
    """At most `keep` values of a loss curve, evenly spaced, the last one among them."""
    every = max(1, -(-len(losses) // keep))
    return [round(loss, 5) for loss in losses[::-1][::every][::-1]]


RUNNERS: Mapping[str, Callable[[StageJob], Extra]] = {
    "task": _task,
    "source": _source,
    "align": _align,
    "craft": _craft,
    "tune": _tune,
    "bank": _bank,
    "inspect": _inspect,
    "evaluate": _evaluate,
    "prepare": partial(_change, hook="prepare_model"),
    "revise": partial(_change, hook="revise_model"),
}
