"""Plain values -> typed dataclasses, by pydantic and the rules of JSON: an int is accepted for a
float and a list for a tuple; no other type is converted.

Configs and methods are standard dataclasses. Sweep files and workers that read a stage use the same
function. Every fault holds its place, the value got, the type wanted and the meaning of the field.
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
    """One field of a dataclass, as catalogues, schemas and messages describe it."""

    name: str
    type: str
    """In words: `integer >= 1`."""
    default: object
    """The default value; MISSING if the field is required."""
    doc: str
    schema: Schema
    """JSON schema of its values."""

    @property
    def required(self) -> bool:
        """Whether the field has no default."""
        return self.default is MISSING


@cache
def _adapter(cls: Any, *, docs: bool = False) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    # `| None` because pydantic accepts no configuration for a plain dataclass.
    return TypeAdapter(cls | None, config=STRICT | {"use_attribute_docstrings": docs})


@cache
def class_schema(cls: Any) -> Schema:
    """JSON schema of the mappings that `build` reads; descriptions are the docstrings."""
    whole = _adapter(cls, docs=True).json_schema()
    schema: Schema = _tidy(whole["anyOf"][0], whole["$defs"])
    for base in cls.__mro__[1:]:  # pydantic does not read the docstrings of base classes
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
    """A description of each field of a dataclass."""
    properties = class_schema(cls)["properties"]
    infos = []
    for f in fields(cls):
        if f.init:
            default = f.default if f.default_factory is MISSING else f.default_factory()
            schema = properties[f.name]
            doc = schema.get("description", "")
            infos.append(FieldInfo(f.name, words(schema), default, doc, schema))
    return tuple(infos)


def words(schema: Schema, *, plural: bool = False) -> str:
    """A JSON schema in words: `integer >= 1`, `one of lora | full`, `list of texts`."""
    if "anyOf" in schema:
        return " or ".join(words(choice, plural=plural) for choice in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return _one_of(schema.get("enum", [schema.get("const")]))
    if "prefixItems" in schema:
        inner = [words(item) for item in schema["prefixItems"]]
        return f"list of {len(inner)}: " + ", ".join(inner)
    if schema.get("type") == "array":
        return ("lists of " if plural else "list of ") + words(schema["items"], plural=True)
    bounds = [f"{sign} {schema[key]}" for key, sign in _BOUNDS.items() if key in schema]
    return f"{_WORDS[schema.get('type', 'any')][plural]} {', '.join(bounds)}".rstrip()


def _one_of(values: Sequence[object]) -> str:
    """The values that are allowed: `one of lora | full`."""
    named = " | ".join(
        str(value).lower() if isinstance(value, bool) else str(value) for value in values
    )
    return f"one of {named}" if len(values) > 1 else named


def unknown_keys(
    given: Mapping[Any, object], known: Collection[str], place: str, faults: Faults
) -> None:
    """Record a fault for each unknown key."""
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
    """A dataclass from a mapping, or None with faults; a method's own `check` does not run.

    Args:
        cls: The dataclass.
        given: A mapping of values as YAML or JSON reads them; None is the empty mapping.
        place: Place of the mapping in the file.
        faults: Collects the faults.
        places: Field -> its place, if that is not `place.field`.
        **fixed: Values of further fields, which must not be keys of the mapping.
    """
    from pydantic import ValidationError

    key: Any = cls  # mypy thinks that a dataclass type cannot be hashed
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
            wrong[name] = ("not a JSON value with finite numbers", getattr(error, "got", value))
    parsed: T | None = None
    try:
        parsed = _adapter(key).validate_json("{" + ",".join(texts) + "}")
        parsed = replace(parsed, **fixed) if fixed else parsed  # type: ignore[type-var]
    except ValidationError as error:
        wrong = _wrong_values(error, given) | wrong
    except SpecError as error:
        if len(faults.found) == before and not wrong:  # else the missing values may cause it
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
    """Field -> (what is wrong, value got); the key `""` is a ValueError of the class itself."""
    wrong: dict[str, tuple[str, object]] = {}
    for fault in error.errors(include_url=False):
        name, *inner = fault["loc"] or ("",)
        where = "".join(f"[{part}]" for part in inner if isinstance(part, int))
        if not name:
            what_got: tuple[str, object] = (f"wrong value: {fault['msg']}", dict(given))
        elif fault["type"] == "missing" and not inner:
            what_got = ("missing", None)
        else:
            what_got = ("wrong value" + (f" at {where}" if where else ""), given.get(str(name)))
        wrong.setdefault(str(name), what_got)  # pydantic reports each type of a union
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
    """As `parse`, plus the faults that a method's own `check` reports."""
    parsed = parse(cls, given, place, faults, places, **fixed)
    wrong = parsed.check() if isinstance(parsed, Method) else []
    for name, got, want in wrong:
        doc = next((info.doc for info in fields_of(cls) if info.name == name), "")
        faults.add(places.get(name, f"{place}.{name}"), "value out of range", got, want, doc)
    return None if wrong else parsed
