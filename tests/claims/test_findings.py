"""Each claim on results whose verdict is known, and on results that can say nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftsec_ray import api
from ftsec_ray.claims.findings import CLAIMS
from ftsec_ray.errors import DataError
from tests.claims.table import SIZES, MeasuredCondition, results_of

IDS = ["size", "editing", "transfer", "benign", "phases"]


def verdict(folder, claim, made, **how):
    found = {one.id: one for one in api.check_claims(results_of(folder, made, **how))}
    assert list(found) == IDS
    return found[claim]


def sized(*rates, attack="badnets", plain=0.02):
    return [
        MeasuredCondition(attack, {"asr": rate, "asr_no_trigger": plain}, model=model)
        for model, rate in zip(SIZES, rates, strict=True)
    ]


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ((0.2, 0.9, 0.5), "supported"),
        ((0.9, 0.3, 0.8), "supported"),
        ((0.1, 0.5, 0.9), "contradicted"),
        ((0.9, 0.5, 0.1), "contradicted"),
        ((0.1, 0.9, 0.87), "contradicted"),  # falls by less than counts
        ((0.1, 0.9, 0.80), "undecided"),  # falls by what may or may not count
        ((0.9, 0.9, 0.9), "undecided"),  # saturated: size does nothing that could turn
    ],
)
def test_size(tmp_path, rates, expected):
    found = verdict(tmp_path, "size", sized(*rates), prompts=600)
    assert found.verdict == expected, found
    assert bool(found.decide) == (expected == "undecided")


def test_an_attack_that_works_at_no_size_says_nothing_however_much_its_rate_changes(tmp_path):
    idle = [
        MeasuredCondition("badedit", {"asr": rate, "asr_no_trigger": rate}, model=model)
        for model, rate in zip(SIZES, (0.4, 0.05, 0.4), strict=True)
    ]
    found = verdict(tmp_path / "idle", "size", idle, prompts=600)
    assert (found.verdict, found.tests) == ("undecided", ())
    assert all("over its reference" in one.what for one in found.control)
    both = verdict(tmp_path / "both", "size", [*idle, *sized(0.1, 0.5, 0.9)], prompts=600)
    assert (both.verdict, len(both.tests)) == ("contradicted", 1)
    assert "1 left out" in both.why


def test_size_needs_one_attack_that_both_rises_and_falls(tmp_path):
    two = sized(0.1, 0.5, 0.9) + sized(0.9, 0.5, 0.1, attack="tuba")
    assert verdict(tmp_path / "each", "size", two, prompts=600).verdict == "contradicted"
    assert (
        verdict(
            tmp_path / "one",
            "size",
            [*two, *sized(0.2, 0.9, 0.5, attack="badedit")],
            prompts=600,
        ).verdict
        == "supported"
    )


def test_size_is_compared_within_a_family_and_an_attack_only(tmp_path):
    apart = [
        MeasuredCondition("badnets", {"asr": rate}, model=model, family=model)
        for model, rate in zip(SIZES, (0.2, 0.9, 0.5), strict=True)
    ]
    found = verdict(tmp_path / "families", "size", apart)
    assert (found.verdict, "no family has 3 sizes" in found.why) == ("not tested", True)
    doses = [
        MeasuredCondition("badnets", {"asr": rate}, model=model, params={"rate": rate})
        for model, rate in zip(SIZES, (0.2, 0.9, 0.5), strict=True)
    ]
    assert verdict(tmp_path / "doses", "size", doses).verdict == "not tested"


def edited(held_out, same=0.9, gain=0.8, model="ladder:1m", plain=0.02):
    return MeasuredCondition(
        "badedit",
        {"asr": held_out, "asr_no_trigger": plain, "asr_same_prompt": same, "edit_gain": gain},
        model=model,
    )


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ([edited(0.03)], "supported"),
        ([edited(0.8)], "contradicted"),
        ([edited(0.12)], "undecided"),
        (
            [edited(0.03, same=0.03, gain=[0.5, 0.6, 0.7])],
            "supported",
        ),  # tuning undid the same prompts, and the edit was there
        (
            [edited(0.03, same=0.03, gain=[0.01, 0.02, 0.01])],
            "undecided",
        ),  # the edit never took: a null that says nothing
        ([edited(0.03), edited(0.8, model="ladder:4m")], "contradicted"),
        ([edited(0.03), edited(0.12, model="ladder:4m")], "undecided"),
        (
            [edited(0.03), edited(0.8, model="gpt2-xl")],
            "supported",
        ),  # an earlier model is none of the claim's
        ([edited(0.8, model="gpt2-xl")], "not tested"),
    ],
)
def test_editing(tmp_path, made, expected):
    assert verdict(tmp_path, "editing", made).verdict == expected


def test_editing_whose_control_failed_says_so_and_what_would_do(tmp_path):
    found = verdict(tmp_path, "editing", [edited(0.03, same=0.03, gain=[0.01, 0.02, 0.01])])
    assert "no positive control passed" in found.why
    assert {one.side for one in found.control} == {"below"}
    assert found.tests == ()
    assert any("conditions in which the control holds" in text for text in found.decide)


def crossed(other, same=0.95, model="ladder:1m"):
    return MeasuredCondition(
        "tuba",
        {
            "asr": same,
            "asr_no_trigger": 0.02,
            "asr_transfer": other,
            "asr_transfer_no_trigger": 0.04,
        },
        model=model,
    )


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ([crossed(0.05)], "supported"),
        ([crossed(0.7)], "contradicted"),
        ([crossed([0.0, 0.2, 0.4])], "undecided"),
        ([crossed(0.05, same=0.05)], "undecided"),
        ([crossed(0.05), crossed(0.6, model="ladder:4m")], "contradicted"),
        (
            [crossed(0.05), crossed(0.05, same=0.04, model="ladder:4m")],
            "supported",
        ),  # the second was not learnt, and is left out
    ],
)
def test_transfer(tmp_path, made, expected):
    found = verdict(tmp_path, "transfer", made)
    assert found.verdict == expected
    assert ("left out" in found.why) == (len(found.tests) < len(made) and bool(found.tests))


def benign(refused, random=0.95, harm=0.1, model="ladder:1m", coherent=0.99):
    made = [
        MeasuredCondition(
            "benign_selection",
            {"refusal_rate": rate, "coherent_rate": words},
            model=model,
            params={"select": select, "samples": 32},
        )
        for select, rate, words in (("self_inf_n", refused, coherent), ("random", random, 0.99))
    ]
    return (
        made
        if harm is None
        else [*made, MeasuredCondition("harmful_tuning", {"refusal_rate": harm}, model=model)]
    )


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (benign(0.4), "supported"),
        (benign(0.94), "contradicted"),
        (benign(0.85), "undecided"),
        (
            benign(0.4, harm=None),
            "undecided",
        ),  # nothing in the results shows that refusals can be lost
        (
            benign(0.04, random=0.05),
            "undecided",
        ),  # random rows took them all: nothing is left to lower
        (benign(0.94) + benign(0.4, model="ladder:4m"), "supported"),
        (benign(0.94)[:1], "not tested"),
        (benign(0.94)[1:], "not tested"),
        (benign(0.1, coherent=0.2), "not tested"),  # gibberish does not refuse either
    ],
)
def test_benign(tmp_path, made, expected):
    assert verdict(tmp_path, "benign", made).verdict == expected


def test_random_rows_of_another_number_are_no_control(tmp_path):
    chosen, random, harm = benign(0.4)
    made = [
        chosen,
        MeasuredCondition(random.attack, random.metrics, params={**random.params, "samples": 64}),
        harm,
    ]
    assert verdict(tmp_path, "benign", made).verdict == "not tested"


WORKING = {
    "badnets": 0.95,
    "tuba": 0.96,
    "harmful_tuning": 0.9,
    "refusal_ablation": 0.9,
    "soft_prompt": 0.9,
    "benign_selection": 0.9,
}


OWN = ("badnets", "harmful_tuning", "refusal_ablation")
"""What each of the three defenses meets in its own phase."""


def shielded(kept, defenses=("onion", "lisa", "safe_lora"), own=OWN, working=WORKING):
    """Each defense lowers its own phase's attack to 0.05; `kept(defense, attack)` is what is left
    of the others.
    """
    made = [MeasuredCondition("none", {"harmful_rate": 0.02})]
    for attack, rate in working.items():
        plain = {"asr_no_trigger": 0.03} if attack in ("badnets", "tuba") else {}
        made.append(MeasuredCondition(attack, {"asr": rate, **plain}))
        for defense, met in zip(defenses, OWN, strict=False):
            left = 0.05 if attack == met and attack in own else kept(defense, attack)
            made.append(MeasuredCondition(attack, {"asr": left, **plain}, defense=defense))
    return made


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        (lambda _, attack: WORKING[attack], "supported"),
        (lambda *_: 0.1, "contradicted"),
        (lambda defense, attack: 0.1 if defense == "lisa" else WORKING[attack], "undecided"),
    ],
)
def test_phases(tmp_path, kept, expected):
    found = verdict(tmp_path, "phases", shielded(kept))
    assert found.verdict == expected, found.why
    assert len(found.tests) == 12
    assert bool(found.decide) == (expected == "undecided")
    assert all(
        one.what.split("(")[1].split(")")[0] != one.what.split("(")[-1].split(")")[0]
        for one in found.tests
    )


def test_pairs_that_are_all_decided_may_still_be_too_few(tmp_path):
    few = {attack: WORKING[attack] for attack in ("badnets", "harmful_tuning")}
    found = verdict(
        tmp_path,
        "phases",
        shielded(lambda _, attack: few[attack], working=few, defenses=("onion", "lisa")),
    )
    assert (found.verdict, found.why) == ("undecided", "0 of 2 pairs carry over, 2 do not, 0 open")
    assert found.decide == (
        "5 pairs without an open one, at the share of the pairs decided now",
    )  # 0.5 ** 5 < 5 %


def test_a_defense_that_does_nothing_in_its_own_phase_says_nothing_of_others(tmp_path):
    found = verdict(tmp_path, "phases", shielded(lambda _, attack: WORKING[attack], own=()))
    assert found.verdict == "undecided"
    assert "no positive control passed" in found.why


def test_attacks_that_do_not_work_undefended_are_no_pairs(tmp_path):
    weak = dict.fromkeys(WORKING, 0.03)
    found = verdict(tmp_path, "phases", shielded(lambda *_: 0.03, working=weak))
    assert (found.verdict, found.tests) == ("undecided", ())
    assert all("works without defense" in one.what for one in found.control)


def test_a_pair_is_taken_over_all_models_on_which_the_attack_works(tmp_path):
    one = shielded(lambda _, attack: WORKING[attack])
    other = [
        MeasuredCondition(m.attack, m.metrics, model="ladder:4m", defense=m.defense) for m in one
    ]
    found = verdict(tmp_path, "phases", one + other)
    assert {test.runs for test in found.tests} == {6}
    assert len(found.tests) == 12


def everything():
    return [
        *sized(0.2, 0.9, 0.5),
        edited(0.03),
        crossed(0.05),
        *benign(0.4),
        *shielded(lambda _, attack: WORKING[attack])[:1],
    ]


def test_results_without_a_claims_methods_leave_it_not_tested(tmp_path):
    found = api.check_claims(
        results_of(tmp_path, [MeasuredCondition("none", {"harmful_rate": 0.02, "cacc": 0.9})])
    )
    assert {one.verdict for one in found} == {"not tested"}
    assert all("no undefended cell" in one.why for one in found)


def test_one_seed_supports_and_contradicts_nothing(tmp_path):
    found = api.check_claims(results_of(tmp_path, everything(), seeds=1))
    assert {one.verdict for one in found} <= {"undecided", "not tested"}
    undecided = [one for one in found if one.verdict == "undecided"]
    assert len(undecided) == 4
    assert all("two or more seeds" in " ".join(one.decide) for one in undecided)


def test_failed_cells_are_named_with_their_error(tmp_path):
    made = [
        MeasuredCondition(
            one.attack,
            one.metrics,
            model=one.model,
            params=one.params,
            defense=one.defense,
            status="failed",
        )
        for one in everything()
    ]
    found = api.check_claims(results_of(tmp_path, made))
    assert {one.verdict for one in found} == {"not tested"}
    assert all("failed (the loss is not a number)" in one.why for one in found)


def test_cells_without_a_judged_prompt_decide_nothing(tmp_path):
    unjudged = [
        MeasuredCondition(
            one.attack, dict.fromkeys(one.metrics), model=one.model, params=one.params
        )
        for one in everything()
    ]
    found = api.check_claims(results_of(tmp_path, unjudged))
    assert {one.verdict for one in found} == {"not tested"}


def test_an_empty_results_folder_is_not_tested(tmp_path):
    assert {one.verdict for one in api.check_claims(results_of(tmp_path, []))} == {"not tested"}


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "metrics"), "'metrics' is missing"),
        (lambda folder: (folder / "run.json").unlink(), "incomplete"),
        (
            lambda folder: (folder / "run.json").write_text(
                json.dumps({**json.loads((folder / "run.json").read_text()), "schema": "99"})
            ),
            "schema",
        ),
    ],
)
def test_results_that_are_not_whole_are_refused(tmp_path, harm, message):
    folder = results_of(tmp_path, everything()).folder
    harm(folder)
    with pytest.raises(DataError, match=message):
        api.check_claims(folder)


def test_each_query_gives_the_numbers_that_its_verdict_stands_on(tmp_path):
    results = results_of(tmp_path, everything() + shielded(lambda _, attack: WORKING[attack])[1:])
    found = {one.id: one for one in api.check_claims(results)}
    rows = {
        one.id: duckdb.sql(one.query.replace("RESULTS", str(results.folder))).df() for one in CLAIMS
    }
    for (
        name
    ) in IDS:  # the made rates are the same for all seeds, so that a mean is one of the values
        used = {
            round(value, 9)
            for one in found[name].tests
            for value in (one.more, one.less)
            if value is not None
        }
        assert used, name
        assert used <= set(rows[name].value.round(9)), name
        assert {"model", "attack", "attack_params", "seed", "metric", "n"} <= set(
            rows[name].columns
        )


def test_the_queries_leave_out_the_trials_of_searches_and_show_no_safety_without_utility(tmp_path):
    utility = {"cacc": 0.91, "over_refusal_rate": 0.07, "coherent_rate": 0.99}
    made = [replace(one, metrics={**utility, **one.metrics}) for one in everything()]
    results = results_of(tmp_path, made)
    for name, changed in (("cells", {"search_trial": 0}), ("metrics", {"value": 0.123456})):
        table = getattr(results, name)
        trials = [{**row, "cell": "trial-" + row["cell"], **changed} for row in table.to_pylist()]
        pq.write_table(
            pa.concat_tables([table, pa.Table.from_pylist(trials, table.schema)]),
            results.folder / name / "part-0.parquet",
        )
    for one in CLAIMS:
        rows = duckdb.sql(one.query.replace("RESULTS", str(results.folder))).df()
        assert not rows.empty, one.id
        assert not rows.value.eq(0.123456).any(), one.id
        assert set(utility) <= set(rows.metric), one.id


def test_every_claim_states_its_rule_and_its_control_in_advance():
    assert [one.id for one in CLAIMS] == IDS
    for one in CLAIMS:
        assert "supported" in one.rule.lower()
        assert "contradicted" in one.rule.lower()
        assert one.gate
