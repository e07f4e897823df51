"""One stage at work: what a kind of stage gets from the engine, and how it is called.

Everything besides the work itself (publishing, records, retries) is done elsewhere in the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftsec_ray.context import LoadedModel, Runtime, StageContext
from ftsec_ray.errors import StageError
from ftsec_ray.execute.session import Session
from ftsec_ray.lifecycle import Extra, runner_of
from ftsec_ray.method import Method, RowWise
from ftsec_ray.plan.decode import methods_of, training_of

if TYPE_CHECKING:
    from ftsec_ray.plan.stage import Stage

KEPT_LOSSES = 50


def run_stage(stage: Stage, out: Path, session: Session) -> Extra:
    """Run one stage into the folder `out`; returns tokens, flops and notes for its record."""
    job = StageJob(stage, out, session)
    extra = dict(runner_of(stage.kind)(job))
    if job.warnings:
        extra["notes"] = {**extra.get("notes", {}), "warnings": sorted(set(job.warnings))}
    return extra


@dataclass(frozen=True)
class StageJob:
    """One stage at work: what it is, where it writes, and what the worker holds."""

    stage: Stage
    out: Path
    session: Session
    warnings: list[str] = field(default_factory=list)
    """What `warn` and the hooks' contexts were told."""

    @property
    def inputs(self) -> Mapping[str, str]:
        """Role -> digest."""
        return dict(self.stage.inputs)

    @property
    def runtime(self) -> Runtime:
        """Where and how the stage runs."""
        runtime: Runtime = self.session.runtime
        group = runtime.worker_group
        recomputes = (
            bool(self.stage.where.get("gradient_checkpointing"))
            if group is None
            else group.gradient_checkpointing
        )
        return replace(runtime, gradient_checkpointing=recomputes)

    def methods(self) -> list[Method]:
        """The methods that act in this stage, in order, with their parameters."""
        return methods_of(self.stage)

    def context(self, *, workdir: Path | None = None) -> StageContext:
        """What the stage's hooks may ask; `workdir` replaces the scratch that survives a kill."""
        return StageContext(
            seed=self.stage.seed or 0,
            task=self.session.task(self.inputs["task"]),
            runtime=self.runtime,
            workdir=workdir or self.session.workdir(self.stage.digest),
            load=self._load,
            training=training_of(self.stage) if "training" in self.stage.params else None,
            warnings=self.warnings,
        )

    def warn(self, text: str) -> None:
        """Have `run`, `status` and the report say something to whoever reads the results."""
        self.warnings.append(text)

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

    def change_model(self, hook: str) -> Extra:
        """Let the stage's one method change a copy of its model by a hook, and write the result."""
        from ftsec_ray.models.precision import tell_rounding

        (method,) = self.methods()
        context = self.context()
        before = self.session.model(self.inputs["model"])
        changed, lost = change(method, hook, before, context)
        tell_rounding(context, lost, changed)
        return self.finish(changed, notes=context.notes)

    def craft_in_blocks(self, method: RowWise, file: Path) -> dict[str, Any]:
        """Let a method change the rows of a file block by block, in many processes where it may."""
        from ftsec_ray.execute.blocks import craft_in_blocks

        return craft_in_blocks(self, method, file)

    def finish(
        self,
        loaded: LoadedModel,
        *,
        losses: Sequence[float] = (),
        notes: Mapping[str, Any] | None = None,
        **measured: Any,
    ) -> Extra:
        """Write a model, keep it in memory for the next stage, and report on it.

        Args:
            loaded: The model.
            losses: Training loss per step, nats per token; a thinned curve goes into the record.
            notes: Measurements for the record.
            measured: `tokens` and `flops`.
        """
        from ftsec_ray.models.load import save_model

        save_model(loaded, self.out)
        if not loaded.has_adapter or loaded.base_digest:
            self.session.remember(self.stage.digest, loaded)
        curve = {"losses": _thinned(losses)} if losses else {}
        return {"notes": {"info": asdict(loaded.info), **curve, **(notes or {})}, **measured}


def change(
    method: Method, hook: str, before: LoadedModel, context: StageContext
) -> tuple[LoadedModel, float | None]:
    """What a hook makes of a copy of a model, in the model's dtype, and the share of the change
    that rounding to it lost.

    The hook gets float32 weights, whatever the model's dtype; one that trains gets the model's own,
    since training looks after the dtype itself.
    """
    from ftsec_ray.models.load import copy_model
    from ftsec_ray.models.precision import narrow, widened

    trains = hook in method.TRAINS
    copied = copy_model(before) if trains else widened(before)
    changed: LoadedModel = getattr(method, hook)(copied, context)
    return changed, None if trains else narrow(changed, before)


def _thinned(losses: Sequence[float], keep: int = KEPT_LOSSES) -> list[float]:
    """At most `keep` values of a loss curve, evenly spaced, the last one among them."""
    every = max(1, -(-len(losses) // keep))
    return [round(loss, 5) for loss in losses[::-1][::every][::-1]]
