"""Plain values -> typed dataclasses, by pydantic and the rules of JSON: an int may serve as a
float, a list as a tuple, and nothing else changes its type.

Configs and methods are standard dataclasses; a sweep file and a worker that reads a stage come
through the same function. Every fault keeps its place, the value got, the type wanted and what the
field means.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ftsec_ray.config.faults import Faults, nearest
from ftsec_ray.errors import IdentityError, SpecError
from ftsec_ray.identity import canonical
from ftsec_ray.method import Method

if TYPE_CHECKING:
    from pydantic import ConfigDict, TypeAdapter, ValidationError

T = TypeVar("T")
Schema = dict[str, Any]
STRICT: ConfigDict = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
_AS_WRITTEN: Mapping[str, str] = MappingProxyType({})
_WORDS = {
    "integer": ("integer", "integers"),
    "number": ("number", "numbers"),
    "string": ("text", "texts"),
    "boolean": ("true or false", "true or false"),
    "null": ("null", "null"),
    "object": ("mapping", "mappings"),
    "any": ("any value", "values"),
}
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


class FieldInfo(NamedTuple):
    """One parameter of a dataclass: what a catalogue, a schema and a message say about it."""

    name: str
    type: str
    """In words: `integer, >= 1`."""
    default: object
    """The default value; MISSING where it is required."""
    doc: str
    schema: Schema
    """JSON schema of its values."""

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is MISSING


@cache
def _adapter(cls: Any, *, docs: bool = False) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    # `None` is beside it because pydantic takes no configuration for a dataclass alone.
    return TypeAdapter(cls | None, config=STRICT | {"use_attribute_docstrings": docs})


@cache
def class_schema(cls: Any) -> Schema:
    """JSON schema of the mappings that `build` reads; descriptions are the docstrings."""
    whole = _adapter(cls, docs=True).json_schema()
    schema: Schema = _tidy(whole["anyOf"][0], whole["$defs"])
    for base in cls.__mro__[1:]:  # pydantic reads the docstrings of the class itself alone
        if hasattr(base, "__dataclass_fields__") and fields(base):
            for name, known in class_schema(base)["properties"].items():
                if "description" in known:
                    schema["properties"][name].setdefault("description", known["description"])
    return schema


def _tidy(node: Any, parts: Mapping[str, Any]) -> Any:
    """A schema with its references filled in, without titles, and descriptions on one line."""
    if isinstance(node, list):
        return [_tidy(item, parts) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        node = {**parts[node["$ref"].rsplit("/", 1)[-1]], **node}
    left_out = ("$ref", "$defs", "title", "properties")
    tidy = {
        key: value if key == "default" else _tidy(value, parts)
        for key, value in node.items()
        if key not in left_out
    }
    if "description" in tidy:
        tidy["description"] = " ".join(tidy["description"].split())
    if "properties" in node:
        inner = {name: _tidy(value, parts) for name, value in node["properties"].items()}
        tidy |= {"properties": inner, "additionalProperties": False}
    return tidy


def fields_of(cls: Any) -> tuple[FieldInfo, ...]:
    """What is known of each field of a dataclass."""
    properties = class_schema(cls)["properties"]
    found = []
    for f in fields(cls):
        if f.init:
            default = f.default if f.default_factory is MISSING else f.default_factory()
            schema = properties[f.name]
            doc = schema.get("description", "")
            found.append(FieldInfo(f.name, words(schema), default, doc, schema))
    return tuple(found)


def words(schema: Schema, *, plural: bool = False) -> str:
    """A JSON schema in words: `integer, >= 1`, `one of lora | full`, `list of texts`."""
    if "anyOf" in schema:
        return " or ".join(words(one, plural=plural) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return _one_of(schema.get("enum", [schema.get("const")]))
    if "prefixItems" in schema:
        inner = [words(item) for item in schema["prefixItems"]]
        return f"list of {len(inner)}: " + ", ".join(inner)
    if schema.get("type") == "array":
        return "list of " + words(schema["items"], plural=True)
    bounds = [f"{sign} {schema[key]}" for key, sign in _BOUNDS.items() if key in schema]
    return ", ".join([_WORDS[schema.get("type", "any")][plural], *bounds])


def _one_of(values: Sequence[object]) -> str:
    """The values that are allowed: `one of lora | full`."""
    named = " | ".join(
        str(value).lower() if isinstance(value, bool) else str(value) for value in values
    )
    return f"one of {named}" if len(values) > 1 else named


def unknown_keys(
    given: Mapping[Any, object], known: Collection[str], place: str, faults: Faults
) -> None:
    """A fault for each key that is not known."""
    for key in given:
        if key not in known:
            faults.add(
                f"{place}.{key}" if place else str(key),
                "unknown key",
                key,
                " | ".join(sorted(known)) or "no keys",
                nearest(key, known),
            )


def parse(
    cls: type[T],
    given: object,
    place: str,
    faults: Faults,
    places: Mapping[str, str] = _AS_WRITTEN,
    /,
    **fixed: object,
) -> T | None:
    """A dataclass from a mapping, None with faults; a method is not asked whether it accepts the
    values together.

    Args:
        cls: The dataclass.
        given: Values as YAML or JSON has them; None is the empty mapping.
        place: Of the mapping in the file.
        faults: Where faults go.
        places: Field -> its place, where that is not `place.field`.
        **fixed: Values of fields that are taken as they are and are not keys of the mapping.
    """
    from pydantic import ValidationError

    key: Any = cls  # mypy holds that a dataclass type cannot be hashed
    given = {} if given is None else given
    names = [f.name for f in fields(key) if f.init and f.name not in fixed]
    if not isinstance(given, Mapping):
        want, fix = "a mapping of " + ", ".join(names), f"write {place.rsplit('.', 1)[-1]}: {{...}}"
        faults.add(place, "not a mapping", given, want, fix)
        return None
    before = len(faults.found)
    unknown_keys(given, names, place, faults)
    wrong: dict[str, tuple[str, object]] = {}
    texts: list[str] = []
    for name, value in {**{name: given[name] for name in names if name in given}, **fixed}.items():
        try:
            _adapter(object).validate_json(text := canonical(value))
            texts.append(f"{json.dumps(name)}:{text}")
        except (IdentityError, RecursionError, ValueError) as error:
            wrong[name] = ("not a plain, finite value", getattr(error, "got", value))
    parsed: T | None = None
    try:
        parsed = _adapter(key).validate_json("{" + ",".join(texts) + "}")
        parsed = replace(parsed, **fixed) if fixed else parsed  # type: ignore[type-var]
    except ValidationError as error:
        wrong = _wrong_values(error, given) | wrong
    except SpecError as error:
        if len(faults.found) == before and not wrong:  # else it may be of the values left out
            faults.add_error(place, error)
    for info in fields_of(key) if wrong else ():
        if info.name in wrong and info.name not in fixed:
            where = places.get(info.name, f"{place}.{info.name}")
            faults.add(where, *wrong[info.name], info.type, info.doc)
    if "" in wrong:
        faults.add(place, *wrong[""])
    return parsed if len(faults.found) == before else None


def _wrong_values(
    error: ValidationError, given: Mapping[str, object]
) -> dict[str, tuple[str, object]]:
    """Field -> what is wrong and the value got; `""` is a ValueError of the class itself."""
    wrong: dict[str, tuple[str, object]] = {}
    for fault in error.errors(include_url=False):
        name, *inner = fault["loc"] or ("",)
        where = "".join(f"[{part}]" for part in inner if isinstance(part, int))
        if not name:
            found: tuple[str, object] = (f"wrong value: {fault['msg']}", dict(given))
        elif fault["type"] == "missing" and not inner:
            found = ("missing", None)
        else:
            found = ("wrong value" + (f" at {where}" if where else ""), given.get(str(name)))
        wrong.setdefault(str(name), found)  # a field of several types has a fault for each
    return wrong


def build(
    cls: type[T],
    given: object,
    place: str,
    faults: Faults,
    places: Mapping[str, str] = _AS_WRITTEN,
    /,
    **fixed: object,
) -> T | None:
    """What `parse` gives; of a method only one whose parameters pass its own `check`."""
    parsed = parse(cls, given, place, faults, places, **fixed)
    wrong = parsed.check() if isinstance(parsed, Method) else []
    for name, got, want in wrong:
        doc = next((info.doc for info in fields_of(cls) if info.name == name), "")
        faults.add(places.get(name, f"{place}.{name}"), "value out of range", got, want, doc)
    return None if wrong else parsed
