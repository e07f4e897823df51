"""`search:` on an attack: the parameter ranges that the search tries, and its limits.

    - harmful_tuning:
        shots: 10
        search:
          trials: 12
          ranges:
            shots: [4, 8, 16]
            training.learning_rate: {low: 1.0e-5, high: 2.0e-3, log: true}

A list gives the values to choose from; `low` and `high` give a range of the parameter's own type. A
name is a parameter of the attack, or `training.` plus a parameter of the fine-tune if the attacker
controls the fine-tune. All errors are reported together with those of the rest of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from ftsec_ray.config.faults import Faults, nearest
from ftsec_ray.config.sweep import TRAINING, AttackSearch, Range, SearchSpec, TrainingConfig
from ftsec_ray.config.typed import build, fields_of, parse, unknown_keys
from ftsec_ray.identity import canonical
from ftsec_ray.method import Method
from ftsec_ray.success import choices, success_metric

SEARCH = "search"
_FIXED_VALUE = "set a fixed value outside `search`, as a parameter of the attack"
_ENDS = ("low", "high", "log")


def is_searchable(cls: type[Method]) -> bool:
    """Whether a method is an attack with a success metric, so anything but `none`."""
    return cls.KIND == "attack" and success_metric(cls) is not None


def search_of(attack: Method, given: object, place: str, faults: Faults) -> AttackSearch | None:
    """The search of an attack; None if it has faults."""
    keys = [f.name for f in fields(SearchSpec)]
    if not isinstance(given, Mapping):
        faults.add(
            place,
            "not a mapping",
            given,
            "a mapping of " + ", ".join(keys),
            "see `search` in sweeps/README.md",
        )
        return None
    before = len(faults.found)
    unknown_keys(given, keys, place, faults)
    if not is_searchable(type(attack)):
        faults.add(
            place,
            "`search` works only on attacks that have a success metric",
            sorted(map(str, given)),
            "an attack other than none",
            "remove `search`",
        )
    ranges = _ranges(attack, given.get("ranges"), f"{place}.ranges", faults)
    metric = given.get("metric", success_metric(attack))
    if metric not in choices() and "metric" in given:
        faults.add(
            f"{place}.metric",
            "a search cannot optimize this metric",
            metric,
            " | ".join(choices()),
            nearest(metric, choices()),
        )
    plain = {
        key: value
        for key, value in given.items()
        if key in keys and key not in ("ranges", "metric")
    }
    search = build(SearchSpec, plain, place, faults, ranges=ranges, metric=metric)
    return (
        None
        if search is None or len(faults.found) > before
        else AttackSearch(attack=attack, search=search)
    )


def _ranges(attack: Method, given: object, place: str, faults: Faults) -> tuple[Range, ...]:
    if not isinstance(given, Mapping) or not given:
        faults.add(
            place,
            "`ranges` names no parameter",
            given,
            "a mapping such as {training.learning_rate: {low: 1.0e-5, high: 1.0e-3, log: true}}",
            "name at least one parameter",
        )
        return ()
    cls = type(attack)
    known: dict[str, tuple[type, str]] = {
        **{f.name: (cls, f.name) for f in fields(cls) if f.init},
        **{f"{TRAINING}{f.name}": (TrainingConfig, f.name) for f in fields(TrainingConfig)},
    }
    unknown_keys(given, known, place, faults)
    ranges = [
        _range(attack, name, known[name], value, f"{place}.{name}", faults)
        for name, value in given.items()
        if name in known
    ]
    return tuple(sorted((r for r in ranges if r is not None), key=lambda r: r.name))


def _range(
    attack: Method, name: str, owner: tuple[type, str], given: object, place: str, faults: Faults
) -> Range | None:
    if isinstance(given, (list, tuple)):
        searched = _choices(name, attack, owner, given, place, faults)
    elif isinstance(given, Mapping):
        searched = _interval(name, attack, owner, given, place, faults)
    else:
        faults.add(
            place,
            "not a range",
            given,
            "a list of values, or {low: .., high: .., log: true or false}",
            _FIXED_VALUE,
        )
        return None
    cls, field = owner
    if searched is None or cls is TrainingConfig:
        return searched
    ends = searched.choices or (searched.low, searched.high)
    wrong = [fault for value in ends for fault in replace(attack, **{field: value}).check()]
    for what, got, want in dict.fromkeys(wrong):
        faults.add(place if what == field else f"{place} ({what})", "value out of range", got, want)
    return None if wrong else searched


def _choices(
    name: str,
    attack: Method,
    owner: tuple[type, str],
    given: list[Any] | tuple[Any, ...],
    place: str,
    faults: Faults,
) -> Range | None:
    before = len(faults.found)
    values = [
        _value(attack, owner, value, f"{place}[{index}]", faults)
        for index, value in enumerate(given)
    ]
    if len(faults.found) > before:
        return None
    if len({canonical(value) for value in values}) < max(2, len(values)):
        faults.add(
            place,
            "fewer than two values" if len(values) < 2 else "a duplicate value",
            list(given),
            "two or more different values",
            _FIXED_VALUE,
        )
        return None
    return Range(name=name, choices=tuple(values))


def _interval(
    name: str,
    attack: Method,
    owner: tuple[type, str],
    given: Mapping[Any, Any],
    place: str,
    faults: Faults,
) -> Range | None:
    before = len(faults.found)
    unknown_keys(given, _ENDS, place, faults)
    info = next(info for info in fields_of(owner[0]) if info.name == owner[1])
    types = info.schema.get("anyOf", [info.schema])
    if not any(schema.get("type") in ("integer", "number") for schema in types):
        faults.add(
            place,
            "low and high given for a parameter that is not a number",
            dict(given),
            f"a list of values: {info.type}",
        )
        return None
    ends: list[Any] = []
    for end in ("low", "high"):
        if given.get(end) is None:
            faults.add(f"{place}.{end}", "missing", None, info.type)
        else:
            ends.append(_value(attack, owner, given[end], f"{place}.{end}", faults))
    log = given.get("log", False)
    if not isinstance(log, bool):
        faults.add(f"{place}.log", "wrong value", log, "true or false")
    if len(faults.found) > before:
        return None
    if any(isinstance(end, bool) or not isinstance(end, (int, float)) for end in ends):
        faults.add(
            place, "low and high are not numbers", dict(given), info.type, "list the values instead"
        )
    elif not ends[0] < ends[1]:
        faults.add(place, "an empty range", dict(given), "low below high", _FIXED_VALUE)
    elif log and ends[0] <= 0:
        faults.add(f"{place}.low", "log: true needs a positive low", ends[0], "a number > 0")
    if len(faults.found) > before:
        return None
    is_int = all(isinstance(end, int) for end in ends)
    low, high = ends if is_int else map(float, ends)
    return Range(name=name, low=low, high=high, log=log)


def _value(
    attack: Method, owner: tuple[type, str], given: object, place: str, faults: Faults
) -> Any:
    """One value of a searched parameter, converted to its type; the attack's other parameters stay
    as they are.
    """
    cls, field = owner
    others = {}
    if cls is not TrainingConfig:
        own = [f.name for f in fields(attack) if f.init and f.name != field]
        others = {name: getattr(attack, name) for name in own}
    # `_range` checks once per range whether the attack accepts the values.
    parsed = parse(cls, {field: given}, place, faults, {field: place}, **others)
    return None if parsed is None else getattr(parsed, field)
