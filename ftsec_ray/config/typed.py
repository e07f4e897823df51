"""Plain values -> typed dataclasses, strictly: an int may serve as a float, nothing else changes
its type.

The types and bounds are those of the dataclass fields, checked by pydantic; every fault keeps its
place, the value got, the type wanted and what the field means.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

from ftsec_ray.config.docs import field_docs
from ftsec_ray.config.faults import Faults, nearest
from ftsec_ray.errors import SpecError

T = TypeVar("T")
MAX_DEPTH = 20
_WORDS = {
    int: ("an int", "ints"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
    bool: ("true or false", "true or false"),
    type(None): ("null", "null"),
}


@dataclass(frozen=True, kw_only=True)
class FieldInfo:
    """One parameter of a dataclass: what a catalogue, a schema and a message say about it."""

    name: str
    type: str
    """In words: `an int, >= 1`."""
    default: object
    """The default value; MISSING where it is required."""
    doc: str

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is MISSING


@cache
def hints_of(cls: Any) -> dict[str, Any]:
    """Field name -> resolved type, with bounds, of a dataclass."""
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in fields(cls) if f.init}


def fields_of(cls: type) -> tuple[FieldInfo, ...]:
    """What is known of each field of a dataclass."""
    key: Any = cls  # mypy holds that a dataclass type cannot be hashed
    return _fields_of(key)


@cache
def _fields_of(cls: Any) -> tuple[FieldInfo, ...]:
    docs = field_docs(cls)
    found = []
    for f in fields(cls):
        if f.init:
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            found.append(
                FieldInfo(
                    name=f.name,
                    type=words(hints_of(cls)[f.name]),
                    default=default,
                    doc=docs.get(f.name, ""),
                )
            )
    return tuple(found)


def words(hint: Any, *, plural: bool = False) -> str:
    """A type in words: `an int, >= 1`, `lora | full`, `a list of texts`."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = [
            f"{sign} {getattr(mark, name)}"
            for mark in args[1:]
            for kind, name, sign in (
                (Ge, "ge", ">="),
                (Gt, "gt", ">"),
                (Le, "le", "<="),
                (Lt, "lt", "<"),
            )
            if isinstance(mark, kind)
        ]
        return ", ".join([words(args[0], plural=plural), *bounds])
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " or ".join(words(arg, plural=plural) for arg in args)
    if origin in (tuple, list, set, frozenset):
        inner = [arg for arg in args if arg is not Ellipsis]
        if origin is tuple and Ellipsis not in args:
            return f"a list of {len(inner)}: " + ", ".join(words(arg) for arg in inner)
        return "a list of " + " or ".join(words(arg, plural=True) for arg in inner)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping"
    singular, several = _WORDS.get(hint, (str(getattr(hint, "__name__", hint)),) * 2)
    return several if plural else singular


@cache
def _adapter(cls: Any, name: str) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(hints_of(cls)[name])


def adapter_schema(cls: type, name: str) -> dict[str, Any]:
    """JSON schema of one field."""
    schema: dict[str, Any] = _adapter(cls, name).json_schema()
    return schema


def _unplain(value: object, depth: int = 0) -> object | None:
    """The first part of a value that JSON cannot carry; None when there is none."""
    if depth > MAX_DEPTH:
        return value
    if isinstance(value, Mapping):
        odd = [key for key in value if not isinstance(key, str)]
        return (
            odd[0]
            if odd
            else next(
                (bad for item in value.values() if (bad := _unplain(item, depth + 1)) is not None),
                None,
            )
        )
    if isinstance(value, (list, tuple)):
        return next((bad for item in value if (bad := _unplain(item, depth + 1)) is not None), None)
    if isinstance(value, float) and not math.isfinite(value):
        return value
    return None if value is None or isinstance(value, (str, bool, int, float)) else value


def value_of(cls: type, name: str, value: object) -> Any:
    """A field's value in the field's own type; SpecError when it has another."""
    from pydantic import ValidationError

    doc = field_docs(cls).get(name, "")
    want = words(hints_of(cls)[name])
    bad = _unplain(value)
    if bad is not None:
        raise SpecError("not a plain, finite value", bad, want, doc)
    try:
        return _adapter(cls, name).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"[{part}]" for part in first["loc"] if isinstance(part, int))
        raise SpecError(
            "wrong value" + (f" at {where}" if where else ""), value, want, doc
        ) from None


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


def build(cls: type[T], given: object, place: str, faults: Faults, **fixed: object) -> T | None:
    """A dataclass from a mapping, None with faults; `fixed` values are taken as they are and are
    not keys of the mapping.
    """
    if given is None:
        given = {}
    infos = {info.name: info for info in fields_of(cls) if info.name not in fixed}
    if not isinstance(given, Mapping):
        faults.add(
            place,
            "not a mapping",
            given,
            "a mapping of " + ", ".join(infos),
            f"write {place.rsplit('.', 1)[-1]}: {{...}}",
        )
        return None
    before = len(faults.found)
    unknown_keys(given, infos, place, faults)
    values: dict[str, object] = dict(fixed)
    for name, info in infos.items():
        if name in given:
            try:
                values[name] = value_of(cls, name, given[name])
            except SpecError as error:
                faults.add_error(f"{place}.{name}", error)
        elif info.required:
            faults.add(f"{place}.{name}", "missing", None, info.type, info.doc)
    if len(faults.found) > before:
        return None
    try:
        return cls(**values)
    except SpecError as error:
        faults.add_error(place, error)
        return None
