"""Checks that the structure of each model supports the methods of a sweep. A local model is checked
here, by its `config.json`; for the others, the stage that loads the model gets the requirements and
checks them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ftsec_ray.config.sweep import SweepSpec, TrainingConfig
from ftsec_ray.errors import SpecError
from ftsec_ray.lifecycle import hooks_of
from ftsec_ray.models.families import PACKED_ROWS, lacking
from ftsec_ray.models.ladder import linear_paths_of
from ftsec_ray.models.targets import ALL_LINEAR, layer_of, target_fault
from ftsec_ray.models.weight_files import weights_index
from ftsec_ray.plan.origin import known_config, local_path
from ftsec_ray.plan.stage import Cell, Stage
from ftsec_ray.registry import name_of

REVISES = "revise_model"
"""The hook at which a method changes the fine-tuned model."""
Needs = dict[str, frozenset[str]]
"""`attack badedit`, `training.batching: packed`, ... -> its requirements."""


def structure_needs(spec: SweepSpec, cells: Iterable[Cell]) -> dict[str, Needs]:
    """Name of a model -> the structure that methods and settings of its cells need."""
    by_model: dict[str, Needs] = {}
    for cell in cells:
        for method in (cell.attack, *cell.defenses):
            if method.STRUCTURE:
                needs = by_model.setdefault(cell.model.name, {})
                needs[f"{method.KIND} {name_of(method)}"] = method.STRUCTURE
        training = cell.searched.training if cell.searched else spec.training
        if training.batching == "packed":
            needs = by_model.setdefault(cell.model.name, {})
            needs["training.batching: packed"] = frozenset({PACKED_ROWS})
    return by_model


def structure_faults(
    cells: Iterable[Cell], needs: Mapping[str, Needs]
) -> dict[tuple[str, ...], tuple[str, SpecError]]:
    """A fault for every method that cannot work on a model whose class is known."""
    faults: dict[tuple[str, ...], tuple[str, SpecError]] = {}
    for model in {cell.model.name: cell.model for cell in cells}.values():
        if model.name not in needs:
            continue
        missing = lacking(known_config(model.source))
        for who, wanted in needs[model.name].items():
            for need in sorted(wanted & missing.keys()):
                kind, _, name = who.partition(" ")
                is_method = kind in ("attack", "defense")
                rule = f"exclude {{model: {model.name}, {kind}: {name}}}"
                faults["structure", model.name, who, need] = (
                    who,
                    SpecError(
                        f"{who} cannot work on model {model.name!r}: {missing[need]}",
                        model.source,
                        "a method or setting that this model class supports",
                        rule if is_method else "batching: length_grouped | shuffled",
                    ),
                )
    return faults


def known_layers(source: str) -> list[str]:
    """Paths of the linear layers in the blocks of a ladder model or local folder; empty if they are
    not known before the model is loaded.
    """
    if source.startswith("ladder:"):
        return linear_paths_of(source.removeprefix("ladder:").removesuffix("-base"))
    path = local_path(source)
    index = weights_index(path) if path is not None and path.is_dir() else {}
    names = [
        name.removesuffix(".weight")
        for name, entry in index.items()
        if name.endswith(".weight")
        and len(entry.get("shape", ())) == 2  # noqa: PLR2004
        and layer_of(name) is not None
    ]
    of_language_model = [name for name in names if "language_model." in name]
    return of_language_model or names


def target_faults(
    spec: SweepSpec, cells: Iterable[Cell]
) -> dict[tuple[str, ...], tuple[str, SpecError]]:
    """A fault for every model that lacks the layers of `training.targets`, if they are known."""
    faults: dict[tuple[str, ...], tuple[str, SpecError]] = {}
    checked: set[tuple[str, TrainingConfig]] = set()
    for cell in cells:
        training = cell.searched.training if cell.searched else spec.training
        key = (cell.model.name, training)
        if training.adapter != "lora" or key in checked:
            continue
        checked.add(key)
        paths = known_layers(cell.model.source)
        is_pattern = isinstance(training.targets, str) and training.targets != ALL_LINEAR
        if is_pattern and not all(path.startswith("model.layers.") for path in paths):
            continue  # the loaded model may name its layers differently from the file
        fault = target_fault(paths, training.targets, training.blocks()) if paths else None
        if fault is not None:
            what = f"{fault.what} of model {cell.model.name!r}"
            error = SpecError(what, fault.got, fault.want, "use names of the model's linear layers")
            faults["targets", cell.model.name, what] = ("training", error)
    return faults


def quantization_faults(
    spec: SweepSpec, cells: Iterable[Cell]
) -> dict[tuple[str, ...], tuple[str, SpecError]]:
    """A fault for every method that changes the weights of a fine-tuned model with a quantized
    base, and for a strategy that would shard quantized weights.
    """
    faults: dict[tuple[str, ...], tuple[str, SpecError]] = {}
    packed = spec.training.quantization
    if packed != "none" and spec.strategy.strategy == "deepspeed":
        faults["quantization", "strategy"] = (
            "training",
            SpecError(
                "DeepSpeed cannot shard a quantized base model",
                f"quantization: {packed}, strategy: deepspeed",
                "one of them",
                "set training.strategy: single",
            ),
        )
    for cell in cells:
        training = cell.searched.training if cell.searched else spec.training
        if training.quantization == "none":
            continue
        for method in (cell.attack, *cell.defenses):
            if REVISES not in hooks_of(type(method)):
                continue
            kind, name = method.KIND, name_of(method)
            faults["quantization", kind, name] = (
                f"{kind} {name}",
                SpecError(
                    f"{kind} {name!r} changes the weights of the fine-tuned model, and with so few"
                    " bits per weight the change would be lost by rounding",
                    training.quantization,
                    "training.quantization: none",
                    f"leave out training.quantization, or exclude {{{kind}: {name}}}",
                ),
            )
    return faults


def with_structure(
    stages: Mapping[str, Stage], cells: Iterable[Cell], needs: Mapping[str, Needs]
) -> dict[str, Stage]:
    """The stages, with the required structure added to each stage that loads a model."""
    known = dict(stages)
    # All cells of a model start from one source stage; several models may share it.
    for name, cell in {cell.model.name: cell for cell in cells}.items():
        wanted = {who: sorted(need) for who, need in needs.get(name, {}).items()}
        digest = next((d for d in cell.stages if stages[d].kind == "source"), None)
        if wanted and digest is not None:
            where = known[digest].where
            structure = {**where.get("structure", {}), **wanted}
            known[digest] = replace(known[digest], where={**where, "structure": structure})
    return known
