"""The JSON schema of a sweep file, made from the dataclasses and the registry, for editors and for
other tools.

It says what a file may hold; what JSON schema cannot say (files that exist, names used twice) only
`load_sweep` checks.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ftsec_ray.config.attack_search import SEARCH, is_searchable
from ftsec_ray.config.docs import sections, summary
from ftsec_ray.config.faults import NAME_PATTERN
from ftsec_ray.config.method_entries import NONE
from ftsec_ray.config.strategy import DeepSpeedConfig, StrategyConfig
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
    NodeType,
    ResourceSpec,
    SearchSpec,
    SourceSpec,
    TaskSpec,
    TrainingConfig,
)
from ftsec_ray.config.task_entries import COLUMNS, SPLITS
from ftsec_ray.config.typed import adapter_schema, fields_of
from ftsec_ray.method import Method
from ftsec_ray.registry import ATTACKS, DEFENSES, Registry
from ftsec_ray.success import CHOICES, success_metric

Schema = dict[str, Any]
_TEXT: Schema = {"type": "string"}
_WHERE: Schema = {
    "type": "object",
    "additionalProperties": {"type": ["string", "number", "boolean"]},
}
_NAME: Schema = {"type": "string", "pattern": f"^{NAME_PATTERN}$"}


def sweep_schema() -> Schema:
    """JSON schema (draft 2020-12) of a sweep file."""
    seed = {"type": "integer", "minimum": 0}
    properties = {
        "name": _NAME,
        "question": {"type": "string", "description": "The question that the sweep answers."},
        "models": _one_or_list({"anyOf": [_ladder(), _TEXT, _model()]}),
        "task": _one_or_list({"anyOf": [{"enum": list(TASK_KINDS)}, _task()]}),
        "attacks": {
            "anyOf": [
                {"const": "all"},
                {"type": "array", "minItems": 1, "items": _ref("attack")},
                _ref("attack"),
            ]
        },
        "defenses": {
            "anyOf": [
                {"const": "all"},
                {"type": "array", "minItems": 1, "items": _stack()},
                _ref("defense"),
            ]
        },
        "seeds": {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "array", "minItems": 1, "items": seed, "uniqueItems": True},
            ],
            "default": 1,
            "description": "A count, or a list of seeds.",
        },
        "exclude": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "minProperties": 1,
                "properties": {
                    info.name: _one_or_list(seed if info.name == "seed" else _TEXT)
                    for info in fields_of(ExcludeRule)
                },
            },
        },
        "training": _training(),
        "evaluation": _object(EvaluationConfig),
        "resources": _object(ResourceSpec),
        "data": _object(DataSpec),
        "prices": {
            "type": "object",
            "minProperties": 1,
            "propertyNames": _NAME,
            "additionalProperties": _node(),
        },
        "budget": {**_object(BudgetSpec), "minProperties": 1},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "ftsec_ray sweep",
        "type": "object",
        "additionalProperties": False,
        "required": ["models", "task", "attacks", "defenses"],
        "properties": properties,
        "$defs": {"attack": _methods(ATTACKS), "defense": _methods(DEFENSES), "source": _source()},
    }


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _one_or_list(item: Schema) -> Schema:
    return {"anyOf": [item, {"type": "array", "minItems": 1, "items": item}]}


def _properties(
    cls: type, *, grid: bool = False, without: Collection[str] = ()
) -> dict[str, Schema]:
    found = {}
    for info in fields_of(cls):
        if info.name in without:
            continue
        schema = adapter_schema(cls, info.name)
        if grid:
            values = {"type": "array", "minItems": 1, "items": schema}
            schema = {
                "anyOf": [
                    schema,
                    {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["grid"],
                        "properties": {"grid": values},
                    },
                ]
            }
        if not info.required:
            schema = {
                **schema,
                "default": (
                    list(info.default)
                    if isinstance(info.default, (tuple, frozenset))
                    else info.default
                ),
            }
        found[info.name] = {**schema, "description": info.doc} if info.doc else schema
    return found


def _object(cls: type, *, grid: bool = False) -> Schema:
    required = [info.name for info in fields_of(cls) if info.required]
    found = {
        "type": "object",
        "additionalProperties": False,
        "properties": _properties(cls, grid=grid),
    }
    return {**found, "required": required} if required else found


def _ladder() -> Schema:
    return {"enum": [f"ladder:{size}{end}" for size in LADDER_SIZES for end in ("", "-base")]}


def _model() -> Schema:
    properties = {
        info.name: (
            adapter_schema(ModelSpec, info.name) | ({"description": info.doc} if info.doc else {})
        )
        for info in fields_of(ModelSpec)
        if info.name != "align"
    }
    sources = {
        "path": {**_TEXT, "description": "A local folder or .gguf file."},
        "id": {**_TEXT, "description": "A Hugging Face id."},
    }
    align = {
        "anyOf": [{"type": "boolean"}, _object(AlignSpec)],
        "description": "Align the loaded model first.",
    }
    one = [{"required": [key]} for key in ("path", "id", "source")]
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {**properties, **sources, "align": align},
        "oneOf": one,
    }


def _training() -> Schema:
    strategy = {
        name: schema for name, schema in _properties(StrategyConfig).items() if name != "deepspeed"
    }
    found = _object(TrainingConfig)
    return {
        **found,
        "properties": {**found["properties"], **strategy, "deepspeed": _object(DeepSpeedConfig)},
    }


def _node() -> Schema:
    node = _object(NodeType)
    return {
        **node,
        "properties": {
            name: schema for name, schema in node["properties"].items() if name != "name"
        },
        "required": [name for name in node["required"] if name != "name"],
    }


def _source() -> Schema:
    source = _object(SourceSpec)
    source["properties"]["where"] = _WHERE
    return {"anyOf": [_TEXT, source]}


def _task() -> Schema:
    splits = {
        "type": "object",
        "additionalProperties": False,
        "properties": {split: _ref("source") for split in SPLITS},
    }
    columns = {
        "type": "object",
        "additionalProperties": False,
        "properties": {**{column: _TEXT for column in COLUMNS}, "where": _WHERE},
        "description": "Column mapping of all splits.",
    }
    options = {"anyOf": [_object(cls) for cls in TASK_OPTIONS.values()]}
    known = {
        name: schema
        for name, schema in _properties(TaskSpec).items()
        if name in ("labels", "instruction")
    }
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            **known,
            "kind": {"enum": list(TASK_KINDS)},
            "name": _NAME,
            "splits": splits,
            "source": {"anyOf": [_TEXT, splits]},
            "columns": columns,
            "options": options,
        },
    }


def _methods(registry: Registry) -> Schema:
    choices: list[Schema] = [{"enum": registry.names()}]
    for name in registry.names():
        cls = registry.get(name)
        parameters = {
            **_object(cls, grid=True),
            "description": summary(sections(registry.doc(name))[""]),
        }
        if is_searchable(cls):
            parameters["properties"][SEARCH] = _search(cls)
        choices.append(
            {
                "type": "object",
                "additionalProperties": False,
                "required": [name],
                "properties": {name: {"anyOf": [parameters, {"type": "null"}]}},
            }
        )
    return {"anyOf": choices}


def _search(cls: type[Method]) -> Schema:
    owned: list[tuple[str, type, str]] = [(info.name, cls, info.name) for info in fields_of(cls)]
    owned += [
        (TRAINING + info.name, TrainingConfig, info.name) for info in fields_of(TrainingConfig)
    ]
    ranges: dict[str, Schema] = {}
    for name, owner, field in owned:
        one = adapter_schema(owner, field)
        ends = {
            "type": "object",
            "additionalProperties": False,
            "required": ["low", "high"],
            "properties": {"low": one, "high": one, "log": {"type": "boolean", "default": False}},
        }
        ranges[name] = {
            "anyOf": [{"type": "array", "minItems": 2, "uniqueItems": True, "items": one}, ends]
        }
    found = _properties(SearchSpec, without=("ranges", "metric"))
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["trials", "ranges"],
        "description": "How an attacker looks for the strongest setting that is not noticed.",
        "properties": {
            **found,
            "metric": {"enum": list(CHOICES), "default": success_metric(cls)},
            "ranges": {
                "type": "object",
                "minProperties": 1,
                "additionalProperties": False,
                "properties": ranges,
            },
        },
    }


def _stack() -> Schema:
    inside = {"allOf": [_ref("defense"), {"not": {"const": NONE}}]}
    return {"anyOf": [_ref("defense"), {"type": "array", "minItems": 1, "items": inside}]}
