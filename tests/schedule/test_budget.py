"""Runs under a budget: never past it by plan, nothing finished is lost, and a higher one goes on."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftsec_ray.config.sweep import BudgetSpec
from ftsec_ray.plan.cost_estimate import BudgetError
from ftsec_ray.schedule.budget import Ledger
from ftsec_ray.schedule.execution import execute
from ftsec_ray.schedule.scheduler import TERMINAL, Node, Scheduler, State
from ftsec_ray.store import Store
from tests.schedule.engine_runners import plan_of, runs, stage_of
from tests.schedule.test_execute import RUNNER, SESSION


@st.composite
def priced_graphs(draw: st.DrawFn) -> list[Node]:
    nodes = []
    for i in range(draw(st.integers(1, 20))):
        needs = draw(st.sets(st.integers(0, i - 1), max_size=3)) if i else set()
        nodes.append(
            Node(
                id=f"u{i}",
                needs=tuple(f"u{j}" for j in sorted(needs)),
                cost_s=draw(st.integers(1, 9)),
                spend={"usd": draw(st.integers(0, 9)), "hours": draw(st.floats(0, 2))},
            )
        )
    return nodes


def drive(
    nodes: list[Node],
    limits: dict[str, float],
    spent: dict[str, float],
    seed: int,
    slots: int,
    *,
    actual: float,
) -> Scheduler:
    """Run to the end with random orders, losses, failures and damage; units take `actual` times
    their estimate at most.
    """
    rng, known = random.Random(seed), {node.id: node for node in nodes}
    scheduler = Scheduler(nodes, ledger=Ledger(limits, spent))
    running: list[str] = []
    done: set[str] = set()
    for _ in range(10_000):
        if scheduler.finished:
            assert done <= {
                one for one, state in scheduler.states().items() if state is State.DONE
            }, "something finished was lost"
            return scheduler
        while len(running) < slots and (unit := scheduler.next_ready()):
            running.append(unit)
            for name, limit in limits.items():
                committed = scheduler.ledger.spent[name] + sum(
                    known[one].spend[name] for one in running
                )
                assert committed <= limit * (1 + 1e-6), f"{unit} starts past the budget"
        if not running:
            assert scheduler.finished, "nothing runs, nothing fits and it is not finished"
            continue
        unit = running.pop(rng.randrange(len(running)))
        scheduler.ledger.charge(
            {name: value * rng.uniform(0, actual) for name, value in known[unit].spend.items()}
        )
        outcome = rng.choice(["done", "done", "done", "fail", "lost", "damaged"])
        damaged = [need for need in known[unit].needs if scheduler.state(need) is State.DONE]
        if outcome == "fail" or (outcome == "lost" and not scheduler.requeue(unit)):
            scheduler.fail(unit)
        elif outcome == "damaged" and damaged:
            if scheduler.reopen(damaged[0], unit):
                done.discard(damaged[0])
            else:
                scheduler.fail(unit)
        elif outcome in ("done", "damaged"):
            scheduler.complete(unit)
            done.add(unit)
    raise AssertionError("it does not end")


@settings(max_examples=120, deadline=None)
@given(
    priced_graphs(),
    st.floats(0, 60),
    st.floats(0, 10),
    st.floats(0, 5),
    st.integers(0, 2**32),
    st.integers(1, 4),
    st.sampled_from([0.5, 1.0, 3.0]),
)
def test_no_unit_starts_past_the_budget_and_the_run_ends(
    nodes, usd, hours, spent, seed, slots, actual
):
    scheduler = drive(
        nodes, {"usd": usd, "hours": hours}, {"usd": spent}, seed, slots, actual=actual
    )
    left = {one for one, state in scheduler.states().items() if state not in TERMINAL}
    assert set(scheduler.unaffordable) == left
    for one in left:
        if scheduler.state(one) is State.HELD:
            assert not scheduler.ledger.fits(scheduler.node(one).spend), (
                "it was kept though there is room"
            )
        else:
            assert any(need in left for need in scheduler.node(one).needs)
    if actual <= 1.0 and spent <= usd:
        assert all(
            value <= scheduler.ledger.limits[name] * (1 + 1e-6)
            for name, value in scheduler.ledger.spent.items()
        )


@settings(max_examples=40, deadline=None)
@given(priced_graphs(), st.integers(0, 2**32), st.integers(1, 4))
def test_a_budget_that_is_never_reached_holds_nothing(nodes, seed, slots):
    scheduler = drive(nodes, {"usd": 1e9, "hours": 1e9}, {}, seed, slots, actual=1.0)
    assert scheduler.unaffordable == []
    assert set(scheduler.states().values()) <= TERMINAL


def test_a_held_unit_runs_when_another_took_less_than_expected():
    scheduler = Scheduler(
        [Node(id="a", cost_s=9, spend={"usd": 6.0}), Node(id="b", spend={"usd": 6.0})],
        ledger=Ledger({"usd": 10.0}),
    )
    assert scheduler.next_ready() == "a"
    assert scheduler.next_ready() is None
    assert scheduler.state("b") is State.HELD
    assert not scheduler.finished
    scheduler.ledger.charge({"usd": 3.0})
    scheduler.complete("a")
    assert scheduler.next_ready() == "b"


def test_a_cheaper_unit_goes_where_a_dear_one_does_not_fit():
    nodes = [
        Node(id="dear", cost_s=9, spend={"usd": 20.0}),
        Node(id="after", needs=("dear",)),
        Node(id="cheap", spend={"usd": 1.0}),
    ]
    scheduler = Scheduler(nodes, ledger=Ledger({"usd": 10.0}))
    assert scheduler.next_ready() == "cheap"
    scheduler.complete("cheap")
    assert scheduler.next_ready() is None
    assert scheduler.finished
    assert scheduler.unaffordable == ["dear", "after"]


# Whole runs, in this process.


def budgeted(stages, **limits):
    plan = plan_of(stages)
    return replace(plan, spec=replace(plan.spec, budget=BudgetSpec(**limits)))


def run(plan, store, **rest):
    return execute(plan, store, executor="local", runner=RUNNER, session=SESSION, **rest)


def slow(folder, count=8, **params):
    """Stages that take 0.2 s, or a little more, and are expected to take a hundredth."""
    return [
        stage_of(f"s{i}", cost_s=0.002, sleep=0.2, log=str(folder), **params) for i in range(count)
    ]


def test_a_sweep_that_would_cost_more_than_its_budget_starts_nothing(tmp_path):
    store = Store.open(tmp_path / "store")
    with pytest.raises(
        BudgetError, match=r"3 hours of stages \(spent 0, expected 3 more\)"
    ) as caught:
        run(
            budgeted(
                [stage_of(f"s{i}", cost_s=3600.0, log=str(tmp_path)) for i in range(3)], hours=2.0
            ),
            store,
        )
    assert caught.value.exit_code == 2
    assert (caught.value.got, caught.value.want) == ({"hours": 2.0}, "at most 2 hours of stages")
    assert runs(tmp_path, "began") == []


def test_a_run_stops_at_its_budget_keeps_what_is_done_and_a_higher_one_goes_on(tmp_path):
    store, stages = Store.open(tmp_path / "store"), slow(tmp_path)
    report = run(budgeted(stages, hours=0.5 / 3600), store)
    first = len(report.done)
    assert 1 <= first <= 3
    assert len(report.unaffordable) == len(stages) - first
    assert not report.is_complete
    assert "hours" in str(report.over_budget)
    assert store.done() == set(report.done)
    with pytest.raises(BudgetError, match="spent"):
        run(budgeted(stages, hours=0.5 / 3600), store)
    again = run(budgeted(stages, hours=10.0), store)
    assert again.is_complete
    assert len(again.done) == len(stages) - first
    assert sorted(runs(tmp_path)) == sorted(stage.params["name"] for stage in stages), (
        "each ran once"
    )


def test_failed_stages_are_paid_for(tmp_path):
    store = Store.open(tmp_path / "store")
    report = run(budgeted(slow(tmp_path, fail=True), hours=0.5 / 3600), store)
    assert 1 <= len(report.failed) <= 3
    assert len(report.failed) + len(report.unaffordable) == 8
