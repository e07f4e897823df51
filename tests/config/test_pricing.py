"""`prices`, `budget` and GPUs in a sweep file."""

from __future__ import annotations

import pytest

from ftsec_ray.config.sweep import BudgetSpec, NodeType
from ftsec_ray.config.sweep_file import load_sweep
from ftsec_ray.errors import SpecFaults

BASE = {
    "name": "s",
    "models": ["ladder:0.2m"],
    "task": "microworld",
    "attacks": ["none"],
    "defenses": ["none"],
}
NODE = {"gpus": 8, "cpus": 96, "gpu_memory_gib": 80, "usd_per_hour": 14.7, "spot": True}


def test_prices_and_budget_are_typed():
    spec = load_sweep(
        {
            **BASE,
            "prices": {"a100": NODE, "cpu": {"cpus": 4, "usd_per_hour": 1}},
            "budget": {"usd": 20, "hours": 3},
        }
    )
    assert spec.prices == (
        NodeType(name="a100", gpus=8, cpus=96, gpu_memory_gib=80.0, usd_per_hour=14.7, spot=True),
        NodeType(name="cpu", cpus=4, usd_per_hour=1.0),
    )
    assert spec.budget == BudgetSpec(usd=20.0, hours=3.0)
    assert spec.budget.limits == {"usd": 20.0, "hours": 3.0}


def test_gpus_are_a_number_or_auto():
    assert load_sweep({**BASE, "resources": {"gpus_per_stage": "auto"}}).resources.wants_gpus
    assert load_sweep({**BASE, "resources": {"gpus_per_stage": 2}}).resources.gpus_per_stage == 2.0
    assert not load_sweep(BASE).resources.wants_gpus


@pytest.mark.parametrize(
    ("changes", "place", "what"),
    [
        ({"prices": []}, "prices", "price table"),
        ({"prices": {"A B": NODE}}, "prices.A B", "not a name"),
        ({"prices": {"a": {"cpus": 4}}}, "prices.a.usd_per_hour", "missing"),
        ({"prices": {"a": {**NODE, "cpus": 0}}}, "prices.a.cpus", "wrong value"),
        ({"prices": {"a": {**NODE, "usd_per_hour": -1}}}, "prices.a.usd_per_hour", "wrong value"),
        ({"prices": {"a": {**NODE, "usd": 1}}}, "prices.a.usd", "unknown key"),
        ({"prices": {"a": {**NODE, "gpus": 0}}}, "prices.a", "gpu_memory_gib needs gpus"),
        ({"budget": {}}, "budget", "sets no limit"),
        ({"budget": {"hours": 0}}, "budget.hours", "wrong value"),
        ({"budget": 5}, "budget", "not a mapping"),
        ({"budget": {"usd": 5}}, "budget.usd", "needs prices"),
        ({"budget": {"gpu_hours": 5}}, "budget.gpu_hours", "no stage requests a GPU"),
        ({"resources": {"gpus_per_stage": 1.5}}, "resources", "fractional GPU counts above 1"),
        ({"resources": {"gpus_per_stage": "all"}}, "resources.gpus_per_stage", "wrong value"),
        ({"resources": {"gpu_memory_gib": 0}}, "resources.gpu_memory_gib", "wrong value"),
    ],
)
def test_a_fault_is_told_at_its_place(changes, place, what):
    with pytest.raises(SpecFaults, match=r"1 error\(s\)") as caught:
        load_sweep({**BASE, **changes})
    ((found, fault),) = caught.value.faults
    assert found == place
    assert what in fault.what


def test_the_schema_knows_prices_and_budget():
    jsonschema = pytest.importorskip("jsonschema")
    from ftsec_ray.config.json_schema import sweep_schema

    validator = jsonschema.Draft202012Validator(sweep_schema())
    good = {
        **BASE,
        "prices": {"a100": NODE},
        "budget": {"usd": 5},
        "resources": {"gpus_per_stage": "auto"},
    }
    assert list(validator.iter_errors(good)) == []
    for bad in (
        {"prices": {"a": {"cpus": 4}}},
        {"prices": {"A B": NODE}},
        {"budget": {}},
        {"budget": {"eur": 1}},
    ):
        assert not validator.is_valid({**good, **bad})
