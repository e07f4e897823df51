"""An attack that knows the stack, through the engine: another optimisation under a defense, the same
one without.
"""

from __future__ import annotations

from ftsec_ray import api
from ftsec_ray.schedule.execution import execute
from ftsec_ray.store import Store
from tests.test_end_to_end import sweep, world  # noqa: F401 - `world` is a fixture


def test_the_stage_hands_the_attack_what_its_defenses_serve(world, tmp_path):  # noqa: F811
    attacks = [
        {"soft_prompt": {"steps": 3, "tokens": 2, "knows_stack": {"grid": [False, True]}}},
    ]
    given = sweep(world, attacks=attacks, defenses=["none", {"self_reminder": {"where": "user"}}])
    plan = api.make_plan(given)
    store = Store.open(tmp_path / "store")
    report = execute(plan, store, executor="local")
    assert report.is_complete, [verdict.error for verdict in report.failed.values()]
    losses = {}
    for cell in plan.cells:
        notes = store.record(cell.of_kind("generate")[0].digest)["notes"]
        losses[len(cell.defenses), cell.attack.knows_stack] = notes["loss_start"]
    assert losses[0, True] == losses[0, False] == losses[1, False]
    assert losses[1, True] != losses[1, False]
