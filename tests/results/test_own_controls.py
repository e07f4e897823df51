"""A defense is found beside its own control in the results, whatever the type of a parameter."""

from __future__ import annotations

import json

import pytest

from ftsec_ray.config.sweep_file import load_sweep
from ftsec_ray.identity import canonical
from ftsec_ray.method import control_of
from ftsec_ray.registry import DEFENSES
from ftsec_ray.results.compare import _Grid
from ftsec_ray.results.planned_columns import defense_facts
from tests.test_methods import method_of

NAMES = [name for name in DEFENSES.names() if DEFENSES.get(name).CONTROL]


@pytest.fixture(scope="module")
def grid() -> _Grid:
    """An empty grid that knows what the results of a sweep of all these defenses say of them."""
    settings = {name: json.loads(canonical(method_of(DEFENSES, name))) for name in NAMES}
    spec = load_sweep(
        {
            "name": "s",
            "question": "?",
            "models": ["ladder:0.1m"],
            "task": "microworld",
            "attacks": ["none"],
            "defenses": [{name: params} for name, params in settings.items()],
            "seeds": 1,
        }
    )
    facts = defense_facts(spec)
    return _Grid({}, facts["defense_hooks"], frozenset(), facts["own_controls"])


@pytest.mark.parametrize("name", NAMES)
def test_the_control_of_a_defense_is_recognised_by_its_parameters(grid: _Grid, name: str) -> None:
    defense = method_of(DEFENSES, name)
    control = control_of(defense)
    assert control is not None
    own, off = ((name, canonical(one)) for one in (defense, control))
    assert grid._is_controlled_by((own,), (off,))
    assert not grid._is_controlled_by((off,), (own,))
