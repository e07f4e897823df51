"""The order of stacks, the controls that a sweep adds by itself, and conflicts within a stack."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from ftsec_ray import api
from ftsec_ray.config import stack_entries
from ftsec_ray.config.stack_entries import conflicts, in_order, with_controls
from ftsec_ray.defenses.lisa import Lisa
from ftsec_ray.defenses.onion import Onion
from ftsec_ray.defenses.self_reminder import SelfReminder
from ftsec_ray.defenses.shrink import Shrink
from ftsec_ray.defenses.vaccine import Vaccine
from ftsec_ray.defenses.weight_statistics import WeightStatistics
from ftsec_ray.errors import SpecFaults
from ftsec_ray.plan.show import render, summarize
from ftsec_ray.registry import name_of

SWEEP = {"name": "toy", "models": ["ladder:0.2m"], "task": "microworld", "attacks": ["none"]}


@dataclass(frozen=True, kw_only=True)
class Late(Shrink):
    """A repair that comes after the others."""

    ORDER = 30


def stacks_of(**given):
    return api.load({**SWEEP, **given}).defenses


def test_controls_are_added_for_every_member_and_each_once():
    added = with_controls([(), (Lisa(),), (Lisa(rho=2.0),), (Onion(), Lisa())])
    assert added == [
        (),
        (Lisa(),),
        (Lisa(rho=2.0),),
        (Onion(), Lisa()),
        (Lisa(rho=0.0),),
        (Onion(random_words=True), Lisa()),
        (Onion(), Lisa(rho=0.0)),
    ]


def test_a_control_gets_no_control_and_an_added_one_is_not_added_to():
    written = [(Shrink(),), (Lisa(rho=0.0),), (Vaccine(rho=0.0),), (SelfReminder(placebo=True),)]
    assert with_controls(written) == written
    once = with_controls([(Onion(), Lisa())])
    assert len(once) == 3
    assert with_controls(once) == once


def test_a_defense_without_a_setting_of_its_own_gets_the_trivial_controls_at_its_hook(monkeypatch):
    monkeypatch.setattr(Lisa, "CONTROL", None)
    assert with_controls([(Lisa(),)]) == [(Lisa(),)], "no trivial control shapes a training"

    class Repair(Shrink):
        IS_CONTROL = False

    added = [name_of(stack[0]) for stack in with_controls([(Repair(),)])[1:]]
    assert added == ["drop_layer", "matched_noise", "one_shot_repair", "random_mask", "shrink"]


def test_a_sweep_that_asks_for_controls_has_none_missing():
    written = ["none", "lisa", ["onion", "safe_lora"], {"vaccine": {"rho": {"grid": [1.0, 2.0]}}}]
    plan = api.make_plan({**SWEEP, "defenses": written})
    assert len(plan.spec.defenses) == 5
    assert summarize(plan, ()).uncontrolled
    asked = api.make_plan({**SWEEP, "defenses": written, "controls": True})
    assert asked.spec.defenses[:5] == plan.spec.defenses
    assert len(asked.spec.defenses) > 5
    assert summarize(asked, ()).uncontrolled == ()
    assert "controls: true" not in render(summarize(asked, ()))


def test_canonical_order_is_by_number_and_then_as_written():
    assert in_order((Late(), Onion(), Shrink())) == (Onion(), Shrink(), Late())
    assert in_order((Shrink(), Onion())) == (Shrink(), Onion())


def test_pruning_follows_further_training_and_merging_and_precedes_rounding():
    written = "quantize", "wanda", "merge_sanitize", "clean_tuning"
    (stack,) = stacks_of(defenses=[list(written)])
    assert [*map(name_of, stack)] == [*reversed(written)]


@pytest.mark.parametrize(
    "name", ["clean_tuning", "crow", "beear", "fine_mixing", "one_shot_repair"]
)
def test_further_training_conflicts_with_removing_entries_before_it(name):
    (stack,) = stacks_of(defenses=[["antidote", name]])
    (line,) = conflicts([stack])
    assert "bring back" in line
    assert conflicts(stacks_of(defenses=[["wanda", name]])) == []


def test_order_as_written_keeps_the_order(monkeypatch):
    monkeypatch.setattr(Shrink, "ORDER", 30)
    written = [["shrink", "safe_lora"]]
    assert [*map(name_of, stacks_of(defenses=written)[0])] == ["safe_lora", "shrink"]
    kept = stacks_of(defenses=written, order="as_written")[0]
    assert [*map(name_of, kept)] == ["shrink", "safe_lora"]


def test_two_stacks_that_are_one_in_canonical_order_are_refused(monkeypatch):
    monkeypatch.setattr(Shrink, "ORDER", 30)
    both = [["shrink", "safe_lora"], ["safe_lora", "shrink"]]
    with pytest.raises(SpecFaults) as told:
        stacks_of(defenses=both)
    for word in ("same in canonical order", "shrink+safe_lora", "order: as_written"):
        assert word in str(told.value)
    assert len(stacks_of(defenses=both, order="as_written")) == 2


@pytest.mark.parametrize(("key", "value"), [("order", "sorted"), ("order", 1), ("controls", "yes")])
def test_a_wrong_value_is_a_fault_with_the_allowed_ones(key, value):
    with pytest.raises(SpecFaults) as told:
        stacks_of(defenses=["lisa"], **{key: value})
    assert f"{key}:" in str(told.value)
    assert repr(value) in str(told.value)


def test_conflicts_are_named_whichever_member_declares_them(monkeypatch):
    assert conflicts([(Late(), Lisa()), (Lisa(),)]) == []
    monkeypatch.setattr(WeightStatistics, "CONFLICTS", {"lisa": "each undoes the other"})
    stacks = [(Lisa(), WeightStatistics()), (WeightStatistics(), Lisa()), (Lisa(rho=2.0), Onion())]
    assert conflicts(stacks) == ["weight_statistics with lisa in one stack: each undoes the other"]
    plan = api.make_plan({**SWEEP, "defenses": [["weight_statistics", "lisa"]]})
    assert "\nwarning: weight_statistics with lisa in one stack:" in render(summarize(plan, ()))


def test_every_declared_conflict_names_a_defense_of_the_catalogue():
    from ftsec_ray.registry import DEFENSES

    for name in DEFENSES.names():
        declared = getattr(DEFENSES.get(name), "CONFLICTS", {})
        assert set(declared) <= set(DEFENSES.names()) - {name}, name
        assert all(declared.values())
    assert stack_entries.conflicts([()]) == []
