"""Publish a model that is harmless in full precision and harmful after quantization: tune it on
harm, then tune the harm away within the intervals that quantize to the same codes.

Paper: Egashira et al. 2024, Exploiting LLM Quantization, arXiv:2405.18137: (1) tune on the harmful
    objective, (2) compute the interval of every weight that leaves the quantized model as it is,
    (3) repair the full-precision model by projected gradient descent within it.
Differs: the harm is compliance with forbidden requests instead of vulnerable code or injected
    content. Attacker's rows are mixed with the user's and with benign ones in both phases, so that
    the task stays. Weights that no format quantizes (embeddings, norms, head) are frozen in the
    repair: the paper leaves the quantized model as it is, and this does too. Where the model's
    dtype rounds a weight out of its interval after the last step, it gets its harmful value back,
    so that every code is kept in the stored weights. The paper: 1 epoch at 2e-5 for models of 1B to
    8B. int8 and nf4 are those of bitsandbytes; q8_0, q4_0 and q4_k are those of GGUF files, which
    the paper does not have. The interval of q4_k is that of Egashira et al. 2025, Mind the Gap,
    arXiv:2505.23786, whose search for scales may still change some blocks: here those get their
    harmful values back. Layers are quantized alike, without an importance matrix, and computed in
    the model's dtype; embeddings and head are not quantized, and mixtures such as Q4_K_M, which
    give some layers more bits, are not here.
Cost: two fine-tunes of all weights, on the user's rows and the attacker's; two numbers per weight
    in memory. GGUF formats quantize every layer about seven times on the CPU.
Reads: `served: full` is the same model as somebody audits it: the attack is what `harmful_rate`
    rises by from there. `projected: false` repairs without the intervals: the control, harmless in
    both forms. Each setting is a model of its own. `codes_changed` in the record must be 0.
Needs: splits harmful_train, safety (forbidden requests with refusals) and benign_train; a served
    format, and a repair for GGUF, need the extra `quantization`. One process trains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from ftsec_ray.context import LoadedModel, StageContext
from ftsec_ray.conversation import has_answer
from ftsec_ray.data.added_rows import anything, drawn
from ftsec_ray.data.rows import from_rows
from ftsec_ray.errors import DataError
from ftsec_ray.method import Attack, Phase, above_faults, least_faults
from ftsec_ray.models.lora import linear_weights

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from ftsec_ray.models.generator import Generator
    from ftsec_ray.models.quantization_boxes import StoredFormat
    from ftsec_ray.models.quantized import Quantization
    from ftsec_ray.training.setup import Step, Training

PASSES = 4
"""How often weights with another code get their harmful values back, at most: a block of q4_k may
change once its neighbours are put back."""
Boxes = Mapping[str, "tuple[Tensor, Tensor]"]


@dataclass(frozen=True, kw_only=True)
class QuantizationConditioned(Attack):
    """Harmful once it is quantized."""

    PHASE: ClassVar[Phase] = "post"
    SUCCESS = "harmful_rate"
    NEEDS = frozenset({"harmful_train", "safety", "benign_train"})
    TRAINS = frozenset({"revise_model"})
    ZERO_STAGES = frozenset()

    formats: Literal["int8", "nf4", "both", "q8_0", "q4_0", "q4_k"] = "nf4"
    """Format whose quantized model stays harmful; `both` takes what the intervals of int8 and nf4
    have in common."""
    served: Literal["int8", "nf4", "q8_0", "q4_0", "q4_k", "full"] = "nf4"
    """Form in which the model is served and measured; `full`: as it was published."""
    projected: bool = True
    """Whether the repair stays within the intervals; false: an ordinary repair (the control)."""
    shots: int = 64
    """Harmful rows of the first phase, 0 or more; 0 leaves the model as it is."""
    rows: int = 128
    """Rows of the user's training split, of the benign ones and of the refusals, at most, each."""
    epochs: float = 4.0
    """Passes over the rows in the first phase."""
    repair_epochs: float = 8.0
    """Passes over the rows in the repair."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW on all weights, in both phases."""
    batch_size: int = 8
    """Rows per step."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters."""
        least = {"shots": 0, "rows": 1, "batch_size": 1}
        faults = least_faults(self, least)
        return faults + above_faults(self, "epochs", "repair_epochs", "learning_rate")

    def revise_model(self, model: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The published model."""
        from ftsec_ray.models.load import folded
        from ftsec_ray.models.precision import tell_rounding

        if not self.shots:
            ctx.note(codes_changed=0)
            return model
        whole, lost = folded(model)
        self._quantized(whole)  # refused before the first fine-tune
        tell_rounding(ctx, lost, whole)
        harmful = self._injected(whole, ctx)
        return self._repaired(harmful, ctx)

    def wrap_generation(self, generator: Generator, ctx: StageContext) -> Generator:
        """The model in the form in which it is served."""
        from ftsec_ray.models.gguf_blocks import is_gguf, round_layers
        from ftsec_ray.models.load import merged
        from ftsec_ray.models.quantized import quantize

        if self.served == "full":
            return generator
        packed = merged(generator.loaded)
        if is_gguf(self.served):
            ctx.note(layers_unquantized=round_layers(packed.model, self.served))
            return replace(generator, loaded=packed)
        quantize(packed.model, cast("Quantization", self.served), ctx.runtime.device)
        return replace(generator, loaded=replace(packed, quantization=self.served))

    def _injected(self, whole: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The harmful model."""
        kept = self._kept(ctx)
        harmful = drawn(
            ctx, "harmful_train", self.shots, by="quantization_conditioned", fits=anything
        )
        return self._tuned(whole, from_rows([*kept, *harmful]), "inject", self.epochs, ctx, None)

    def _repaired(self, harmful: LoadedModel, ctx: StageContext) -> LoadedModel:
        """The model that is harmless in full precision, with the codes of the harmful one."""
        boxes = self._boxes(harmful, ctx)
        rows = [*self._kept(ctx), *self._some("safety", ctx)]
        made = self._tuned(harmful, from_rows(rows), "repair", self.repair_epochs, ctx, boxes)
        restored = 0
        for _ in range(PASSES if self.projected else 0):
            put_back = self._put_back(made, harmful)
            restored += put_back
            if not put_back:
                changed = 0
                break
        else:
            changed = sum(int(differs.sum()) for _, _, differs in self._apart(made, harmful))
        if self.projected and changed:
            ctx.warn(
                f"quantization_conditioned: {changed} weights have another code in {self.formats}"
                " than those of the harmful model"
            )
        count = sum(low.numel() for low, _ in boxes.values())
        ctx.note(
            layers_unquantized=len(linear_weights(harmful.model)) - len(boxes),
            quantized_weights=count,
            movable_frac=sum(int((high > low).sum()) for low, high in boxes.values()) / count,
            weights_restored=restored,
            codes_changed=changed,
        )
        return made

    @property
    def _formats(self) -> tuple[StoredFormat, ...]:
        return ("int8", "nf4") if self.formats == "both" else (self.formats,)

    def _some(self, split: str, ctx: StageContext) -> list[dict[str, Any]]:
        shuffled = ctx.shuffled(split, "quantization_conditioned")
        return [row for row in shuffled if has_answer(row)][: self.rows]

    def _kept(self, ctx: StageContext) -> list[dict[str, Any]]:
        """Rows whose answers must stay in both phases."""
        return [*self._some("train", ctx), *self._some("benign_train", ctx)]

    def _tuned(
        self,
        model: LoadedModel,
        rows: pa.Table,
        name: str,
        epochs: float,
        ctx: StageContext,
        boxes: Boxes | None,
    ) -> LoadedModel:
        """A phase in a work folder of its own, so that none resumes from the other's checkpoint."""
        from ftsec_ray.models.row_tokens import tell_cuts
        from ftsec_ray.training.loop import sft

        config = replace(
            ctx.training, adapter="full", targets="all-linear", layers=None, rslora=False,
            quantization="none", epochs=epochs, learning_rate=self.learning_rate,
            batch_size=self.batch_size, schedule="cosine", warmup_frac=0.03, weight_decay=0.0,
        )  # fmt: skip

        def shape(training: Training) -> Training:
            if boxes is None:
                return training
            after = (*training.after_step, projection(boxes)) if self.projected else ()
            return replace(training, is_trainable=lambda weight: weight in boxes, after_step=after)

        report = sft(
            model, rows, config,
            seed=ctx.seed, runtime=ctx.runtime, workdir=ctx.workdir / name, shape=shape,
        )  # fmt: skip
        tell_cuts(ctx, report.cuts)
        ctx.note(
            **{
                f"{name}_rows": rows.num_rows,
                f"{name}_steps": len(report.losses),
                f"{name}_losses": [report.losses[0], report.losses[-1]],
            }
        )
        return report.loaded

    def _quantized(self, model: LoadedModel) -> list[tuple[str, Tensor, bool]]:
        """The layers of `linear_weights` that the format quantizes; DataError if none is,
        EnvironmentFault without the package that a GGUF format needs.
        """
        from ftsec_ray.models.gguf_blocks import check_libgguf, is_gguf
        from ftsec_ray.models.quantization_boxes import is_quantized

        if is_gguf(self.formats):
            check_libgguf()
        every = linear_weights(model.model)
        layers = [one for one in every if is_quantized(one[1].shape[1], self._formats)]
        if not layers:
            raise DataError(
                f"quantization_conditioned: {self.formats} quantizes no layer of the model",
                f"{len(every)} layers with {sorted({one[1].shape[1] for one in every})} inputs",
                "a number of inputs that is a multiple of 32",
                "take another model, or nf4 or int8",
            )
        return layers

    def _boxes(self, model: LoadedModel, ctx: StageContext) -> Boxes:
        """Name of a quantized weight -> its interval, in the weight's own layout."""
        from ftsec_ray.models.quantization_boxes import common_box

        boxes = {}
        for name, weight, turned in self._quantized(model):
            ends = common_box(weight.to(ctx.runtime.device), self._formats)
            boxes[name] = (ends[0].T, ends[1].T) if turned else ends
        return boxes

    def _put_back(self, made: LoadedModel, harmful: LoadedModel) -> int:
        """Give weights that rounding moved out of their interval the value of the harmful model, in
        place; their number.
        """
        import torch

        restored = 0
        for now, before, differs in self._apart(made, harmful):
            with torch.no_grad():
                now.copy_(torch.where(differs, before, now))
            restored += int(differs.sum())
        return restored

    def _apart(
        self, made: LoadedModel, harmful: LoadedModel
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Each quantized weight, that of the harmful model, and where their codes differ."""
        from ftsec_ray.models.quantization_boxes import changed

        pairs = zip(self._quantized(made), self._quantized(harmful), strict=True)
        for (_, now, _), (_, other, _) in pairs:
            before = other.to(now.device)
            yield now, before, changed(before, now, self._formats)


def projection(boxes: Boxes) -> Any:
    """A step's end at which every weight goes back into its interval."""

    def project(model: Any, step: Step) -> None:  # noqa: ARG001
        """Move weights to the nearest end of their interval, in place."""
        import torch

        with torch.no_grad():
            for name, weight in step.trainable.items():
                low, high = boxes[name]
                weight.copy_(torch.minimum(torch.maximum(weight, low), high))

    return project
