"""Which defenses a sweep measures without a control. Without one, an effect of the defense may come
from something other than its mechanism.
"""

from __future__ import annotations

import json

from ftsec_ray.config.stack_entries import (
    control_stacks,
    controls_of,
    stack_key,
    trivial_controls,
)
from ftsec_ray.config.sweep import SweepSpec
from ftsec_ray.identity import canonical
from ftsec_ray.method import Method, control_of
from ftsec_ray.registry import name_of


def uncontrolled(spec: SweepSpec) -> list[str]:
    """One line for each defense whose control the sweep lacks, alone or in the same stack."""
    stacks = {stack_key(stack) for stack in spec.defenses}
    only_controls = control_stacks(spec.defenses)
    lines: dict[str, None] = {}
    for stack in spec.defenses:
        if len(stack) > 1 and stack_key(stack) in only_controls:
            continue
        for place, defense in enumerate(stack):
            wanted = _wanted(defense)
            if wanted and not any(
                stack_key((*stack[:place], other, *stack[place + 1 :])) in stacks
                for other in _controls_in(spec, defense)
            ):
                within = "" if len(stack) == 1 else f" in the stack {'+'.join(map(name_of, stack))}"
                lines[f"defense {_text(defense)}{within} has no control: add {wanted}"] = None
    return list(lines)


def _wanted(defense: Method) -> str:
    """The possible controls of a defense as written in a sweep file; empty if there are none."""
    if not controls_of(defense):
        return ""
    own = control_of(defense)
    trivial = [name_of(cls()) for cls in trivial_controls(defense)]
    return " or ".join([*([_text(own)] if own else []), *trivial])


def _controls_in(spec: SweepSpec, defense: Method) -> list[Method]:
    """The controls of a defense: its own, and the trivial ones of the sweep."""
    own, trivial = control_of(defense), tuple(trivial_controls(defense))
    members = [member for stack in spec.defenses for member in stack]
    return [*([own] if own else []), *(one for one in members if isinstance(one, trivial))]


def _text(defense: Method) -> str:
    """A defense as written in a sweep file, with its parameters that differ from the defaults."""
    default = json.loads(canonical(type(defense)()))
    given = {
        name: value
        for name, value in json.loads(canonical(defense)).items()
        # later parameters are left out at their defaults
        if name not in default or value != default[name]
    }
    name = name_of(defense)
    return f"{{{name}: {json.dumps(given)}}}".replace('"', "") if given else name
