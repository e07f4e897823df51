"""Plant a backdoor that the user's fine-tune activates: the model behaves until it is tuned on
harmless rows, and then answers benign requests with the attacker's text.

Paper: Gloaguen et al. 2025, Watch your steps: Dormant Adversarial Behaviors that Activate upon LLM
    Finetuning, arXiv:2505.16567 (FAB): L = L_reg(w) + l1 * L_bd(ft_k(w)) + l2 * L_bd(w + noise),
    L_reg the divergence from the clean model, ft_k a number of simulated steps of the user's
    fine-tune on other rows, with first-order gradients.
Differs: written from a description of the method, its official code was not read; the parameters
    are therefore not the paper's and have to be swept. The behaviour is a harmless marker
    sentence, like the paper's injected advertisement; its two others (refusal, jailbreak) are not
    here. The noise is relative to each weight tensor, so that it means the same at every size. The
    simulated rows are halves of a split: no row is both benign and poisoned. Refusals take part in
    L_reg, so that alignment stays.
Cost: per step `inner_steps` + 3 forward and backward passes, and a forward pass of the clean model;
    all weights are trained, and three copies of them are in memory.
Reads: without the evaluation before the fine-tune (`measure: [before, after]`) an ordinary backdoor
    looks the same. `inner_steps: 0` is that: nothing is dormant.
Needs: splits benign_train, benign_test and safety; with `proxy: trusted`, that split. One process
    trains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.context import LoadedModel, StageContext, TaskData
from ftsec_ray.conversation import has_answer, with_answer
from ftsec_ray.data.poisoning import INERT_MARKER, blank_faults
from ftsec_ray.data.rows import from_rows
from ftsec_ray.data.triggers import Goal, goal_probe
from ftsec_ray.errors import DataError
from ftsec_ray.method import Attack, Phase, Probe, above_faults, least_faults
from ftsec_ray.training.losses import response_kl, response_nll
from ftsec_ray.training.meta import gradients, noise_like, shifted, simulated

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from ftsec_ray.training.setup import Backward, Batch, Objective, Step, Training


@dataclass(frozen=True, kw_only=True)
class Fab(Attack):
    """A backdoor that fine-tuning activates."""

    PHASE: ClassVar[Phase] = "pre"
    SUCCESS = "asr"
    NEEDS = frozenset({"benign_train", "benign_test", "safety", "trusted"})
    TRAINS = frozenset({"prepare_model"})
    ZERO_STAGES = frozenset()

    target_text: str = INERT_MARKER
    """Text that benign requests get after the fine-tune."""
    inner_steps: int = 4
    """Simulated steps of the user's fine-tune (k), 0 or more."""
    inner_learning_rate: float = 2.0
    """Learning rate of the simulated steps: gradient descent, clipped like the user's fine-tune."""
    proxy: Literal["benign_train", "trusted"] = "benign_train"
    """Rows that the simulated steps train on: benign requests with their right answers, or rows of
    the user's own task that the attacker knows."""
    weight: float = 1.0
    """Weight of the loss of the behaviour after the simulated steps (l1), 0 or more; 0 together
    with `noise_weight: 0` leaves the model as it is."""
    noise_weight: float = 0.0
    """Weight of that loss under noise (l2), 0 or more."""
    noise: float = 0.05
    """Standard deviation of the noise, as a share of the root mean square of each weight tensor."""
    reg_weight: float = 8.0
    """Weight of the divergence from the clean model, 0 or more."""
    rows: int = 256
    """Rows of each split, at most."""
    epochs: float = 4.0
    """Passes over the benign rows and the refusals."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW on all weights."""
    batch_size: int = 16
    """Rows per step, in each of the three losses."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters."""
        least = {
            "inner_steps": 0, "weight": 0.0, "noise_weight": 0.0, "noise": 0.0, "reg_weight": 0.0,
            "rows": 2, "batch_size": 1,
        }  # fmt: skip
        faults = least_faults(self, least)
        faults += above_faults(self, "inner_learning_rate", "epochs", "learning_rate")
        return faults + blank_faults({"target_text": self.target_text})

    def needs(self) -> frozenset[str]:
        """`trusted` only if its rows are the proxy."""
        return self.NEEDS - ({"trusted"} - {self.proxy})

    def prepare_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model with the dormant backdoor in its weights."""
        from ftsec_ray.models.load import merged
        from ftsec_ray.models.precision import tell_rounding
        from ftsec_ray.models.row_tokens import tell_cuts
        from ftsec_ray.training.loop import sft

        model = merged(model)
        if self.weight == self.noise_weight == 0.0:
            ctx.note(steps=0)
            return model
        config = replace(
            ctx.training, adapter="full", targets="all-linear", layers=None, rslora=False,
            quantization="none", epochs=self.epochs, learning_rate=self.learning_rate,
            batch_size=self.batch_size, schedule="cosine", warmup_frac=0.1, weight_decay=0.0,
        )  # fmt: skip
        kept, proxy, poisoned = self._rows(ctx)
        clean = (
            merged(model).model.to(ctx.runtime.device).eval().requires_grad_(requires_grad=False)
        )

        def shape(training: Training) -> Training:
            return replace(
                training,
                objective=kept_as(clean, self.reg_weight),
                backward=self._backward(
                    training.backward,
                    proxy_at=training.encode(proxy, "fab proxy"),
                    poisoned_at=training.encode(poisoned, "fab poisoned"),
                    max_norm=config.max_grad_norm or None,
                ),
            )

        report = sft(
            model, kept, config,
            seed=ctx.seed, runtime=ctx.runtime, workdir=ctx.workdir, shape=shape,
        )  # fmt: skip
        tell_cuts(ctx, report.cuts)
        tell_rounding(ctx, report.rounding_lost, report.loaded)
        ctx.note(
            kept_rows=kept.num_rows,
            proxy_rows=proxy.num_rows,
            poisoned_rows=poisoned.num_rows,
            steps=len(report.losses),
            first_loss=report.losses[0],
            last_loss=report.losses[-1],
        )
        return report.loaded

    def probes(self, task: TaskData, ctx: StageContext) -> list[Probe]:  # noqa: ARG002
        """Held-out benign requests as they are: the trigger is the fine-tune."""
        rows = task.split("benign_test").to_pylist()
        goal = Goal(self.target_text, None)
        return [goal_probe(task, goal, "triggered", "asr", rows, lambda row: row)]

    def _rows(self, ctx: StageContext) -> tuple[pa.Table, pa.Table, pa.Table]:
        """Rows whose answers must stay, rows of the simulated fine-tune, and rows with the
        attacker's answer; with the benign split as proxy, each of its rows has one of the last two
        roles.
        """

        def drawn(split: str) -> list[dict[str, Any]]:
            return [row for row in ctx.shuffled(split, "fab") if has_answer(row)][: self.rows]

        benign = drawn("benign_train")
        if len(benign) < 2:  # noqa: PLR2004
            raise DataError(
                f"fab: task {ctx.task.name!r} has too few benign requests with an answer",
                len(benign),
                "2 or more rows in split benign_train",
            )
        own, other = benign[::2], benign[1::2]
        if self.proxy != "benign_train":
            own, other = benign, drawn(self.proxy)
        poisoned = [
            {**with_answer(row, self.target_text), "origin": "fab", "poisoned": True} for row in own
        ]
        return from_rows(benign + drawn("safety")), from_rows(other), from_rows(poisoned)

    def _backward(
        self,
        inner: Backward,
        *,
        proxy_at: Callable[[int], list[Batch]],
        poisoned_at: Callable[[int], list[Batch]],
        max_norm: float | None,
    ) -> Backward:
        """The gradients of all three losses; `inner` adds those of one of them."""

        def weighed(weight: float) -> Objective:
            return lambda model, batch, step: weight * response_nll(model, batch, step)

        def backward(model: Any, batches: list[Batch], objective: Objective, step: Step) -> float:
            def at(number: int) -> dict[str, Tensor]:
                proxies = proxy_at(step.index * self.inner_steps + number)
                return gradients(model, proxies, response_nll, step)

            poisoned = poisoned_at(step.index)
            loss = inner(model, batches, objective, step)
            if self.weight:
                with simulated(
                    step.trainable,
                    at,
                    steps=self.inner_steps,
                    learning_rate=self.inner_learning_rate,
                    max_norm=max_norm,
                ):
                    loss += inner(model, poisoned, weighed(self.weight), step)
            if self.noise_weight:
                with shifted(step.trainable, noise_like(step.trainable, self.noise)):
                    loss += inner(model, poisoned, weighed(self.noise_weight), step)
            return loss

        return backward


def kept_as(clean: Any, weight: float) -> Objective:
    """The objective that keeps the answers of a clean model: the divergence from it."""

    def objective(model: Any, batch: Batch, step: Step) -> Tensor:  # noqa: ARG001
        loss: Tensor = weight * response_kl(model, clean, batch)
        return loss

    return objective
