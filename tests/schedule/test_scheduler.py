"""The scheduler under random graphs, deaths, failures and damaged artifacts."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftsec_ray.errors import FtsecError
from ftsec_ray.schedule.scheduler import MAX_ATTEMPTS, TERMINAL, Node, Scheduler, State


@st.composite
def graphs(draw: st.DrawFn) -> list[Node]:
    size = draw(st.integers(1, 25))
    nodes = []
    for i in range(size):
        needs = draw(st.sets(st.integers(0, i - 1), max_size=4)) if i else set()
        nodes.append(
            Node(
                id=f"u{i}",
                needs=tuple(f"u{j}" for j in sorted(needs)),
                cost_s=draw(st.integers(1, 9)),
                cells=draw(st.integers(1, 3)),
                resource=draw(st.sampled_from(["cpu", "gpu"])),
                affinity=draw(st.sampled_from(["", "a", "b"])),
            )
        )
    return nodes


class Simulation:
    """Slots that finish in random order with random outcomes, and what must hold at every hand-out."""

    def __init__(self, nodes: list[Node], seed: int, weights: tuple[int, int, int, int]) -> None:
        self.nodes = {node.id: node for node in nodes}
        self.scheduler = Scheduler(nodes)
        self.rng = random.Random(seed)
        self.weights = weights
        self.completed: dict[str, int] = {}
        self.reopened: dict[str, int] = {}
        self.running: list[str] = []

    def run(self, slots: int) -> None:
        for _ in range(100_000):
            if self.scheduler.finished:
                return
            while len(self.running) < slots and (
                unit := self.scheduler.next_ready(warm=self.rng.choice(["a", "b", None]))
            ):
                self.check_start(unit)
                self.running.append(unit)
            assert self.running, "nothing runs, nothing is ready and it is not finished"
            self.end(self.running.pop(self.rng.randrange(len(self.running))))
        raise AssertionError("it does not end")

    def check_start(self, unit: str) -> None:
        assert self.completed.get(unit, 0) <= self.reopened.get(unit, 0), (
            f"{unit} runs again though it is done"
        )
        assert unit not in self.running
        for need in self.nodes[unit].needs:
            assert self.scheduler.state(need) is State.DONE, f"{unit} runs before {need}"

    def end(self, unit: str) -> None:
        outcome = self.rng.choices(["done", "fail", "lost", "damaged"], self.weights)[0]
        producers = [
            need
            for need in self.nodes[unit].needs
            if self.scheduler.state(need) is not State.UPSTREAM_FAILED
        ]
        if outcome == "done" or (outcome == "damaged" and not producers):
            self.completed[unit] = self.completed.get(unit, 0) + 1
            self.scheduler.complete(unit)
        elif outcome == "fail":
            self.scheduler.fail(unit)
        elif outcome == "lost":
            if not self.scheduler.requeue(unit):
                self.scheduler.fail(unit)
        else:
            producer = self.rng.choice(producers)
            was_done = self.scheduler.state(producer) is State.DONE
            if not self.scheduler.reopen(producer, unit):
                self.scheduler.fail(unit)
            elif was_done:
                self.reopened[producer] = self.reopened.get(producer, 0) + 1


@settings(max_examples=120, deadline=None)
@given(
    graphs(),
    st.integers(0, 2**32),
    st.integers(1, 6),
    st.tuples(st.integers(1, 10), st.integers(0, 3), st.integers(0, 4), st.integers(0, 4)),
)
def test_every_unit_ends_in_one_terminal_state_and_none_runs_before_its_inputs(
    nodes, seed, slots, weights
):
    simulation = Simulation(nodes, seed, weights)
    simulation.run(slots)
    states = simulation.scheduler.states()
    assert set(states) == {node.id for node in nodes}
    assert set(states.values()) <= TERMINAL
    assert sum(simulation.scheduler.count(state) for state in State) == len(nodes)
    assert all(
        simulation.scheduler.starts[unit] <= (MAX_ATTEMPTS + 1) * (MAX_ATTEMPTS * len(nodes) + 1)
        for unit in states
    )
    for node in nodes:
        if states[node.id] is State.DONE:
            assert simulation.completed[node.id] >= 1
        if states[node.id] is State.UPSTREAM_FAILED:
            assert any(states[need] in (State.FAILED, State.UPSTREAM_FAILED) for need in node.needs)


@settings(max_examples=60, deadline=None)
@given(graphs(), st.integers(0, 2**32), st.integers(1, 6))
def test_without_faults_every_unit_runs_exactly_once(nodes, seed, slots):
    simulation = Simulation(nodes, seed, (1, 0, 0, 0))
    simulation.run(slots)
    assert {unit: simulation.scheduler.starts[unit] for unit in simulation.nodes} == {
        node.id: 1 for node in nodes
    }
    assert set(simulation.scheduler.states().values()) == {State.DONE}


@settings(max_examples=60, deadline=None)
@given(graphs(), st.integers(0, 2**32), st.integers(1, 6))
def test_a_failure_reaches_its_descendants_and_nobody_else(nodes, seed, slots):
    simulation = Simulation(nodes, seed, (4, 1, 0, 0))
    simulation.run(slots)
    states = simulation.scheduler.states()
    for node in nodes:
        touched = any(states[need] in (State.FAILED, State.UPSTREAM_FAILED) for need in node.needs)
        assert (states[node.id] is State.UPSTREAM_FAILED) == touched


def test_the_longest_remaining_path_goes_first():
    nodes = [
        Node(id="short", cost_s=5),
        Node(id="head", cost_s=1),
        Node(id="tail", needs=("head",), cost_s=9),
    ]
    scheduler = Scheduler(nodes)
    assert [scheduler.next_ready(), scheduler.next_ready(), scheduler.next_ready()] == [
        "head",
        "short",
        None,
    ]


def test_among_equal_paths_the_one_that_unlocks_more_cells_goes_first():
    scheduler = Scheduler([Node(id="one", cells=1), Node(id="many", cells=40)])
    assert scheduler.next_ready() == "many"


def test_among_equals_a_warm_base_model_goes_first():
    scheduler = Scheduler([Node(id="cold", affinity="big"), Node(id="warm", affinity="small")])
    assert scheduler.next_ready(warm="small") == "warm"


def test_a_unit_is_handed_out_only_where_its_resource_has_room():
    scheduler = Scheduler([Node(id="a", resource="gpu", cost_s=9), Node(id="b", resource="cpu")])
    assert scheduler.next_ready({"cpu": 1, "gpu": 0}) == "b"
    assert scheduler.next_ready({"cpu": 1, "gpu": 0}) is None
    assert scheduler.next_ready({"gpu": 1}) == "a"


def test_a_unit_whose_workers_die_is_started_three_times_and_no_more():
    scheduler = Scheduler([Node(id="a")])
    answers = []
    while scheduler.next_ready():
        answers.append(scheduler.requeue("a"))
        if not answers[-1]:
            scheduler.fail("a")
    assert answers == [True, True, False]
    assert scheduler.state("a") is State.FAILED
    assert scheduler.finished


def test_a_damaged_artifact_is_made_again_before_any_of_its_readers_starts():
    nodes = [
        Node(id="base"),
        Node(id="x", needs=("base",), cost_s=3),
        Node(id="y", needs=("base",)),
    ]
    scheduler = Scheduler(nodes)
    scheduler.next_ready()
    scheduler.complete("base")
    assert scheduler.next_ready() == "x"
    assert scheduler.reopen("base", "x")
    assert scheduler.state("y") is State.BLOCKED
    assert scheduler.next_ready() == "base"
    assert scheduler.next_ready() is None
    scheduler.complete("base")
    assert {scheduler.next_ready(), scheduler.next_ready()} == {"x", "y"}


def test_a_unit_that_was_not_foreseen_runs_before_the_one_that_needs_it():
    scheduler = Scheduler([Node(id="reader")])
    scheduler.next_ready()
    scheduler.add([Node(id="lost_model")], last="lost_model", before="reader")
    assert scheduler.next_ready() == "lost_model"
    assert scheduler.next_ready() is None
    scheduler.complete("lost_model")
    assert scheduler.next_ready() == "reader"


def test_a_circle_is_refused_with_its_members():
    with pytest.raises(FtsecError, match="cyclic dependency"):
        Scheduler([Node(id="a", needs=("b",)), Node(id="b", needs=("a",))])


def test_an_unknown_need_is_refused_with_its_name():
    with pytest.raises(FtsecError, match="nowhere"):
        Scheduler([Node(id="a", needs=("nowhere",))])


def test_a_unit_that_does_not_run_cannot_be_completed():
    scheduler = Scheduler([Node(id="a")])
    with pytest.raises(FtsecError, match="unit a is not running"):
        scheduler.complete("a")
