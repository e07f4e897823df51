"""Tune the released model on harm in two phases: a kick that leaves the region that a defense
prepared, then ordinary harmful fine-tuning, both within one budget of steps.

Paper: One Step to the Side: Why Defenses Against Malicious Finetuning Fail Under Adaptive
    Adversaries, 2026, arXiv:2605.14605 (one adaptive attack against several mechanisms: they hide
    the path to harmful behaviour and leave the behaviour in place).
Differs: written from a description of the method, its official code was not read; the parameters
    are therefore not the paper's. The attack is the same for every stack, because it does not read
    the defenses: so the cell without a defense gets the same budget. It acts on the finished
    model, as someone with open weights does, and not in the user's fine-tune. Benign rows are mixed
    in (`benign_rows`), so that what the kick breaks can be learned again.
Cost: `steps` optimizer steps; the record has steps, tokens and FLOP of both phases.
Reads: `kick_steps: 0` and `noise: 0` is ordinary harmful tuning with the same number of steps: the
    effect of the kick is the difference to it. Look at `benign_rate` and `coherent_rate` too: a
    model that the kick has broken is no success.
Needs: split harmful_train; benign_train with `benign_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from ftsec_ray.context import LoadedModel, StageContext
from ftsec_ray.data.added_rows import anything, drawn
from ftsec_ray.data.rows import from_rows
from ftsec_ray.method import Attack, Phase, above_faults, least_faults

if TYPE_CHECKING:
    import pyarrow as pa

    from ftsec_ray.training.loop import TuneReport


@dataclass(frozen=True, kw_only=True)
class KickSettle(Attack):
    """A kick, then harmful fine-tuning."""

    PHASE: ClassVar[Phase] = "post"
    SUCCESS = "harmful_rate"
    NEEDS = frozenset({"harmful_train", "benign_train"})
    TRAINS = frozenset({"revise_model"})

    steps: int = 40
    """Budget: optimizer steps of both phases together, 1 or more."""
    kick_steps: int = 4
    """Steps of the kick within the budget, 0 to `steps`; 0 leaves all of them to the second
    phase."""
    kick_learning_rate: float = 0.03
    """Constant learning rate of the kick."""
    noise: float = 0.0
    """Standard deviation of the noise that is added to every weight before the first step, as a
    share of the root mean square of its tensor; 0 adds none. It costs no step."""
    learning_rate: float = 1e-3
    """Peak learning rate of the second phase."""
    batch_size: int = 8
    """Rows per step."""
    shots: int = 64
    """Harmful rows, 1 or more."""
    benign_rows: int = 64
    """Benign rows among them, at most; 0 for none."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters."""
        least = {"steps": 1, "batch_size": 1, "shots": 1, "benign_rows": 0, "noise": 0.0}
        faults = least_faults(self, least)
        if not 0 <= self.kick_steps <= self.steps:
            faults.append(("kick_steps", self.kick_steps, f"0 to {self.steps}, `steps`"))
        return faults + above_faults(self, "kick_learning_rate", "learning_rate")

    def needs(self) -> frozenset[str]:
        """`benign_train` only if its rows are mixed in."""
        return self.NEEDS if self.benign_rows else self.NEEDS - {"benign_train"}

    def revise_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model after both phases."""
        from ftsec_ray.models.load import folded
        from ftsec_ray.models.precision import tell_rounding

        rows = self._rows(ctx)
        before, lost = folded(model)
        changed = self._noisy(before, ctx)
        reports: dict[str, TuneReport] = {}
        phases = (
            ("kick", self.kick_steps, self.kick_learning_rate),
            ("settle", self.steps - self.kick_steps, self.learning_rate),
        )
        for name, steps, rate in phases:
            if steps:
                reports[name] = self._phase(changed, rows, name, steps, rate, ctx)
                changed, lost = folded(reports[name].loaded)
        tell_rounding(ctx, lost, changed)
        ctx.note(
            rows=rows.num_rows,
            steps={name: len(report.losses) for name, report in reports.items()},
            tokens={name: report.tokens for name, report in reports.items()},
            flops={name: report.flops for name, report in reports.items()},
            first_losses={name: report.losses[0] for name, report in reports.items()},
            last_losses={name: report.losses[-1] for name, report in reports.items()},
        )
        return changed

    def _phase(
        self,
        model: LoadedModel,
        rows: pa.Table,
        name: str,
        steps: int,
        rate: float,
        ctx: StageContext,
    ) -> TuneReport:
        from ftsec_ray.models.row_tokens import tell_cuts
        from ftsec_ray.training.loop import sft

        config = replace(
            ctx.training,
            learning_rate=rate,
            batch_size=self.batch_size,
            schedule="constant" if name == "kick" else "cosine",
            warmup_frac=0.0 if name == "kick" else 0.1,
        )
        report = sft(
            model,
            rows,
            config,
            seed=ctx.seed,
            runtime=ctx.runtime,
            # of its own, so that no phase resumes from a checkpoint of the other
            workdir=ctx.workdir / name,
            shape=lambda training: replace(training, steps=steps),
        )
        tell_cuts(ctx, report.cuts)
        return report

    def _noisy(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """A copy with noise on every weight, computed in float32 and rounded once."""
        import torch

        from ftsec_ray.models.load import copy_model
        from ftsec_ray.models.precision import in_float32

        if not self.noise:
            return model
        from ftsec_ray.training.meta import noise_like

        noisy = copy_model(model)
        number = int(ctx.numpy_rng("kick_settle").integers(2**62))
        with torch.random.fork_rng(), in_float32(noisy.model), torch.no_grad():
            torch.manual_seed(number)
            weights = dict(noisy.model.named_parameters())
            for name, shift in noise_like(weights, self.noise).items():
                weights[name].add_(shift)
        return noisy

    def _rows(self, ctx: StageContext) -> pa.Table:
        """The harmful rows, and the benign ones among them, chosen by the seed and the row ids."""
        benign = ctx.task.split("benign_train").num_rows if self.benign_rows else 0
        parts = {"harmful_train": self.shots, "benign_train": min(self.benign_rows, benign)}
        return from_rows(
            row
            for split, count in parts.items()
            if count
            for row in sorted(
                drawn(ctx, split, count, by="kick_settle", fits=anything),
                key=lambda row: str(row["row_id"]),
            )
        )
