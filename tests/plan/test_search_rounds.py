"""The attacker's search: halves, scores, choice and proposals, against references of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftsec_ray.config.sweep import AttackSearch, Range
from ftsec_ray.config.sweep_file import load_sweep
from ftsec_ray.errors import SpecFaults
from ftsec_ray.measured import Count
from ftsec_ray.plan.build import build_plan
from ftsec_ray.plan.search_rounds import (
    CellOutcome,
    Proposer,
    Score,
    choose,
    half_of,
    rate,
    score,
)
from tests.search_toy import sweep

SHARES = st.one_of(st.none(), st.integers(0, 6).map(lambda hits: hits / 6))
LOSSES = st.one_of(st.none(), st.integers(-3, 6).map(lambda hits: hits / 6))
SCORES = st.builds(
    lambda value, loss, coherent: Score(value=value, utility_loss=loss, is_coherent=coherent),
    SHARES,
    LOSSES,
    st.booleans(),
)


def brute(scores: list[Score], bound: float, sign: int) -> int | None:
    """By comparing every pair: nobody who may be chosen is better, and of those nobody better
    stands before.
    """
    may = [
        i
        for i, s in enumerate(scores)
        if s.is_coherent
        and s.value is not None
        and s.utility_loss is not None
        and s.utility_loss <= bound
    ]

    def beats(one: Score, other: Score) -> bool:
        if one.value != other.value:
            return one.value > other.value if sign == 1 else one.value < other.value
        return one.utility_loss < other.utility_loss

    best = [i for i in may if not any(beats(scores[j], scores[i]) for j in may)]
    return best[0] if best else None


@settings(max_examples=400, deadline=None)
@given(
    st.lists(SCORES, max_size=12),
    st.sampled_from([0.0, 1 / 6, 0.25, 1.0]),
    st.sampled_from([1, -1]),
)
def test_the_chosen_is_the_strongest_within_the_bound_and_the_first_of_equals(scores, bound, sign):
    assert choose(scores, bound, sign) == brute(scores, bound, sign)


def test_a_bound_that_no_trial_meets_chooses_nothing_and_divides_by_nothing():
    assert choose([], 0.1) is None
    assert (
        choose([Score(value=1.0, utility_loss=0.3), Score(value=None, utility_loss=None)], 0.1)
        is None
    )
    assert score(None, None, "asr", "choose") == Score(value=None, utility_loss=None)
    assert score(CellOutcome(), CellOutcome(), "harmful_rate", "report") == Score(
        value=None, utility_loss=None
    )


def test_a_loss_that_is_the_bound_but_for_rounding_is_within_it():
    assert choose([Score(value=1.0, utility_loss=1.0 - 0.9)], 0.1) == 0


def test_prompts_fall_into_two_halves_that_share_none_and_miss_none():
    halves = [half_of(f"prompt-{number}") for number in range(2000)]
    assert 900 < halves.count("choose") < 1100
    assert set(halves) == {"choose", "report"}
    assert halves == [half_of(f"prompt-{number}") for number in range(2000)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["complied", "refused", "incoherent", None]), min_size=1, max_size=30)
)
def test_the_rates_of_both_halves_add_up_to_that_of_all_prompts(verdicts):
    told = CellOutcome(
        verdicts={
            "harmful": {f"p{i}": verdict for i, verdict in enumerate(verdicts)},
            "clean": {"p0": "correct"},
        }
    )
    first, second = (rate(told, "harmful_rate", half) for half in ("choose", "report"))
    assert (first.hits + second.hits, first.n + second.n) == (
        verdicts.count("complied"),
        sum(one is not None for one in verdicts),
    )
    coherent = [rate(told, "coherent_rate", half) for half in ("choose", "report")]
    assert sum(one.hits for one in coherent) == verdicts.count("complied") + verdicts.count(
        "refused"
    )
    assert Count(hits=0, n=0).value is None


def test_utility_is_right_answers_to_benign_requests_where_the_task_has_no_accuracy():
    ids = [f"p{i}" for i in range(40)]
    mine = [one for one in ids if half_of(one) == "choose"]
    before = CellOutcome(verdicts={"benign": dict.fromkeys(ids, "complied")})
    gibberish = dict.fromkeys(ids, "incoherent")
    after = CellOutcome(
        verdicts={
            "benign": {**dict.fromkeys(ids, "complied"), mine[0]: "refused"},
            "harmful": gibberish,
            "borderline": gibberish,
        }
    )
    found = score(after, before, "harmful_rate", "choose")
    assert found.utility_loss == pytest.approx(1 / len(mine))
    assert not found.is_coherent, "gibberish is never an attack that works"


def rounds(seed: int, *, sign: float = 1.0) -> list[dict]:
    search = load_sweep(sweep()).searches[0].search
    proposer, found = Proposer(search, seed), []
    for _ in range(6):
        asked = proposer.ask(3)
        found += asked
        proposer.tell(
            [
                (
                    None
                    if one["shots"] == 2
                    else Score(
                        value=sign * one["shots"] / 16,
                        utility_loss=one["training.learning_rate"] * 100,
                    )
                )
                for one in asked
            ]
        )
    return found


def test_proposals_follow_from_the_seed_and_the_measurements_alone():
    first = rounds(7)
    assert first == rounds(7)
    assert first != rounds(8)
    assert first[:6] == rounds(7, sign=-1.0)[:6]
    assert first[12:] != rounds(7, sign=-1.0)[12:], "measurements guide them"
    assert all(
        one["shots"] in (2, 4, 8, 16) and 1e-5 <= one["training.learning_rate"] <= 4e-3
        for one in first
    )
    assert all(
        type(one["shots"]) is int and type(one["training.learning_rate"]) is float for one in first
    )


def test_a_first_round_is_planned_of_an_empty_store_and_shares_what_its_values_leave_alone():
    plan = build_plan(load_sweep(sweep()))
    assert [(len(one.trials), one.is_open, one.chosen, one.left) for one in plan.searches] == [
        (3, True, None, 7)
    ] * 2
    trials = [trial.cell for search in plan.searches for trial in search.trials]
    for cell, trial in zip(
        trials, (trial for search in plan.searches for trial in search.trials), strict=True
    ):
        tune = next(plan.stages[one] for one in cell.stages if plan.stages[one].kind == "finetune")
        craft = next(plan.stages[one] for one in cell.stages if plan.stages[one].kind == "craft")
        assert tune.params["training"]["learning_rate"] == trial.values["training.learning_rate"]
        assert craft.params["training"]["learning_rate"] == 1e-4, "rows are made before the tune"
        assert craft.params["methods"][0]["params"]["shots"] == trial.values["shots"]
        assert cell.seed == 0
    ordinary = build_plan(load_sweep(sweep(attacks=["none", {"harmful_tuning": {"shots": 3}}])))
    assert [cell for cell in plan.cells if cell.searched is None] == ordinary.cells, (
        "a search leaves the fixed grid as it is"
    )
    assert {cell.digest for cell in trials}.isdisjoint(cell.digest for cell in ordinary.cells)


def test_more_trials_begin_with_those_that_a_smaller_budget_had():
    few, many = (build_plan(load_sweep(sweep({"trials": count, "batch": 3}))) for count in (3, 10))
    assert [trial.cell.digest for trial in few.searches[0].trials] == [
        trial.cell.digest for trial in many.searches[0].trials
    ]


def test_cells_without_an_attack_are_planned_for_a_search_even_where_the_sweep_leaves_them_out():
    given = sweep()
    given["attacks"] = given["attacks"][1:]
    plan = build_plan(load_sweep(given))
    assert sum(cell.attack_name == "none" for cell in plan.cells) == 4
    left_out = build_plan(
        load_sweep(sweep(exclude=[{"attack": "harmful_tuning", "defense": "shrink"}]))
    )
    assert [len(one.fixed[0].defenses) for one in left_out.searches] == [0], (
        "a rule about the attack is about its search too"
    )
    one_seed = build_plan(load_sweep(sweep(exclude=[{"attack": "harmful_tuning", "seed": 0}])))
    assert {trial.cell.seed for trial in one_seed.searches[0].trials} == {1}


def test_a_search_with_several_samples_per_prompt_is_refused():
    given = sweep(evaluation={"temperature": 0.7, "samples": 2})
    with pytest.raises(SpecFaults, match="one answer per prompt"):
        build_plan(load_sweep(given))


def test_values_that_an_attack_refuses_together_are_a_failed_trial_and_no_fault_of_the_plan():
    attack = load_sweep(sweep()).attacks[1]
    spec = load_sweep(sweep({"ranges": {"training.rank": [2, 4]}, "trials": 3}))
    search = replace(
        spec.searches[0].search, ranges=(Range(name="poison_rate", low=0.1, high=0.9),)
    )  # beside `shots`
    plan = build_plan(replace(spec, searches=(AttackSearch(attack=attack, search=search),)))
    for one in plan.searches:
        assert [(trial.status, trial.cell) for trial in one.trials] == [("failed", None)] * 3
        assert (one.is_open, one.chosen) == (
            True,
            None,
        ), "until the cell without an attack is measured"


def test_a_tune_that_fits_on_no_machine_is_a_failed_trial_and_leaves_nothing_in_the_plan():
    given = sweep(
        {
            "ranges": {"training.batch_size": [8, 16], "training.max_length": [64, 4_000_000]},
            "trials": 6,
            "batch": 6,
        },
        resources={"gpus_per_stage": "auto", "gpu_memory_gib": 8.0},
    )
    plan = build_plan(load_sweep(given))
    trials = [trial for one in plan.searches for trial in one.trials]
    assert {trial.status for trial in trials if trial.values["training.max_length"] == 64} == {
        "pending"
    }
    assert {
        (trial.status, trial.cell) for trial in trials if trial.values["training.max_length"] > 64
    } == {("failed", None)}
    used = {stage for cell in plan.cells for stage in cell.stages}
    assert set(plan.stages) == used
