"""Which defenses a sweep measures without a control. Without one, an effect of the defense may come
from something other than its mechanism.
"""

from __future__ import annotations

import json

from ftsec_ray.config.sweep import SweepSpec
from ftsec_ray.identity import canonical
from ftsec_ray.lifecycle import hooks_of
from ftsec_ray.method import Method, control_of
from ftsec_ray.registry import DEFENSES, name_of


def uncontrolled(spec: SweepSpec) -> list[str]:
    """One line for each defense whose control the sweep lacks, alone or in the same stack."""
    stacks = {_key(stack) for stack in spec.defenses}
    lines: dict[str, None] = {}
    for stack in spec.defenses:
        for place, defense in enumerate(stack):
            wanted = _wanted(defense)
            if wanted and not any(
                _key((*stack[:place], other, *stack[place + 1 :])) in stacks
                for other in _controls_in(spec, defense)
            ):
                within = "" if len(stack) == 1 else f" in the stack {'+'.join(map(name_of, stack))}"
                lines[f"defense {_text(defense)}{within} has no control: add {wanted}"] = None
    return list(lines)


def _wanted(defense: Method) -> str:
    """The possible controls of a defense as written in a sweep file; empty if there are none."""
    own = control_of(defense)
    if (own is None and defense.CONTROL is not None) or getattr(defense, "IS_CONTROL", False):
        return ""
    hooked = set(hooks_of(type(defense)))
    trivial = [name for name in DEFENSES.names() if _is_trivial(DEFENSES.get(name), hooked)]
    return " or ".join([*([_text(own)] if own else []), *trivial])


def _controls_in(spec: SweepSpec, defense: Method) -> list[Method]:
    """The controls of a defense: its own, and the trivial ones of the sweep."""
    own, hooked = control_of(defense), set(hooks_of(type(defense)))
    members = [member for stack in spec.defenses for member in stack]
    trivial = [member for member in members if _is_trivial(type(member), hooked)]
    return [*([own] if own else []), *trivial]


def _is_trivial(cls: type[Method], hooked: set[str]) -> bool:
    """Whether a class is a trivial control that acts at one of these hooks."""
    return bool(getattr(cls, "IS_CONTROL", False)) and bool(hooked & set(hooks_of(cls)))


def _key(stack: tuple[Method, ...]) -> str:
    return canonical([[name_of(defense), defense] for defense in stack])


def _text(defense: Method) -> str:
    """A defense as written in a sweep file, with its parameters that differ from the defaults."""
    default = type(defense)()
    given = {
        name: value
        for name, value in json.loads(canonical(defense)).items()
        if value != json.loads(canonical(default))[name]
    }
    name = name_of(defense)
    return f"{{{name}: {json.dumps(given)}}}".replace('"', "") if given else name
