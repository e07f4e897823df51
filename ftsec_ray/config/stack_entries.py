"""What a sweep makes of the stacks of defenses in its file: their order, the controls that
`controls: true` adds, and members that work against each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from typing import Literal, get_args

from ftsec_ray.config.faults import Faults
from ftsec_ray.identity import canonical
from ftsec_ray.lifecycle import hooks_of
from ftsec_ray.method import Defense, Method, control_of
from ftsec_ray.registry import DEFENSES, name_of

Stack = tuple[Method, ...]
Order = Literal["canonical", "as_written"]


def arranged(given: Mapping[str, object], stacks: tuple[Stack, ...], faults: Faults) -> list[Stack]:
    """The stacks in the order that they run in, with the controls that the sweep asks for.

    Args:
        given: The sweep file; its keys `order` and `controls` are read.
        stacks: The stacks as written.
        faults: Gets a fault for a wrong value, and for two stacks that become the same.
    """
    order, wanted = given.get("order", "canonical"), given.get("controls", False)
    if order not in get_args(Order):
        faults.add("order", "unknown order", order, " | ".join(get_args(Order)))
    if not isinstance(wanted, bool):
        faults.add("controls", "not true or false", wanted, "true | false")
    made = [in_order(stack) for stack in stacks] if order == "canonical" else list(stacks)
    first: dict[str, Stack] = {}
    for written, stack in zip(stacks, made, strict=True):
        if (other := first.setdefault(stack_key(stack), written)) is not written:
            faults.add(
                "defenses",
                "two stacks are the same in canonical order",
                f"{_names(other)} and {_names(written)}",
                "each stack once",
                "remove one, or set order: as_written to compare both orders",
            )
    return with_controls(made) if wanted is True else made


def in_order(stack: Stack) -> Stack:
    """The stack in canonical order: by `Defense.ORDER`, then as written."""
    return tuple(sorted(stack, key=lambda one: one.ORDER if isinstance(one, Defense) else 0))


def with_controls(stacks: Iterable[Stack]) -> list[Stack]:
    """The stacks, then those in which a control takes the place of one member; each stack once."""
    written = list(stacks)
    only_controls = control_stacks(written)
    added = [
        other
        for stack in written
        if stack_key(stack) not in only_controls
        for other in _controlled(stack)
    ]
    return list({stack_key(stack): stack for stack in [*written, *added]}.values())


def control_stacks(stacks: Iterable[Stack]) -> set[str]:
    """The `stack_key` of every stack that differs from another one by a control only; it needs no
    controls of its own.
    """
    listed = list(stacks)
    keys = {stack_key(stack) for stack in listed}
    return keys & {stack_key(other) for stack in listed for other in _controlled(stack)}


def _controlled(stack: Stack) -> Iterator[Stack]:
    """The stacks in which a control takes the place of one member."""
    for place, defense in enumerate(stack):
        for control in controls_of(defense):
            yield (*stack[:place], control, *stack[place + 1 :])


def stack_key(stack: Stack) -> str:
    """Equal for equal stacks."""
    return canonical([[name_of(defense), defense] for defense in stack])


def controls_of(defense: Method) -> list[Method]:
    """The control of a defense: itself with its mechanism switched off, or if it has no such
    setting, every trivial control at its hooks. None for a control.
    """
    own = control_of(defense)
    if own is not None:
        return [own]
    is_control = defense.CONTROL is not None or getattr(defense, "IS_CONTROL", False)
    return [] if is_control else [cls() for cls in trivial_controls(defense)]


def trivial_controls(defense: Method) -> list[type[Method]]:
    """The trivial controls that act at one of a defense's hooks."""
    hooked = set(hooks_of(type(defense)))
    known = [DEFENSES.get(name) for name in DEFENSES.names()]
    return [
        cls for cls in known if getattr(cls, "IS_CONTROL", False) and hooked & set(hooks_of(cls))
    ]


def conflicts(stacks: Iterable[Stack]) -> list[str]:
    """One line for each pair of defenses of one stack that work against each other, by
    `Defense.CONFLICTS`.
    """
    lines: dict[str, None] = {}
    for stack in stacks:
        for one, other in combinations(stack, 2):
            for defense, against in ((one, other), (other, one)):
                known = defense.CONFLICTS if isinstance(defense, Defense) else {}
                if why := known.get(name_of(against)):
                    lines[f"{name_of(defense)} with {name_of(against)} in one stack: {why}"] = None
    return list(lines)


def _names(stack: Stack) -> str:
    return "+".join(map(name_of, stack))
