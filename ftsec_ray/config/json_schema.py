"""The JSON schema of a sweep file, made from the dataclasses and the registry, for editors and
other tools.

It describes what a file may contain. JSON schema cannot express every rule: only `load_sweep`
checks that files exist and that names are unique.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from typing import Any, get_args

from ftsec_ray.config.attack_search import SEARCH, is_searchable
from ftsec_ray.config.docs import sections, summary
from ftsec_ray.config.faults import NAME_PATTERN
from ftsec_ray.config.method_entries import NONE
from ftsec_ray.config.stack_entries import Order
from ftsec_ray.config.strategy import StrategyConfig
from ftsec_ray.config.sweep import (
    LADDER_SIZES,
    TASK_KINDS,
    TASK_OPTIONS,
    TRAINING,
    AlignSpec,
    BudgetSpec,
    DataSpec,
    EvaluationConfig,
    ExcludeRule,
    ModelSpec,
    Moment,
    NodeType,
    ResourceSpec,
    SearchSpec,
    SourceSpec,
    TaskSpec,
    TrainingConfig,
)
from ftsec_ray.config.task_entries import COLUMNS, SPLITS
from ftsec_ray.config.typed import Schema, class_schema
from ftsec_ray.method import Method
from ftsec_ray.registry import ATTACKS, DEFENSES, Registry
from ftsec_ray.success import choices, success_metric

_TEXT: Schema = {"type": "string"}
_NAME: Schema = {"type": "string", "pattern": f"^{NAME_PATTERN}$"}
_SEED: Schema = {"type": "integer", "minimum": 0}
_WHERE: Schema = {
    "type": "object",
    "additionalProperties": {"type": ["string", "number", "boolean", "null"]},
}
_MATCHING: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
_ATTACK: Schema = {"$ref": "#/$defs/attack"}
_DEFENSE: Schema = {"$ref": "#/$defs/defense"}
_SOURCE: Schema = {"$ref": "#/$defs/source"}
_MEANINGS = {
    "name": "Name of the sweep, of its results folder and of its archive.",
    "question": "The question that the sweep answers; the report begins with it.",
    "models": "The model axis: one model or a list.",
    "task": "The task axis: one task or a list.",
    "attacks": "The attack axis: a list of attacks, or `all`.",
    "defenses": "The defense axis: a list of defenses and of stacks (lists of them), or `all`.",
    "order": "Order of the defenses of a stack at the same hook: canonical, or as written.",
    "controls": "Whether every stack gets cells in which a control takes the place of a member.",
    "seeds": "The seed axis: a count, or a list of seeds.",
    "exclude": "Rules that leave cells out.",
    "measure": "When cells are measured: before the fine-tune, after it, or both.",
    "training": "How every fine-tune of the sweep trains, and in how many processes.",
    "evaluation": "What every finished model is asked, and which judges read its answers.",
    "resources": "What a stage may use: cores, GPUs, memory, time.",
    "data": "From which size on sets of rows are made in blocks.",
    "prices": "The machines of the cluster and their prices, by name.",
    "budget": "The most that all stages of the sweep together may cost.",
}
_RULE_MEANINGS = {
    "model": "Names or sources of models; a name stands for its cells before the fine-tune too.",
    "task": "Names of tasks.",
    "attack": "Names of attacks, whatever their parameters.",
    "defense": "Names of defenses: every stack that holds one of them; `none` is the empty stack.",
    "seed": "Seeds.",
}
_TASK_MEANINGS = {
    "name": "As tables and reports call it; unique in a sweep.",
    "kind": "What the task is: see `ftsec list tasks`.",
    "splits": "Split -> where its rows come from: a path, a Hugging Face id, or a mapping.",
    "source": "A Hugging Face id whose `train` and `test` are taken; or the same as `splits`.",
    "columns": "Keys of a source that are given once for all splits.",
    "options": "Parameters of a generated task.",
}


def sweep_schema() -> Schema:
    """JSON schema (draft 2020-12) of a sweep file."""
    rule = {
        f.name: _one_or_list(_SEED if f.name == "seed" else _TEXT)
        | {"description": _RULE_MEANINGS[f.name]}
        for f in fields(ExcludeRule)
    }
    seeds = _any({"type": "integer", "minimum": 1}, _list(_SEED, uniqueItems=True))
    properties = {
        "name": _NAME,
        "question": _TEXT,
        "models": _one_or_list(_any(_ladder(), _TEXT, _model())),
        "task": _one_or_list(_any({"enum": list(TASK_KINDS)}, _task())),
        "attacks": _any({"const": "all"}, _list(_ATTACK), _ATTACK),
        "defenses": _any({"const": "all"}, _list(_stack()), _DEFENSE),
        "order": {"enum": list(get_args(Order)), "default": "canonical"},
        "controls": {"type": "boolean", "default": False},
        "seeds": seeds | {"default": 1},
        "exclude": {"type": "array", "items": _mapping(rule, minProperties=1)},
        "measure": _one_or_list({"enum": list(get_args(Moment))}) | {"default": "after"},
        "training": _training(),
        "evaluation": _mapping_of(EvaluationConfig),
        "resources": _mapping_of(ResourceSpec),
        "data": _mapping_of(DataSpec),
        "prices": {
            "type": "object",
            "minProperties": 1,
            "propertyNames": _NAME,
            "additionalProperties": _mapping_of(NodeType, without=("name",)),
        },
        "budget": _mapping_of(BudgetSpec) | {"minProperties": 1},
    }
    for key, meaning in _MEANINGS.items():
        properties[key] = properties[key] | {"description": meaning}
    sources = _any(_TEXT, _mapping_of(SourceSpec, where=_WHERE, matching=_MATCHING))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "ftsec_ray sweep",
        **_mapping(properties, "models", "task", "attacks", "defenses"),
        "$defs": {"attack": _methods(ATTACKS), "defense": _methods(DEFENSES), "source": sources},
    }


def _any(*choices: Schema) -> Schema:
    return {"anyOf": [*choices]}


def _list(item: Schema, *, least: int = 1, **more: object) -> Schema:
    return {"type": "array", "minItems": least, "items": item, **more}


def _one_or_list(item: Schema) -> Schema:
    return _any(item, _list(item))


def _mapping(properties: Schema, *required: str, **more: object) -> Schema:
    closed = {"type": "object", "additionalProperties": False, "properties": properties}
    return closed | ({"required": list(required)} if required else {}) | more


def _mapping_of(
    cls: type, *, grid: bool = False, without: Collection[str] = (), **changed: Schema
) -> Schema:
    """Schema of a dataclass as a file writes it; `changed` holds the schemas of fields that a file
    writes in another form.
    """
    schema = class_schema(cls)
    known = {name: value for name, value in schema["properties"].items() if name not in without}
    properties = {name: value for name, value in changed.items() if name not in known}
    for name, value in known.items():
        about = {key: value[key] for key in ("description",) if key in value}
        plain = about | changed.get(name, value)
        properties[name] = _or_grid(plain) if grid and name not in changed else plain
    required = [
        name for name in schema.get("required", ()) if name in known and name not in changed
    ]
    text = {key: schema[key] for key in ("description",) if key in schema}
    return text | _mapping(properties, *required)


def _or_grid(value: Schema) -> Schema:
    about = {key: value[key] for key in ("description", "default") if key in value}
    plain = {key: part for key, part in value.items() if key not in about}
    return _any(plain, _mapping({"grid": _list(plain)}, "grid")) | about


def _ladder() -> Schema:
    return {"enum": [f"ladder:{size}{end}" for size in LADDER_SIZES for end in ("", "-base")]}


def _model() -> Schema:
    model = _mapping_of(
        ModelSpec,
        without=("measured",),
        path=_TEXT | {"description": "A local folder or .gguf file."},
        id=_TEXT | {"description": "A Hugging Face id."},
        source=_TEXT | {"description": "Either of them, or `ladder:<size>`."},
        align=_any({"type": "boolean"}, _mapping_of(AlignSpec)),
        serve_template=_any(_one_or_list(_TEXT), {"type": "object", "additionalProperties": _TEXT}),
    )
    # Most required fields of a model follow from its source.
    del model["required"]
    return model | {"oneOf": [{"required": [key]} for key in ("path", "id", "source")]}


def _training() -> Schema:
    training = _mapping_of(TrainingConfig)
    strategy = class_schema(StrategyConfig)["properties"]
    return training | {"properties": training["properties"] | strategy}


def _task() -> Schema:
    splits = _mapping(dict.fromkeys(SPLITS, _SOURCE))
    columns = _mapping(dict.fromkeys(COLUMNS, _TEXT) | {"where": _WHERE, "matching": _MATCHING})
    task = _mapping_of(
        TaskSpec,
        name=_NAME,
        kind={"enum": list(TASK_KINDS)},
        splits=splits,
        source=_any(_TEXT, splits),
        columns=columns,
        options=_any(*map(_mapping_of, TASK_OPTIONS.values())),
    )
    for key, meaning in _TASK_MEANINGS.items():
        task["properties"][key] = task["properties"][key] | {"description": meaning}
    return task


def _methods(registry: Registry) -> Schema:
    choices: list[Schema] = [{"enum": registry.names()}]
    for name in registry.names():
        cls = registry.get(name)
        parameters = _mapping_of(cls, grid=True)
        parameters["description"] = summary(sections(registry.doc(name))[""])
        if is_searchable(cls):
            parameters["properties"][SEARCH] = _search(cls)
        choices.append(_mapping({name: _any(parameters, {"type": "null"})}, name))
    return _any(*choices)


def _search(cls: type[Method]) -> Schema:
    own: Any = cls
    known = class_schema(own)["properties"] | {
        TRAINING + name: value for name, value in class_schema(TrainingConfig)["properties"].items()
    }
    ranges = {}
    for name, value in known.items():
        end = {key: part for key, part in value.items() if key not in ("description", "default")}
        log = {"type": "boolean", "default": False}
        interval = _mapping({"low": end, "high": end, "log": log}, "low", "high")
        ranges[name] = _any(_list(end, least=2, uniqueItems=True), interval)
    search = _mapping_of(
        SearchSpec,
        metric={"enum": list(choices()), "default": success_metric(cls)},
        ranges=_mapping(ranges, minProperties=1),
    )
    return search | {"required": ["trials", "ranges"]}


def _stack() -> Schema:
    inside = {"allOf": [_DEFENSE, {"not": {"const": NONE}}]}
    return _any(_DEFENSE, _list(inside))
