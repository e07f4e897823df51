"""Averages the fine-tuned model with other models of the same start.

Paper: Here's a Free Lunch: Sanitizing Backdoored Models with Model Merge (Arora et al. 2024,
    arXiv:2402.19334): the uniform mean of the weights of several models.
Differs: the other models are adapters fine-tuned on clean rows of the task with the recipe of the
    cell, which differ in their seed (the clean bank); in the paper they are models that anyone
    published, some poisoned in another way. The bank is trained on the user's own rows without the
    attack, which a real defender lacks: an upper bound. The updates are averaged, not the factors
    of adapters.
Published: attack success falls by 75 % on average over BERT-Base, RoBERTa-Large, Llama2-7B and
    Mistral-7B on SST-2, OLID, AG News and QNLI.
Cost: `bank` clean fine-tunes for every start model and recipe, shared by all models that agree in
    these; the mean is one pass over the weights.
Reads: averaging with clean models shrinks the attacker's update by 1 / (bank + 1). `partners:
    start` averages with copies of the start instead, which is that shrinking alone: the control.
Needs: the clean bank (`partners: clean_bank`) and the model from which the fine-tune started.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.method import Defense, Phase

if TYPE_CHECKING:
    from ftsec_ray.context import LoadedModel, StageContext


@dataclass(frozen=True, kw_only=True)
class MergeSanitize(Defense):
    """(1 - weight) * tuned + weight * mean of the partners."""

    PHASE: ClassVar[Phase] = "post"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"clean_bank", "start"})
    ORDER: ClassVar[int] = 20
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"partners": "start"}

    bank: int = 2
    """Number of partners, 1 or more; the paper has 2 or more other models."""
    weight: float | None = None
    """Share of the partners together, 0 to 1; None: bank / (bank + 1), the uniform mean of all
    models. 0 changes nothing.
    """
    partners: Literal["clean_bank", "start"] = "clean_bank"
    """Models fine-tuned on clean rows, or the start itself."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        faults: list[tuple[str, object, str]] = []
        faults += [("bank", self.bank, "1 or more")] if self.bank < 1 else []
        is_share = self.weight is None or 0.0 <= self.weight <= 1.0
        return faults + ([] if is_share else [("weight", self.weight, "0 to 1")])

    def needs(self) -> frozenset[str]:
        """The start, and the bank if it gives the partners."""
        return self.NEEDS if self.partners == "clean_bank" else frozenset({"start"})

    def revise_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The mean, without an adapter."""
        import torch

        from ftsec_ray.models.change import check_counterparts, tell_change
        from ftsec_ray.models.load import copy_model, merged
        from ftsec_ray.models.precision import widened

        share = self.bank / (self.bank + 1) if self.weight is None else self.weight
        if share == 0.0:
            ctx.note(change_norm=0.0, change_share=0.0)
            return model
        before, start = merged(model), merged(widened(ctx.load("start")))
        made, own = copy_model(before), dict(before.model.named_parameters())
        count = self.bank if self.partners == "clean_bank" else 1
        # of the differences, so that a weight that nobody trained keeps its bits
        means: dict[str, Any] = {}
        for number in range(count):
            # one at a time: a bank of large models need not fit into memory together
            name = f"clean_bank:{number}" if self.partners == "clean_bank" else "start"
            partner = merged(widened(ctx.load(name)))
            check_counterparts("merge_sanitize", before, partner, name)
            for key, weight in partner.model.named_parameters():
                here = own[key].detach().float()
                part = (weight.detach().float().to(here.device) - here) / count
                means[key] = means[key] + part if key in means else part
        for name, weight in made.model.named_parameters():
            with torch.no_grad():
                weight.copy_(weight.float() + share * means[name])
        ctx.note(partners=count, partner_share=share)
        tell_change(ctx, before, made, start)
        return made
