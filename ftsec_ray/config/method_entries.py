"""The method axes of a sweep: names, parameters, grids and stacks -> typed methods.

`badnets`, `{badnets: {rate: 0.1}}` and, for defenses, a list of these as a stack. `{grid: [..]}` in
the place of any parameter's value gives one method per value, several grids their product. A method
that comes out twice is a fault: nearly always a slip, and merging it would make the number of cells
a surprise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from itertools import product
from math import prod
from typing import TypeVar

from ftsec_ray.config.attack_search import SEARCH, search_of
from ftsec_ray.config.faults import Faults
from ftsec_ray.config.limits import POINTS
from ftsec_ray.config.sweep import AttackSearch
from ftsec_ray.config.typed import build
from ftsec_ray.errors import SpecError
from ftsec_ray.identity import canonical
from ftsec_ray.method import Method
from ftsec_ray.registry import ATTACKS, DEFENSES, Registry, name_of

Stack = tuple[Method, ...]
T = TypeVar("T")
NONE = "none"


def attacks_of(
    given: object, faults: Faults
) -> tuple[tuple[Method, ...], tuple[AttackSearch, ...]]:
    """The attacks of a sweep, grids expanded, and the searches that stand beside their
    parameters.
    """
    found: list[tuple[str, Method]] = []
    searches: list[AttackSearch | None] = []
    for place, entry in _entries(given, "attacks", ATTACKS, faults):
        if isinstance(entry, (list, tuple)):
            faults.add(
                place,
                "a list of attacks",
                entry,
                "one attack per entry",
                "a cell has one attack; stacks are for defenses",
            )
            continue
        plain, search = _without_search(entry)
        attacks = _methods(plain, place, ATTACKS, faults)
        found += [(place, attack) for attack in attacks]
        if search is not None:
            where = f"{place}.{_name(plain)}.{SEARCH}"
            _refuse_grids(plain, search, where, faults)
            # A fault of the search is one fault, however many attacks a grid beside it gives.
            for attack in attacks:
                searches.append(search_of(attack, search, where, faults))
                if searches[-1] is None:
                    break
    return tuple(_unique(found, lambda attack: (attack,), faults)), tuple(
        one for one in searches if one is not None
    )


def _refuse_grids(entry: object, search: object, place: str, faults: Faults) -> None:
    """A fault for each parameter that a grid beside a search gives and the search looks for: the
    searches would be the same.
    """
    given = next(iter(entry.values())) if isinstance(entry, Mapping) else {}
    ranges = search.get("ranges") if isinstance(search, Mapping) else None
    for name in ranges if isinstance(ranges, Mapping) else ():
        if isinstance(given.get(name), Mapping) and "grid" in given[name]:
            faults.add(
                f"{place}.ranges.{name}",
                "a grid beside the search for the same parameter",
                given[name],
                "one value for the fixed attack",
                "write a second entry for another fixed attack",
            )


def _without_search(entry: object) -> tuple[object, object | None]:
    """An entry of the axis and its search, if any."""
    name = _name(entry)
    given = entry[name] if isinstance(entry, Mapping) and name is not None else None
    if name is None or not isinstance(given, Mapping) or SEARCH not in given:
        return entry, None
    search = given[SEARCH]
    return {name: {key: value for key, value in given.items() if key != SEARCH}}, (
        {} if search is None else search
    )


def defenses_of(given: object, faults: Faults) -> tuple[Stack, ...]:
    """The stacks of defenses of a sweep, grids expanded; `none` is the empty stack."""
    found: list[tuple[str, Stack]] = []
    for place, entry in _entries(given, "defenses", DEFENSES, faults):
        found += [(place, stack) for stack in _stacks(entry, place, faults)]
    return tuple(_unique(found, lambda stack: stack, faults))


def _entries(
    given: object, axis: str, registry: Registry, faults: Faults
) -> list[tuple[str, object]]:
    if given == "all":
        names = sorted(registry.names(), key=lambda name: (name != NONE, name))
        return [(f"{axis}[{name}]", name) for name in names]
    if isinstance(given, (list, tuple)) and given:
        return [(f"{axis}[{index}]", entry) for index, entry in enumerate(given)]
    if isinstance(given, str):
        return [(axis, given)]
    faults.add(
        axis,
        f"no {axis}" if not given else f"{axis} is not a list",
        given,
        f"a list such as [none, ...], or `all` for every {registry.kind}",
        f"see `ftsec list {axis}`",
    )
    return []


def _stacks(entry: object, place: str, faults: Faults) -> list[Stack]:
    if not isinstance(entry, (list, tuple)):
        if _name(entry) == NONE:
            _methods(entry, place, DEFENSES, faults)
            return [()]
        return [(defense,) for defense in _methods(entry, place, DEFENSES, faults)]
    names = [_name(member) for member in entry]
    for index, name in enumerate(names):
        if name == NONE:
            faults.add(
                f"{place}[{index}]",
                "`none` inside a stack",
                entry,
                "defenses",
                "`none` stands alone; leave it out of the stack",
            )
        elif name is not None and name in names[:index]:
            faults.add(
                f"{place}[{index}]",
                "the same defense twice in one stack",
                name,
                "each defense once in a stack",
                "write two stacks, or a grid, to compare settings",
            )
    if not entry:
        faults.add(
            place, "an empty stack", entry, "at least one defense", "write none for no defense"
        )
    before = len(faults.found)
    members = [
        _methods(member, f"{place}[{index}]", DEFENSES, faults)
        for index, member in enumerate(entry)
    ]
    if len(faults.found) > before or not entry or NONE in names:
        return []
    if fault := POINTS.exceeded_by(prod(map(len, members))):
        faults.add_error(place, fault)
        return []
    return list(product(*members))


def _name(entry: object) -> str | None:
    """The name that an entry gives, None where it gives none."""
    if isinstance(entry, Mapping) and len(entry) == 1:
        entry = next(iter(entry))
    return entry if isinstance(entry, str) else None


def _methods(entry: object, place: str, registry: Registry, faults: Faults) -> list[Method]:
    name = _name(entry)
    if name is None:
        faults.add(
            place,
            f"not the name of one {registry.kind}",
            entry,
            "a name, or {name: {parameter: value}}",
            "indent the parameters below the name" if isinstance(entry, Mapping) else "",
        )
        return []
    try:
        cls = registry.get(name)
    except SpecError as error:
        faults.add_error(place, error)
        return []
    given = entry[name] if isinstance(entry, Mapping) else None
    return _expand(cls, {} if given is None else given, f"{place}.{name}", faults)


def _expand(cls: type[Method], given: object, place: str, faults: Faults) -> list[Method]:
    names = [f.name for f in fields(cls) if f.init]
    if not isinstance(given, Mapping):
        faults.add(
            place,
            "parameters are not a mapping",
            given,
            "{" + ", ".join(names) + "}" if names else "no parameters",
            f"write {place.rsplit('.', 1)[-1]}: {{parameter: value}}",
        )
        return []
    no_grid = {
        key: f"{place}.{key}" for key, value in given.items() if key in names and _is_no_grid(value)
    }
    for key, where in no_grid.items():
        want = "{grid: [value, value, ...]} and nothing beside it"
        faults.add(where, "not a grid", given[key], want)
    axes = [
        _points(key, value, f"{place}.{key}") for key, value in given.items() if key not in no_grid
    ]
    if fault := POINTS.exceeded_by(prod(map(len, axes))):
        faults.add_error(place, fault)
        return []
    met = Faults(faults.source, faults.lines)
    found = []
    for point in product(*axes):
        values = {name: value for name, value, _ in point}
        places = {name: where for name, _, where in point}
        found.append(build(cls, values, place, met, places))
    # The points of a grid share values, and with them faults; what is no grid is not missing.
    told = {(where, fault.what): (where, fault) for where, fault in met.found}
    faults.found += [one for one in told.values() if one[0] not in no_grid.values()]
    return [method for method in found if method is not None and not no_grid]


def _is_no_grid(value: object) -> bool:
    """Whether a value is written as a grid and is none."""
    if not isinstance(value, Mapping) or "grid" not in value:
        return False
    values = value["grid"]
    return len(value) > 1 or not isinstance(values, (list, tuple)) or not values


def _points(name: str, given: object, place: str) -> list[tuple[str, object, str]]:
    """Each value of a parameter as (name, value, place)."""
    if isinstance(given, Mapping) and "grid" in given and not _is_no_grid(given):
        values = enumerate(given["grid"])
        return [(name, value, f"{place}.grid[{index}]") for index, value in values]
    return [(name, given, place)]


def _unique(found: list[tuple[str, T]], stack_of: Callable[[T], Stack], faults: Faults) -> list[T]:
    seen: dict[str, str] = {}
    kept: list[T] = []
    for place, item in found:
        names = [name_of(method) for method in stack_of(item)]
        text = canonical([names, list(stack_of(item))])
        if text in seen:
            where = (
                f"{seen[text]} gives it too" if seen[text] != place else "one grid gives it twice"
            )
            faults.add(
                place,
                "the same entry twice",
                " + ".join(names) or NONE,
                "each entry once",
                f"{where}; a default written out is the same as the default",
            )
        else:
            seen[text] = place
            kept.append(item)
    return kept
