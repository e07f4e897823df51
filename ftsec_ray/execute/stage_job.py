"""The job of one stage: what the code of a stage kind gets from the engine.

Publishing, records and retries are done elsewhere in the engine.
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
    """Run one stage, which writes its artifact into the folder `out`.

    Returns:
        `tokens`, `flops` and `notes` for the stage's record.
    """
    job = StageJob(stage, out, session)
    extra = dict(runner_of(stage.kind)(job))
    if job.warnings:
        extra["notes"] = {**extra.get("notes", {}), "warnings": sorted(set(job.warnings))}
    return extra


@dataclass(frozen=True)
class StageJob:
    """A running stage, its output folder, and the worker's session."""

    stage: Stage
    out: Path
    session: Session
    warnings: list[str] = field(default_factory=list)
    """Warnings of `warn` and of the hooks."""

    @property
    def inputs(self) -> Mapping[str, str]:
        """Role -> digest of the input."""
        return dict(self.stage.inputs)

    @property
    def runtime(self) -> Runtime:
        """The runtime settings of the stage."""
        runtime: Runtime = self.session.runtime
        group = runtime.worker_group
        recomputes = (
            bool(self.stage.where.get("gradient_checkpointing"))
            if group is None
            else group.gradient_checkpointing
        )
        return replace(runtime, gradient_checkpointing=recomputes)

    def methods(self) -> list[Method]:
        """The methods that act in this stage, in order."""
        return methods_of(self.stage)

    def context(self, *, workdir: Path | None = None) -> StageContext:
        """The context of the stage's hooks; `workdir` replaces the stage's own work folder."""
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
        """Add a warning that `run`, `status` and the report show."""
        self.warnings.append(text)

    def _load(self, role: str) -> LoadedModel:
        name, _, member = role.partition(":")
        if name not in self.inputs:
            raise StageError(
                "a method requested a model that it does not declare",
                role,
                " | ".join(sorted(self.inputs)),
                f"add {name!r} to the NEEDS of the method",
            )
        return self.session.model(self.inputs[name], member=member)

    def change_model(self, hook: str) -> Extra:
        """Run a hook of the stage's only method on a copy of its model, and write the result."""
        from ftsec_ray.models.precision import tell_rounding

        (method,) = self.methods()
        context = self.context()
        before = self.session.model(self.inputs["model"])
        changed, lost = change(method, hook, before, context)
        tell_rounding(context, lost, changed)
        return self.finish(changed, notes=context.notes)

    def craft_in_blocks(self, method: RowWise, file: Path) -> dict[str, Any]:
        """Run a method on the rows of a file block by block; see `execute.blocks`."""
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
        """Write a model, cache it for the next stage, and return the values for the record.

        Args:
            loaded: The model.
            losses: Training loss per step, in nats per token; the record gets a subsample.
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
    """Run a hook on a copy of a model.

    The hook gets float32 weights for any dtype of the model. A hook that trains gets the weights in
    the model's dtype, because training handles the dtype itself.

    Returns:
        The changed model in the model's dtype, and the fraction of the change that was lost by
        rounding to this dtype (None for a hook that trains).
    """
    from ftsec_ray.models.load import copy_model
    from ftsec_ray.models.precision import narrow, widened

    trains = hook in method.TRAINS
    copied = copy_model(before) if trains else widened(before)
    changed: LoadedModel = getattr(method, hook)(copied, context)
    return changed, None if trains else narrow(changed, before)


def _thinned(losses: Sequence[float], keep: int = KEPT_LOSSES) -> list[float]:
    """At most `keep` evenly spaced values of a loss curve, including the last one."""
    every = max(1, -(-len(losses) // keep))
    return [round(loss, 5) for loss in losses[::-1][::every][::-1]]
