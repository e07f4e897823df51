"""Which defenses a sweep measures without a control beside them: what they do may then come from
whatever stands around their own mechanism.
"""

from __future__ import annotations

import json

from ftsec_ray.config.sweep import SweepSpec
from ftsec_ray.identity import canonical
from ftsec_ray.lifecycle import hooks_of
from ftsec_ray.method import Method, control_of
from ftsec_ray.registry import DEFENSES, name_of


def uncontrolled(spec: SweepSpec) -> list[str]:
    """One line for each defense of the sweep that could have a control and has none, or none in the
    same stack.
    """
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
                lines[f"{_text(defense)}{within} stands without its control: add {wanted}"] = None
    return list(lines)


def _wanted(defense: Method) -> str:
    """What would control a defense, as a sweep file says it; empty where nothing does."""
    own = control_of(defense)
    if (own is None and defense.CONTROL is not None) or getattr(defense, "IS_CONTROL", False):
        return ""
    hooked = set(hooks_of(type(defense)))
    trivial = [name for name in DEFENSES.names() if _is_trivial(DEFENSES.get(name), hooked)]
    return " or ".join([*([_text(own)] if own else []), *trivial])


def _controls_in(spec: SweepSpec, defense: Method) -> list[Method]:
    """The controls of a defense: its own, and the trivial ones that the sweep holds."""
    own, hooked = control_of(defense), set(hooks_of(type(defense)))
    trivial = [one for stack in spec.defenses for one in stack if _is_trivial(type(one), hooked)]
    return [*([own] if own else []), *trivial]


def _is_trivial(cls: type[Method], hooked: set[str]) -> bool:
    """Whether a class is a trivial control at one of some hooks."""
    return bool(getattr(cls, "IS_CONTROL", False)) and bool(hooked & set(hooks_of(cls)))


def _key(stack: tuple[Method, ...]) -> str:
    return canonical([[name_of(one), one] for one in stack])


def _text(defense: Method) -> str:
    """A defense as a sweep file says it, with the parameters that are not at their defaults."""
    default = type(defense)()
    given = {
        name: value
        for name, value in json.loads(canonical(defense)).items()
        if value != json.loads(canonical(default))[name]
    }
    name = name_of(defense)
    return f"{{{name}: {json.dumps(given)}}}".replace('"', "") if given else name
