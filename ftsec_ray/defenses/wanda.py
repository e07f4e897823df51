"""Sets the weights to zero that matter least on clean rows.

Paper: A Simple and Effective Pruning Approach for Large Language Models (Sun et al. 2024,
    arXiv:2306.11695), section 3; official code locuslab/wanda; as a repair of backdoored models it
    is a baseline of CROW (Min et al. 2024, arXiv:2411.12768).
Differs: the calibration rows are the task's own and not 128 sequences of C4, and their inputs are
    those of the tuned model before anything is pruned, for all blocks at once. `score: magnitude`
    compares within an output too, as Wanda does. Embeddings and head stay.
Cost: no training; one pass over `rows` rows.
Reads: `random_weights` zeroes as many weights of every output: the control. Pruning what is
    unimportant on clean rows is the opposite of `antidote`, which prunes what is important on
    harmful rows. Look at clean accuracy and coherence. In canonical order it acts after further
    training and merging, which would move pruned weights away from zero again.
Needs: split benign_train; trusted or safety with `split`; a dense model. An adapter is merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.method import Defense, Phase
from ftsec_ray.models.families import RESIDUAL_WRITERS

if TYPE_CHECKING:
    from ftsec_ray.context import LoadedModel, StageContext


@dataclass(frozen=True, kw_only=True)
class Wanda(Defense):
    """Pruning of a share of the inputs of every output by |weight| x size of the input."""

    PHASE: ClassVar[Phase] = "post"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"benign_train", "trusted", "safety"})
    STRUCTURE: ClassVar[frozenset[str]] = frozenset({RESIDUAL_WRITERS})
    ORDER: ClassVar[int] = 25
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"random_weights": True}

    share: float = 0.5
    """Share of the inputs of every output of a linear layer that are zeroed, 0 to 1, rounded down;
    0 changes nothing.
    """
    score: Literal["wanda", "magnitude"] = "wanda"
    """|weight| x root of the mean square of its input, or |weight| alone."""
    split: Literal["benign_train", "trusted", "safety"] = "benign_train"
    """The clean rows: benign requests, held-out rows of the user's task, or refusals."""
    rows: int = 128
    """Maximum number of rows, 1 or more."""
    tokens: Literal["all", "answer"] = "all"
    """The tokens whose inputs count."""
    random_weights: bool = False
    """Whether as many weights of every output are zeroed at random: the control."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        faults: list[tuple[str, object, str]] = []
        faults += [] if 0.0 <= self.share <= 1.0 else [("share", self.share, "0 to 1")]
        return faults + ([("rows", self.rows, "1 or more")] if self.rows < 1 else [])

    def needs(self) -> frozenset[str]:
        """The split, if the score reads rows."""
        return frozenset({self.split}) if self.score == "wanda" else frozenset()

    def revise_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model without the chosen weights."""
        import torch

        from ftsec_ray.models.change import tell_change
        from ftsec_ray.models.load import copy_model, merged
        from ftsec_ray.models.residual import is_transposed
        from ftsec_ray.training.weight_scores import (
            drawn_per_output,
            encoded_split,
            input_sizes,
            linear_layers,
            per_output,
        )

        if not self.share:
            ctx.note(pruned=0, change_norm=0.0, change_share=0.0)
            return model
        before = merged(model)
        before.model.eval()
        made = copy_model(before)
        layers, pruned, weights = linear_layers(made.model), 0, 0
        sizes: Mapping[str, Any] = {}
        if self.score == "wanda":
            encoded = encoded_split(made, self.split, self.rows, ctx, by="wanda")
            sizes = input_sizes(made.model, layers, encoded, tokens=self.tokens)
        for name, layer in layers.items():
            turned = is_transposed(layer)
            scores = (layer.weight.T if turned else layer.weight).detach().float().abs().cpu()
            chosen = per_output(scores * sizes.get(name, 1.0), self.share, largest=False)
            if self.random_weights:
                chosen = drawn_per_output(chosen, ctx, "wanda", name)
            with torch.no_grad():
                layer.weight.masked_fill_(
                    (chosen.T if turned else chosen).to(layer.weight.device), 0.0
                )
            pruned, weights = pruned + int(chosen.sum()), weights + chosen.numel()
        ctx.note(matrices=len(layers), weights=weights, pruned=pruned)
        tell_change(ctx, before, made)
        return made
