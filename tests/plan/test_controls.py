"""Which defenses a plan says stand without their control."""

from __future__ import annotations

import pytest

from ftsec_ray import api
from ftsec_ray.plan.controls import uncontrolled
from ftsec_ray.plan.show import render, summarize

SWEEP = {
    "name": "toy",
    "models": ["ladder:0.2m"],
    "task": "microworld",
    "attacks": ["none"],
}
OFF = {"lisa": {"rho": 0.0}}


@pytest.mark.parametrize(
    ("defenses", "want"),
    [
        (["none", "shrink", {"weight_statistics": {"statistic": "norm"}}], []),
        (["lisa"], ["defense lisa has no control: add {lisa: {rho: 0.0}}"]),
        (["lisa", OFF], []),
        ([OFF], []),
        (
            ["lisa", {"lisa": {"rho": 0.0, "user_steps": 4}}],
            ["defense lisa has no control: add {lisa: {rho: 0.0}}"],
        ),
        (
            [{"lisa": {"rho": 3.0, "user_steps": 4}}, OFF],
            [
                "defense {lisa: {rho: 3.0, user_steps: 4}} has no control: add"
                " {lisa: {rho: 0.0, user_steps: 4}}"
            ],
        ),
        ([["shrink", "lisa"], ["shrink", OFF]], []),
        (
            [["shrink", "lisa"], OFF],
            ["defense lisa in the stack shrink+lisa has no control: add {lisa: {rho: 0.0}}"],
        ),
        (
            [{"vaccine": {"layers": 2}}],
            ["defense {vaccine: {layers: 2}} has no control: add {vaccine: {layers: 2, rho: 0.0}}"],
        ),
        (["safe_lora", "matched_noise"], []),
        (["safe_lora", {"safe_lora": {"projection": "drop"}}], []),
        (
            ["safe_lora", "lisa", OFF],
            [
                "defense safe_lora has no control: add {safe_lora: {projection: drop}} or"
                " drop_layer or matched_noise or one_shot_repair or random_mask or shrink"
            ],
        ),
    ],
)
def test_a_defense_without_its_control_beside_it_is_told(defenses, want):
    assert uncontrolled(api.load({**SWEEP, "defenses": defenses})) == want


def test_the_plan_warns_of_it():
    plan = api.make_plan({**SWEEP, "defenses": ["none", "lisa"]})
    (line,) = summarize(plan, ()).uncontrolled
    shown = render(summarize(plan, ()))
    assert f"\nwarning: {line}\n" in shown
    assert "controls: true" in shown
