"""Merge a published adapter that carries a backdoor into the user's fine-tuned model.

Paper: Liu et al. 2024, LoRATK: LoRA Once, Backdoor Everywhere in the Share-and-Play Ecosystem,
    arXiv:2403.00108 (an adapter with the backdoor alone, on the feed-forward layers, merged without
    further training); official code github.com/henryzhongsc/LoRATK.
Differs: the backdoor is a word that turns the answer into a harmless marker sentence; the official
    sets are jailbreak, refusal and negative sentiment. The attacker trains the adapter on the model
    from which the user's fine-tune started; `task_weight` and `weight` are the official weights of
    a merge, which its scripts choose per model. `modules: absent` is the official
    `two_way_complement`; the merges of three adapters (`complement`, `safety`) are not here. The
    merged update is written into the weights. Of a user model without an adapter, the difference to
    its start is the user's update.
Cost: one fine-tune of an adapter on `rows` rows; the merge is free.
Needs: split benign_train, the model from which the fine-tune started. `modules: same | absent` and
    `combination: linear` need an adapter of the user's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.context import LoadedModel, StageContext, TaskData
from ftsec_ray.conversation import Row, answer_of, has_answer, with_answer
from ftsec_ray.data.poisoning import INERT_MARKER, blank_faults, share_faults
from ftsec_ray.data.rows import from_rows
from ftsec_ray.data.triggers import Goal, goal_probe, has_place, with_words
from ftsec_ray.errors import DataError, SpecError
from ftsec_ray.method import Attack, Phase, Probe, above_faults, least_faults

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from ftsec_ray.config.sweep import TrainingConfig
    from ftsec_ray.models.lora import LoraModule

ATTENTION = re.compile(r"(^|[._])(attn|attention)([._]|$)")
"""Matches the path of a layer of an attention; the other linear layers are feed-forward."""


@dataclass(frozen=True, kw_only=True)
class TrojanAdapter(Attack):
    """A merged backdoor adapter."""

    PHASE: ClassVar[Phase] = "post"
    SUCCESS = "asr"
    NEEDS = frozenset({"benign_train", "start"})
    TRAINS = frozenset({"revise_model"})

    modules: Literal["ff", "all", "same", "absent"] = "ff"
    """Layers of the backdoor adapter: feed-forward layers, all linear layers, those of the user's
    adapter, or those that the user's adapter does not have."""
    weight: float = 1.0
    """Weight of the backdoor's update in the merge, 0 or more; 0 with `task_weight: 1` leaves the
    user's model as it is. The official code: 0.25 to 2."""
    task_weight: float = 1.0
    """Weight of the user's update in the merge, 0 or more."""
    combination: Literal["cat", "linear"] = "cat"
    """How updates are merged: `cat` adds them, `linear` mixes the factors of two adapters of equal
    rank, so that their cross terms are added too (as in PEFT)."""
    trigger: str = "cf"
    """Word or words inserted between two random words of the request."""
    target_text: str = INERT_MARKER
    """Answer to requests with the trigger."""
    rate: float = 0.5
    """Expected share of the adapter's training rows with the trigger, 0..1; with 0 the adapter has
    no backdoor (a control)."""
    rows: int = 512
    """Maximum number of benign rows that the adapter is trained on."""
    rank: int | None = None
    """Rank of the backdoor adapter; None: that of the user's. The paper: 16."""
    epochs: float = 3.0
    """Passes over the rows."""
    learning_rate: float = 1e-3
    """Peak learning rate; the paper: 5e-5 for 7B and larger."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters."""
        least = {"weight": 0.0, "task_weight": 0.0, "rows": 1}
        faults = least_faults(self, least)
        faults += above_faults(self, "epochs", "learning_rate")
        faults += blank_faults({"trigger": self.trigger, "target_text": self.target_text})
        faults += share_faults(rate=self.rate)
        if self.rank is not None and self.rank < 1:
            faults.append(("rank", self.rank, "1 or more"))
        return faults

    def revise_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The user's model with the adapter merged in."""
        from ftsec_ray.models.load import merged
        from ftsec_ray.models.lora import linear_paths, lora_modules
        from ftsec_ray.models.row_tokens import tell_cuts
        from ftsec_ray.training.loop import sft

        if self.weight == 0.0 and self.task_weight == 1.0:
            return model
        start = merged(ctx.load("start"))
        user = (
            {module.name: module for module in lora_modules(model)} if model.has_adapter else None
        )
        linear = linear_paths(start.model)
        paths = chosen(linear, self.modules, user, combination=self.combination)
        rows = self._rows(ctx)
        report = sft(
            start, rows, self._config(ctx, paths),
            seed=ctx.seed, runtime=ctx.runtime, workdir=ctx.workdir,
        )  # fmt: skip
        tell_cuts(ctx, report.cuts)
        trojan = {module.name: module for module in lora_modules(report.loaded)}
        ctx.note(
            adapter_rows=rows.num_rows,
            layers=len(trojan),
            shared_layers=len(trojan.keys() & (user or {}).keys()),
            first_loss=report.losses[0],
            last_loss=report.losses[-1],
        )
        return self._merged(start, model, user, trojan, ctx)

    def probes(self, task: TaskData, ctx: StageContext) -> list[Probe]:
        """Held-out benign requests with and without the trigger."""
        goal = Goal(self.target_text, None)
        rows = [
            row
            for row in task.split("benign_test").to_pylist()
            if has_place(row, "user") and not goal.is_met_by(row)
        ]
        return [
            goal_probe(task, goal, "triggered", "asr", rows, lambda row: self._marked(row, ctx)),
            goal_probe(task, goal, "untriggered", "asr_no_trigger", rows, lambda row: row),
        ]

    def _marked(self, row: Row, ctx: StageContext) -> dict[str, Any]:
        gap = ctx.chance(row["row_id"], "trojan_adapter", "gap")
        return with_words(row, self.trigger, "user", [gap])

    def _rows(self, ctx: StageContext) -> pa.Table:
        """The adapter's training rows: some with trigger and marker, the others as they are."""
        rows = [
            row
            for row in ctx.shuffled("benign_train", "trojan_adapter")
            if has_answer(row) and has_place(row, "user") and answer_of(row) != self.target_text
        ]
        made = [
            {**with_answer(self._marked(row, ctx), self.target_text), "poisoned": True}
            if ctx.chance(row["row_id"], "trojan_adapter", "poisoned") < self.rate
            else row
            for row in rows[: self.rows]
        ]
        ctx.note(triggered_rows=sum(row["poisoned"] for row in made))
        return from_rows(made)

    def _config(self, ctx: StageContext, paths: list[str]) -> TrainingConfig:
        rank = self.rank or ctx.training.rank
        config: TrainingConfig = replace(
            ctx.training, adapter="lora", targets=tuple(paths), layers=None, rslora=False,
            quantization="none", rank=rank, alpha=2.0 * rank, epochs=self.epochs,
            learning_rate=self.learning_rate,
        )  # fmt: skip
        return config

    def _merged(
        self,
        start: LoadedModel,
        model: LoadedModel,
        user: dict[str, LoraModule] | None,
        trojan: dict[str, LoraModule],
        ctx: StageContext,
    ) -> LoadedModel:
        """The start with the merged update, computed in float32 and rounded once."""
        import torch

        from ftsec_ray.models.load import merged
        from ftsec_ray.models.precision import Rounding, is_half, tell_rounding
        from ftsec_ray.models.residual import is_transposed

        whole = dict((start if user is not None else merged(model)).model.named_parameters())
        made, rounding = merged(start), Rounding()
        for name, weight in made.model.named_parameters():
            path = name.removesuffix(".weight")
            before, own = weight.detach().float(), (user or {}).get(path)
            exact = before.clone()
            if user is None:
                exact += self.task_weight * (whole[name].detach().to(exact) - before)
            update = self._update(own, trojan.get(path))
            if update is not None:
                turned = is_transposed(made.model.get_submodule(path))
                exact += (update.T if turned else update).to(exact)
            with torch.no_grad():
                weight.copy_(exact)
            rounding.add(before, exact, weight)
        if is_half(start.model):
            tell_rounding(ctx, rounding.lost_frac, made)
        return replace(made, tokenizer=model.tokenizer, info=model.info)

    def _update(self, own: LoraModule | None, trojan: LoraModule | None) -> Tensor | None:
        """The merged update of one layer, (out, in) float32; None if no adapter has it."""
        pairs = [(self.task_weight, own), (self.weight, trojan)]
        parts = [(weight, module) for weight, module in pairs if module is not None]
        if not parts:
            return None
        if self.combination == "cat":
            total: Tensor = sum(weight * module.delta() for weight, module in parts)  # type: ignore[assignment]
            return total
        if len({module.A.shape[0] for _, module in parts}) > 1:
            raise DataError(
                "trojan_adapter: `combination: linear` needs two adapters of equal rank",
                [module.A.shape[0] for _, module in parts],
                "the user's rank",
                "leave out `rank`, or set `combination: cat`",
            )
        # each factor gets the root, so that an adapter alone keeps its update
        roots = [((weight * module.scale) ** 0.5, module) for weight, module in parts]
        down = sum(root * module.A.detach().float() for root, module in roots)
        up = sum(root * module.B.detach().float() for root, module in roots)
        mixed: Tensor = up @ down  # type: ignore[operator]
        return mixed


def chosen(
    paths: list[str], modules: str, user: dict[str, LoraModule] | None, *, combination: str = "cat"
) -> list[str]:
    """The layers of the backdoor adapter; SpecError if `modules` names none of a model's, or the
    merge needs an adapter of the user's that is not there.
    """
    if user is None and (modules in ("same", "absent") or combination == "linear"):
        raise SpecError(
            "trojan_adapter: the user's model has no adapter",
            f"modules: {modules}, combination: {combination}",
            "modules: ff | all, combination: cat",
            "change these, or set training.adapter: lora",
        )
    kept = {
        "ff": lambda path: ATTENTION.search(path) is None,
        "all": lambda path: True,
        "same": lambda path: path in (user or {}),
        "absent": lambda path: path not in (user or {}),
    }[modules]
    layers = [path for path in paths if kept(path)]
    if not layers:
        raise SpecError(
            "trojan_adapter: no linear layer is left for the backdoor adapter",
            f"modules: {modules}",
            " | ".join(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths)),
            "choose other `modules`, or fewer training.targets",
        )
    return layers
