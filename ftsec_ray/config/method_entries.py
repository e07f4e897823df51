"""The method axes of a sweep: names, parameters, grids and stacks -> typed methods.

An entry is `badnets` or `{badnets: {rate: 0.1}}`; for defenses, a list of entries is a stack. A
parameter value `{grid: [..]}` gives one method per value; several grids give their product. A
duplicate method is a fault: it is nearly always a mistake, and merging duplicates would change the
number of cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from itertools import product
from math import prod
from typing import TypeVar

from ftsec_ray.config.attack_search import SEARCH, search_of
from ftsec_ray.config.faults import Faults
from ftsec_ray.config.limits import POINTS
from ftsec_ray.config.sweep import AttackSearch, ExcludeRule
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
    """The attacks of a sweep with grids expanded, and their searches."""
    placed: list[tuple[str, Method]] = []
    searches: list[AttackSearch | None] = []
    for place, entry in _entries(given, "attacks", ATTACKS, faults):
        if isinstance(entry, (list, tuple)):
            faults.add(
                place,
                "a list of attacks",
                entry,
                "one attack per entry",
                "only defenses can be stacked",
            )
            continue
        plain, search = _without_search(entry)
        attacks = _methods(plain, place, ATTACKS, faults)
        placed += [(place, attack) for attack in attacks]
        if search is not None:
            where = f"{place}.{_name(plain)}.{SEARCH}"
            _refuse_grids(plain, search, where, faults)
            # Report a fault of the search once, not for each attack of a grid.
            for attack in attacks:
                searches.append(search_of(attack, search, where, faults))
                if searches[-1] is None:
                    break
    return tuple(_unique(placed, lambda attack: (attack,), faults)), tuple(
        search for search in searches if search is not None
    )


def _refuse_grids(entry: object, search: object, place: str, faults: Faults) -> None:
    """A fault for each parameter that has both a grid and a search range: each grid value would run
    the same search.
    """
    given = next(iter(entry.values())) if isinstance(entry, Mapping) else {}
    ranges = search.get("ranges") if isinstance(search, Mapping) else None
    for name in ranges if isinstance(ranges, Mapping) else ():
        if isinstance(given.get(name), Mapping) and "grid" in given[name]:
            faults.add(
                f"{place}.ranges.{name}",
                "the parameter has both a grid and a search range",
                given[name],
                "one value outside `search`",
                "add a second entry for each further fixed value",
            )


def _without_search(entry: object) -> tuple[object, object | None]:
    """An entry of the axis without its search, and the search if there is one."""
    name = _name(entry)
    given = entry[name] if isinstance(entry, Mapping) and name is not None else None
    if name is None or not isinstance(given, Mapping) or SEARCH not in given:
        return entry, None
    search = given[SEARCH]
    return {name: {key: value for key, value in given.items() if key != SEARCH}}, (
        {} if search is None else search
    )


def defenses_of(given: object, faults: Faults) -> tuple[Stack, ...]:
    """The defense stacks of a sweep with grids expanded; `none` is the empty stack."""
    placed: list[tuple[str, Stack]] = []
    for place, entry in _entries(given, "defenses", DEFENSES, faults):
        placed += [(place, stack) for stack in _stacks(entry, place, faults)]
    return tuple(_unique(placed, lambda stack: stack, faults))


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
                "remove `none` from the stack",
            )
        elif name is not None and name in names[:index]:
            faults.add(
                f"{place}[{index}]",
                "a duplicate defense in one stack",
                name,
                "each defense once in a stack",
                "to compare settings, write two stacks or a grid",
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
    """The method name of an entry; None if it has none."""
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
            "indent the parameters under the name" if isinstance(entry, Mapping) else "",
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
            "the parameters are not a mapping",
            given,
            "{" + ", ".join(names) + "}" if names else "no parameters",
            f"write {place.rsplit('.', 1)[-1]}: {{parameter: value}}",
        )
        return []
    no_grid = {
        key: f"{place}.{key}" for key, value in given.items() if key in names and _is_no_grid(value)
    }
    for key, where in no_grid.items():
        want = "{grid: [value, value, ...]} with no other key"
        faults.add(where, "not a grid", given[key], want)
    axes = [
        _points(key, value, f"{place}.{key}") for key, value in given.items() if key not in no_grid
    ]
    if fault := POINTS.exceeded_by(prod(map(len, axes))):
        faults.add_error(place, fault)
        return []
    point_faults = Faults(faults.source, faults.lines)
    methods = []
    for point in product(*axes):
        values = {name: value for name, value, _ in point}
        places = {name: where for name, _, where in point}
        methods.append(build(cls, values, place, point_faults, places))
    # Points of a grid share values, so they share faults: keep each once. A parameter whose grid is
    # malformed looks missing here; its fault is recorded above.
    unique = {(where, fault.what): (where, fault) for where, fault in point_faults.found}
    faults.found += [fault for fault in unique.values() if fault[0] not in no_grid.values()]
    return [method for method in methods if method is not None and not no_grid]


def is_excluded(rules: Iterable[ExcludeRule], attack: Method, stack: Stack, seed: int) -> bool:
    """Whether one of the rules leaves out the cell with these methods; they all concern its model
    and task.
    """
    return any(
        rule.matches(
            attack=name_of(attack), defenses=[name_of(method) for method in stack], seed=seed
        )
        for rule in rules
    )


def _is_no_grid(value: object) -> bool:
    """Whether a value is a malformed grid."""
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


def _unique(placed: list[tuple[str, T]], stack_of: Callable[[T], Stack], faults: Faults) -> list[T]:
    seen: dict[str, str] = {}
    kept: list[T] = []
    for place, item in placed:
        names = [name_of(method) for method in stack_of(item)]
        text = canonical([names, list(stack_of(item))])
        if text in seen:
            where = f"same as {seen[text]}" if seen[text] != place else "one grid contains it twice"
            faults.add(
                place,
                "a duplicate entry",
                " + ".join(names) or NONE,
                "each entry once",
                f"{where}; writing out a default value changes nothing",
            )
        else:
            seen[text] = place
            kept.append(item)
    return kept
