"""A method that works with some kinds of task only is refused at planning with the others."""

from __future__ import annotations

import pytest

from ftsec_ray.config.sweep import ExcludeRule, TaskSpec
from ftsec_ray.errors import SpecFaults
from ftsec_ray.plan import build_plan
from tests.plan.test_build_plan import WORLD, sweep


def test_a_method_for_agents_is_refused_with_another_kind_of_task():
    agent = TaskSpec(name="steps", kind="agent")
    both = {"attacks": ("none", "agent_backdoor"), "tasks": (WORLD, agent)}
    with pytest.raises(SpecFaults) as caught:
        build_plan(sweep(**both))
    text = str(caught.value)
    assert f"'agent_backdoor' cannot work with task {WORLD.name!r}" in text
    assert "got:  'kind: microworld'" in text
    assert "want: kind: agent" in text
    rule = ExcludeRule(task=WORLD.name, attack="agent_backdoor")
    cells = build_plan(sweep(**both, exclude=(rule,))).cells
    assert [cell.task.name for cell in cells] == [WORLD.name, "steps", "steps"]
