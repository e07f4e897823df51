"""`search:` on an attack: the ranges in which an attacker looks for the strongest setting, and how
far a trial may go.

    - harmful_tuning:
        shots: 10
        search: trials: 12 ranges: {shots: [4, 8, 16], training.learning_rate: {low: 1.0e-5, high:
          2.0e-3, log: true}}

A list names the values to choose from, `low` and `high` a range of the parameter's own type. A name
is a parameter of the attack, or `training.` and one of the tune's, where the attacker owns the
tune. Every fault is told with those of the file.
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
from ftsec_ray.success import CHOICES, success_metric

SEARCH = "search"
_ALONE = "one value alone belongs beside `search`"
_ENDS = ("low", "high", "log")


def is_searchable(cls: type[Method]) -> bool:
    """Whether a method is an attack that does something."""
    return cls.KIND == "attack" and success_metric(cls) is not None


def search_of(attack: Method, given: object, place: str, faults: Faults) -> AttackSearch | None:
    """The search of an attack, None with faults."""
    keys = [one.name for one in fields(SearchSpec)]
    if not isinstance(given, Mapping):
        faults.add(
            place,
            "not a mapping",
            given,
            "a mapping of " + ", ".join(keys),
            "see `search:` in the README",
        )
        return None
    before = len(faults.found)
    unknown_keys(given, keys, place, faults)
    if not is_searchable(type(attack)):
        faults.add(
            place,
            "a search on no attack",
            sorted(map(str, given)),
            "an attack that does something",
            "take `search` away",
        )
    ranges = _ranges(attack, given.get("ranges"), f"{place}.ranges", faults)
    metric = given.get("metric", success_metric(attack))
    if metric not in CHOICES and "metric" in given:
        faults.add(
            f"{place}.metric",
            "no metric that a search can aim at",
            metric,
            " | ".join(CHOICES),
            nearest(metric, CHOICES),
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
            "no range to search",
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
    found = [
        _range(attack, name, known[name], value, f"{place}.{name}", faults)
        for name, value in given.items()
        if name in known
    ]
    return tuple(sorted((one for one in found if one is not None), key=lambda one: one.name))


def _range(
    attack: Method, name: str, owner: tuple[type, str], given: object, place: str, faults: Faults
) -> Range | None:
    if isinstance(given, (list, tuple)):
        found = _choices(name, attack, owner, given, place, faults)
    elif isinstance(given, Mapping):
        found = _interval(name, attack, owner, given, place, faults)
    else:
        faults.add(
            place,
            "not a range",
            given,
            "a list of values, or {low: .., high: .., log: true or false}",
            _ALONE,
        )
        return None
    cls, field = owner
    if found is None or cls is TrainingConfig:
        return found
    ends = found.choices or (found.low, found.high)
    wrong = [fault for value in ends for fault in replace(attack, **{field: value}).check()]
    for what, got, want in dict.fromkeys(wrong):
        faults.add(place if what == field else f"{place} ({what})", "value out of range", got, want)
    return None if wrong else found


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
            "an empty range" if len(values) < 2 else "a value twice",
            list(given),
            "two different values or more",
            _ALONE,
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
    if not any(
        one.get("type") in ("integer", "number") for one in info.schema.get("anyOf", [info.schema])
    ):
        faults.add(
            place, "a range of what is no number", dict(given), f"a list of values: {info.type}"
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
            place, "ends that are no numbers", dict(given), info.type, "name the values in a list"
        )
    elif not ends[0] < ends[1]:
        faults.add(place, "an empty range", dict(given), "low below high", _ALONE)
    elif log and ends[0] <= 0:
        faults.add(f"{place}.low", "no logarithm", ends[0], "above 0 where log is true")
    if len(faults.found) > before:
        return None
    is_int = all(isinstance(end, int) for end in ends)
    low, high = ends if is_int else map(float, ends)
    return Range(name=name, low=low, high=high, log=log)


def _value(
    attack: Method, owner: tuple[type, str], given: object, place: str, faults: Faults
) -> Any:
    """One value of a searched parameter in its own type, everything else as the attack has it."""
    cls, field = owner
    others = {}
    if cls is not TrainingConfig:
        own = [f.name for f in fields(attack) if f.init and f.name != field]
        others = {name: getattr(attack, name) for name in own}
    # Whether the attack accepts it is told of the range, not of each value.
    parsed = parse(cls, {field: given}, place, faults, {field: place}, **others)
    return None if parsed is None else getattr(parsed, field)
