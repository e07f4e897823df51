"""LoRA adapters as plain matrices: their layers, and attaching a new adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ftsec_ray.context import LoadedModel
from ftsec_ray.errors import DataError
from ftsec_ray.models.load import LANGUAGE_MODEL, is_of_text, reads_text_only
from ftsec_ray.models.residual import is_transposed
from ftsec_ray.models.targets import ALL_LINEAR, target_fault, targeted

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.config.sweep import TrainingConfig


_OUTSIDE_TEXT = rf"(?!{re.escape(LANGUAGE_MODEL)}\.).*"
"""Pattern of the layers of a multimodal model outside its text decoder."""


@dataclass(frozen=True)
class LoraModule:
    """One adapted linear layer: the update of its weight is `scale * B @ A`. Shapes: A (R, in), B
    (out, R).
    """

    name: str
    """Dotted path of the linear layer in the model without adapter."""
    A: Any
    B: Any
    scale: float
    base_weight: Any
    """Weight of the linear layer itself, (out, in); (in, out) in a Conv1D."""

    def delta(self) -> Tensor:
        """The update of the weight, (out, in) float32."""
        update: Tensor = self.scale * self.B.detach().float() @ self.A.detach().float()
        return update


def lora_modules(loaded: LoadedModel) -> list[LoraModule]:
    """All adapted linear layers in model order; DataError if no adapter is attached."""
    if not loaded.has_adapter:
        raise DataError(
            "no LoRA adapter is attached", loaded.info.name, "a model trained with adapter: lora"
        )
    modules = []
    for name, module in loaded.model.get_base_model().named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            modules.append(
                LoraModule(
                    name,
                    module.lora_A["default"].weight,
                    module.lora_B["default"].weight,
                    float(module.scaling["default"]),
                    module.base_layer.weight,
                )
            )
    return modules


def trained_factors(trainable: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Path of an adapted layer, without adapter -> its factors A (R, in) and B (out, R)."""
    found = {}
    for name, A in trainable.items():
        path, is_factor, _ = name.partition(".lora_A.")
        other = name.replace(".lora_A.", ".lora_B.")
        if is_factor and other in trainable:
            found[path.split("base_model.model.", 1)[-1]] = (A, trainable[other])
    return found


def scale_of(config: TrainingConfig) -> float:
    """What the product of an adapter's factors is multiplied by."""
    return config.alpha / (config.rank**0.5 if config.rslora else config.rank)


def linear_paths(model: Any) -> list[str]:
    """Dotted paths of the linear layers of a decoder that can get an adapter, in model order: all
    except the head and those of encoders of images or sound.
    """
    import torch

    head = model.get_output_embeddings()
    return [
        path
        for path, module in model.named_modules()
        if (isinstance(module, torch.nn.Linear) or is_transposed(module))
        and module is not head
        and is_of_text(model, path)
    ]


def linear_weights(model: Any) -> list[tuple[str, Tensor, bool]]:
    """Name, weight as (out, in) without a gradient, and whether the layer holds it transposed, of
    every layer of `linear_paths`; the weight is a view of the layer's own.
    """
    weights = []
    for path in linear_paths(model):
        linear = model.get_submodule(path)
        turned = is_transposed(linear)
        weight = linear.weight.detach()
        weights.append((f"{path}.weight", weight.T if turned else weight, turned))
    return weights


def attach_lora(
    loaded: LoadedModel, config: TrainingConfig, *, base_digest: str | None = None
) -> LoadedModel:
    """Attach a new adapter to the linear layers that the config names, in place; the caller seeds
    torch. DataError if the config names layers that the model does not have.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    others = {} if reads_text_only(loaded.model) else {"exclude_modules": _OUTSIDE_TEXT}
    targets: Any = ALL_LINEAR
    if (config.targets, config.blocks()) != (ALL_LINEAR, None):
        paths = linear_paths(loaded.model)
        fault = target_fault(paths, config.targets, config.blocks())
        if fault is not None:
            raise DataError(fault.what, fault.got, fault.want, f"layers of {loaded.info.name}")
        # full paths, so that PEFT adapts these layers only
        targets, others = targeted(paths, config.targets, config.blocks()), {}
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        use_rslora=config.rslora,
        task_type=TaskType.CAUSAL_LM,
        fan_in_fan_out=any(map(is_transposed, loaded.model.modules())),
        **others,
    )
    return replace(loaded, model=get_peft_model(loaded.model, lora), base_digest=base_digest)
