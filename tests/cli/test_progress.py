"""Progress: counts from events, and what is printed where nobody watches."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ftsec_ray import api
from ftsec_ray.cli.progress import LINE_EVERY_S, LiveProgress, Tally
from ftsec_ray.schedule.dispatcher import Event

SWEEP = {
    "name": "s",
    "models": ["ladder:0.2m"],
    "task": "microworld",
    "attacks": ["none", "badnets"],
    "defenses": ["none", "shrink"],
}


@pytest.fixture(scope="module")
def plan():
    return api.make_plan(SWEEP)


def event(kind: str, unit: object, error: str | None = None) -> Event:
    return Event(
        kind=kind, unit=unit.id, stages=tuple(stage.digest for stage in unit.stages), error=error
    )


def second(stage: object) -> float:
    return 1.0


def test_counts_follow_the_events_to_the_end(plan):
    tally = Tally(plan, set(), second)
    assert (tally.stages, tally.cells, tally.cells_done, tally.left_s(5.0)) == (
        len(plan.stages),
        4,
        0,
        None,
    )
    for unit in plan.units(set()):
        tally.take(event("started", unit))
        assert tally.running == 1
        tally.take(event("finished", unit))
    assert (tally.stages_done, tally.cells_done, tally.running, tally.left_s(9.0)) == (
        len(plan.stages),
        4,
        0,
        0.0,
    )


def test_time_left_is_the_pace_so_far_on_the_work_left(plan):
    tally = Tally(plan, set(), second)
    unit = plan.units(set())[0]
    tally.take(event("finished", unit))
    count, stages = len(unit.stages), len(plan.stages)
    pace = (10.0 + 0.1 * stages) / (count + 0.1 * stages)
    assert tally.left_s(10.0) == pytest.approx(pace * (stages - count))
    tally.take(event("finished", unit))
    assert tally.stages_done == count


def test_a_slow_start_does_not_make_hours_of_minutes(plan):
    """The first stage takes a hundred times what was expected, since Ray starts: of two workers."""
    first, *others = plan.units(set())
    tally = Tally(plan, set(), lambda stage: 0.1 if stage in first.stages else 10.0)
    for unit in others[:2]:
        tally.take(event("started", unit))
    tally.take(event("finished", first))
    expected = tally.work_s / 2
    assert expected < tally.left_s(10.0 * len(first.stages)) < 3 * expected


def test_what_waits_for_a_failed_stage_is_no_work_left(plan):
    tally = Tally(plan, set(), second)
    tune = next(
        digest for digest in plan.cells[-1].stages if plan.stages[digest].kind == "finetune"
    )
    vain = {tune}
    for stage in plan.stages.values():
        if vain & {given for _, given in stage.inputs}:
            vain.add(stage.digest)
    for digest in plan.stages:
        if digest not in vain:
            tally.take(Event(kind="finished", unit=digest, stages=(digest,)))
    assert tally.left_s(10.0) > 0
    tally.take(
        Event(
            kind="failed",
            unit="finetune",
            stages=(tune,),
            error="it broke",
            upstream_failed=tuple(vain - {tune}),
        )
    )
    assert tally.left_s(10.0) == 0.0
    assert "left" not in tally.line(10.0)
    assert len(vain) > 1


def test_what_the_store_holds_counts_as_reused_and_its_cells_as_done(plan):
    held = set(plan.cells[0].stages)
    tally = Tally(plan, held, second)
    assert tally.cells_done == 1
    assert f"reused {len(held)}" in tally.line(1.0)


def test_a_failure_is_told_at_once_and_other_lines_are_rare(plan):
    now = [0.0]
    out = io.StringIO()
    units = plan.units(set())
    with LiveProgress(
        Tally(plan, set(), second), console=Console(file=out, width=200), clock=lambda: now[0]
    ) as shown:
        for unit in units[:3]:
            shown.on_event(event("started", unit))
            shown.on_event(event("finished", unit))
        assert out.getvalue() == ""
        shown.on_event(event("failed", units[3], "[stage] it [broke]\nmore"))
        assert out.getvalue().count("\n") == 1
        assert "[stage] it [broke]" in out.getvalue()
        now[0] = LINE_EVERY_S
        shown.on_event(event("started", units[4]))
        shown.on_event(event("requeued", units[4], "a node went away"))
        assert out.getvalue().count("\n") == 3
    text = out.getvalue()
    assert text.count("\n") == 4
    assert "failed 1" in text.splitlines()[-1]
    assert "\x1b" not in text


def test_on_a_terminal_a_bar_is_drawn(plan):
    out = io.StringIO()
    console = Console(file=out, width=150, force_terminal=True, legacy_windows=False)
    with LiveProgress(Tally(plan, set(), second), console=console) as shown:
        for unit in plan.units(set()):
            shown.on_event(event("started", unit))
            shown.on_event(event("finished", unit))
    assert "100%" in out.getvalue()
    assert "cells 4/4" in out.getvalue()
