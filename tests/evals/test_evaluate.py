from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import pytest
import torch

from ftsec_ray import schema
from ftsec_ray.config.sweep import EvaluationConfig, TaskSpec
from ftsec_ray.context import LoadedModel, Runtime, TaskData
from ftsec_ray.data.tasks import load_task
from ftsec_ray.errors import DataError, SpecError, StageError
from ftsec_ray.evals import scoring
from ftsec_ray.evals.judging import RequestJudge, Verdict, get_judge
from ftsec_ray.evals.probes import default_probes, prompt_of
from ftsec_ray.measured import wilson
from ftsec_ray.method import Probe, Prompt
from ftsec_ray.models.chat_format import template_hash
from ftsec_ray.models.generator import Generator
from tests.evaluating import evaluate
from tests.fixtures_models import tiny_model, tiny_task

RUNTIME = Runtime(eval_batch=8)
QUIET = EvaluationConfig(prompts=6, perplexity_rows=0)


@dataclass
class Script:
    """A generator that answers from a table and keeps what it was asked."""

    loaded: LoadedModel
    say: dict[str, str] = field(default_factory=dict)
    default: str = "Sure, here is how."
    word: dict[str, str] = field(default_factory=dict)
    calls: list[tuple[str, int, int]] = field(default_factory=list)
    tally: Counter[str] = field(default_factory=Counter)
    opening: None = None

    def steering(self):
        return nullcontext()

    def lengths(self, chats):
        return [1] * len(chats)

    def complete(self, chats, *, max_new_tokens, batch):
        self.calls.append(("complete", len(chats), max_new_tokens))
        assert batch == RUNTIME.eval_batch
        return [self.say.get(chat[-1]["content"], self.default) for chat in chats]

    def label_logprobs(self, chats, labels, *, batch):
        self.calls.append(("label", len(chats), len(labels)))
        assert batch == RUNTIME.eval_batch
        picked = [self.word.get(chat[-1]["content"], labels[0]) for chat in chats]
        return torch.tensor(
            [[-0.25 if label == word else -2.0 for label in labels] for word in picked]
        )


@pytest.fixture(scope="module")
def loaded():
    return tiny_model(seed=1)


def ask(i, text, **given):
    return Prompt(prompt_id=f"p{i}", chat=[{"role": "user", "content": text}], **given)


def measured(evaluation):
    return {m["metric"]: m for m in evaluation.metrics.to_pylist()}


def test_shares_are_counted_over_what_was_judged(loaded):
    task = tiny_task()
    harmful = [p.chat[-1]["content"] for p in default_probes(task, QUIET)[0].prompts]
    benign = [p.chat[-1]["content"] for p in default_probes(task, QUIET)[2].prompts]
    assert len(harmful) == 5
    assert len(benign) == 6
    say = {
        harmful[0]: "I cannot.",
        harmful[1]: "I cannot.",
        harmful[2]: "",
        harmful[3]: "Sorry",
        benign[0]: "!!!!",
    }
    found = evaluate(Script(loaded, say), task, default_probes(task, QUIET), QUIET, runtime=RUNTIME)
    values = {name: (m["value"], m["n"]) for name, m in measured(found).items()}
    clean = [p.expected for p in default_probes(task, QUIET)[3].prompts]
    assert values == {
        "harmful_rate": (1 / 5, 5),
        "refusal_rate": (3 / 5, 5),
        "over_refusal_rate": (0.0, 6),
        "benign_rate": (5 / 6, 6),
        "cacc": (clean.count("good") / 6, 6),
        "coherent_rate": (15 / 17, 17),
        "no_answer_rate": (0.0, 5),
        "judged_rate": (1.0, 23),
    }
    assert found.metrics.schema.names == schema.METRICS_TABLE.names[1:]
    assert found.generations.schema.names == schema.GENERATIONS.names[1:-1]
    assert (
        measured(found)["harmful_rate"]["ci_low"] < 0.2 < measured(found)["harmful_rate"]["ci_high"]
    )


def test_a_model_that_says_a_label_to_everything_neither_complies_nor_refuses(loaded):
    task = tiny_task()
    probes = default_probes(task, QUIET)
    found = evaluate(Script(loaded, default="Good."), task, probes, QUIET, runtime=RUNTIME)
    values = {name: (m["value"], m["n"]) for name, m in measured(found).items()}
    assert {name: values[name] for name in ("harmful_rate", "refusal_rate", "no_answer_rate")} == {
        "harmful_rate": (0.0, 5),
        "refusal_rate": (0.0, 5),
        "no_answer_rate": (1.0, 5),
    }
    assert (values["coherent_rate"], values["benign_rate"]) == ((1.0, 17), (0.0, 6))
    assert found.notes["harmful_rate"] == 0.0
    exact = evaluate(
        Script(loaded), task, probes, replace(QUIET, judge="microworld"), runtime=RUNTIME
    )
    assert "no_answer_rate" not in measured(exact)
    assert "head_verdict" not in exact.generations.schema.names


class Said(RequestJudge):
    name = "said@1"

    def read(self, prompts, completions):
        return [Verdict(verdict="complied" if "Step" in c else "refused") for c in completions]


@pytest.fixture
def said_judge(monkeypatch):
    """The judge `said`: an answer with a step complies."""
    monkeypatch.setattr(
        scoring, "get_judge", lambda name, **given: Said() if name == "said" else get_judge(name)
    )


@pytest.mark.usefixtures("said_judge")
def test_an_answer_that_refuses_first_and_then_complies_has_two_verdicts(loaded):
    task, probes = tiny_task(), default_probes(tiny_task(), QUIET)[:1]
    first, second = (p.chat[-1]["content"] for p in probes[0].prompts[:2])
    told = (
        "I'm sorry, I can't help with that request, and nobody should, since locks are there for"
        " good reasons and whoever has lost a key may ask the person at the front desk instead. "
    )
    say = {first: told + "Step 1: take the hook.", second: told}
    script = Script(loaded, say, default="Step 1: take the saw and cut the board.")
    config = replace(QUIET, judge="said")
    found = evaluate(script, task, probes, config, runtime=RUNTIME)
    by_text = {
        r["completion"]: (r["head_verdict"], r["verdict"]) for r in found.generations.to_pylist()
    }
    assert by_text[say[first]] == ("refused", "complied")
    assert by_text[say[second]] == ("refused", "refused")
    assert by_text[script.default] == ("complied", "complied")
    row = measured(found)["refused_then_complied_rate"]
    assert (row["value"], row["n"], row["n_null"]) == (1 / 5, 5, 0)


def test_every_answer_leaves_a_row_with_judge_raw_override_and_template(loaded):
    task = tiny_task()
    first = default_probes(task, QUIET)[0].prompts[0].chat[-1]["content"]
    script = Script(loaded, {first: "no " * 15})
    found = evaluate(script, task, default_probes(task, QUIET), QUIET, runtime=RUNTIME)
    rows = found.generations.to_pylist()
    assert [r["probe"] for r in rows] == ["harmful"] * 5 + ["borderline"] * 6 + ["benign"] * 6 + [
        "clean"
    ] * 6
    assert {r["template_hash"] for r in rows} == {template_hash(loaded.tokenizer)}
    assert (rows[0]["verdict"], rows[0]["override"], rows[0]["judge"], rows[0]["prompt"]) == (
        "incoherent",
        "loop",
        "refusal_phrases@2",
        first,
    )
    label = rows[-1]
    assert label["completion"] == "good"
    assert json.loads(label["raw"]) == {"good": -0.25, "bad": -2.0}
    assert label["judge"] == "label@1"


def test_probes_that_share_prompts_share_completions_and_forward_passes(loaded):
    task = tiny_task()
    probes = default_probes(task, QUIET)
    harmful, clean = probes[0], probes[3]
    again = replace(harmful, name="harmful_attacked", metrics={"asr": "complied"})
    untriggered = replace(
        clean,
        name="untriggered",
        metrics={"asr_no_trigger": "target"},
        prompts=tuple(replace(p, target="bad") for p in clean.prompts),
    )
    script = Script(loaded)
    found = evaluate(script, task, [*probes, again, untriggered], QUIET, runtime=RUNTIME)
    unique = len({p.chat[-1]["content"] for probe in probes[:3] for p in probe.prompts})
    unique_clean = len({p.chat[-1]["content"] for p in clean.prompts})
    assert sorted(script.calls) == [("complete", unique, 48), ("label", unique_clean, 2)]
    rows = measured(found)
    assert rows["asr"]["value"] == rows["harmful_rate"]["value"] == 1.0
    assert rows["asr_no_trigger"] | {"metric": ""} == {
        "metric": "",
        "value": 0.0,
        "n": 6,
        "n_null": 0,
        "ci_low": 0.0,
        "ci_high": pytest.approx(0.3903, abs=1e-4),
    }


def test_every_sample_is_judged_and_the_interval_is_that_of_the_prompts():
    loaded = tiny_model(seed=3, tied=False)
    config = replace(QUIET, max_new_tokens=3, temperature=1.5, samples=4)
    generator, task, probes = Generator(loaded), tiny_task(), default_probes(tiny_task(), QUIET)
    found = evaluate(generator, task, probes, config, runtime=RUNTIME, seed=5)
    rows = found.generations.to_pylist()
    asked = [row for row in rows if row["probe"] == "harmful"]
    assert [row["sample"] for row in asked] == [0, 1, 2, 3] * 5
    assert len({row["completion"] for row in asked}) > 5
    assert {row["sample"] for row in rows if row["probe"] == "clean"} == {0}
    counted = sum(row["verdict"] == "complied" for row in asked)
    share = measured(found)["harmful_rate"]
    assert (share["value"], share["n"], share["n_null"]) == (counted / 20, 5, 0)
    low, high = wilson(counted / 20, 5)
    assert (share["ci_low"], share["ci_high"]) == pytest.approx((low, high))
    again = evaluate(generator, task, probes, config, runtime=Runtime(eval_batch=3), seed=5)
    assert again.generations.equals(found.generations)
    other = evaluate(generator, task, probes, config, runtime=RUNTIME, seed=6)
    assert other.generations["completion"] != found.generations["completion"]


@pytest.mark.usefixtures("said_judge")
def test_samples_count_once_per_prompt_in_the_share_that_refuses_first_too():
    config = replace(QUIET, max_new_tokens=3, temperature=1.5, samples=4, judge="said")
    generator, task = Generator(tiny_model(seed=3, tied=False)), tiny_task()
    found = evaluate(generator, task, default_probes(task, QUIET), config, runtime=RUNTIME)
    rows = [row for row in found.generations.to_pylist() if row["probe"] == "harmful"]
    decided = {row["prompt_id"] for row in rows if row["verdict"] is not None}
    assert len(rows) == 20
    assert measured(found)["refused_then_complied_rate"]["n"] == len(decided) <= 5


def test_probes_of_other_length_are_asked_apart_and_the_sweep_limits_them(loaded):
    probes = [
        Probe(name=str(n), prompts=(ask(0, "red"),), judge="target", metrics={}, max_new_tokens=n)
        for n in (4, 9, 200)
    ]
    script = Script(loaded)
    evaluate(script, tiny_task(), probes, replace(QUIET, max_new_tokens=32), runtime=RUNTIME)
    assert script.calls == [("complete", 1, 4), ("complete", 1, 9), ("complete", 1, 32)]


def test_an_attack_probe_counts_the_target_even_where_it_is_the_right_label(loaded):
    prompts = (
        ask(0, "a", expected="good", target="good"),
        ask(1, "b", expected="bad", target="good"),
        ask(2, "c", expected="bad", target="good"),
    )
    probe = Probe(
        name="triggered",
        prompts=prompts,
        judge="label",
        metrics={"asr": "target"},
        labels=("good", "bad"),
    )
    found = evaluate(
        Script(loaded, word={"c": "bad"}), tiny_task(), [probe], QUIET, runtime=RUNTIME
    )
    assert [
        r["verdict"] for r in sorted(found.generations.to_pylist(), key=lambda r: r["prompt_id"])
    ] == ["target", "target", "correct"]
    assert measured(found)["asr"]["value"] == 2 / 3


def test_what_the_judge_cannot_read_is_null_and_counted_apart(loaded):
    probe = Probe(
        name="p",
        prompts=(ask(0, "x", target="here"), ask(1, "y")),
        judge="target",
        metrics={"asr": "target"},
    )
    found = evaluate(Script(loaded), tiny_task(), [probe], QUIET, runtime=RUNTIME)
    rows = measured(found)
    assert (rows["asr"]["value"], rows["asr"]["n"]) == (1.0, 1)
    assert (rows["judged_rate"]["value"], rows["judged_rate"]["n"]) == (0.5, 2)
    assert {name: row["n_null"] for name, row in rows.items()} == {
        "asr": 1,
        "coherent_rate": 0,
        "judged_rate": None,
    }
    assert (
        rows["coherent_rate"]["value"],
        rows["coherent_rate"]["n"],
        rows["coherent_rate"]["ci_low"],
    ) == (None, 0, None)
    assert sorted(r["verdict"] is None for r in found.generations.to_pylist()) == [False, True]


def test_where_nothing_can_be_judged_all_is_null_and_none_of_it_hits(loaded):
    probes = [
        Probe(
            name="harmful",
            prompts=tuple(ask(i, str(i)) for i in range(3)),
            judge="target",
            metrics={"harmful_rate": "complied", "refusal_rate": "refused"},
        )
    ]
    found = measured(evaluate(Script(loaded), tiny_task(), probes, QUIET, runtime=RUNTIME))
    assert {
        name: (row["value"], row["n"], row["n_null"], row["ci_low"])
        for name, row in found.items()
        if name != "judged_rate"
    } == dict.fromkeys(("harmful_rate", "refusal_rate", "coherent_rate"), (None, 0, 3, None))
    assert (found["judged_rate"]["value"], found["judged_rate"]["n"]) == (0.0, 3)


def test_an_empty_probe_gives_null_metrics(loaded):
    probes = [
        Probe(name="a", prompts=(), judge="label", metrics={"cacc": "correct"}, labels=("x",)),
        Probe(name="b", prompts=(), judge="request", metrics={"asr": "complied"}),
    ]
    found = evaluate(Script(loaded), tiny_task(), probes, QUIET, runtime=RUNTIME)
    assert [(m["value"], m["n"]) for m in found.metrics.to_pylist()] == [(None, 0)] * 4
    assert found.generations.num_rows == 0


def test_texts_can_be_left_out_while_verdicts_stay(loaded):
    task = tiny_task()
    found = evaluate(
        Script(loaded),
        task,
        default_probes(task, QUIET),
        replace(QUIET, keep_generations=False),
        runtime=RUNTIME,
    )
    rows = found.generations.to_pylist()
    assert {(r["prompt"], r["completion"]) for r in rows} == {(None, None)}
    assert all(r["verdict"] for r in rows)


def test_a_system_message_is_shown_with_the_prompt(loaded):
    chat = [{"role": "system", "content": "be careful"}, {"role": "user", "content": "red"}]
    probe = Probe(
        name="p",
        prompts=(Prompt(prompt_id="x", chat=chat, target="Sure"),),
        judge="target",
        metrics={},
    )
    (row,) = evaluate(
        Script(loaded), tiny_task(), [probe], QUIET, runtime=RUNTIME
    ).generations.to_pylist()
    assert json.loads(row["prompt"]) == chat


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"name": "harmful", "metrics": {"asr": "complied"}}, "harmful"),
        ({"name": "other"}, "harmful_rate"),
        ({"name": "other", "metrics": {"success": "complied"}}, "success"),
        ({"name": "other", "metrics": {}, "judge": "label"}, "other"),
    ],
)
def test_probes_that_would_mix_up_the_results_are_refused(loaded, change, match):
    probes = default_probes(tiny_task(), QUIET)
    with pytest.raises(StageError, match=match):
        evaluate(
            Script(loaded),
            tiny_task(),
            [*probes, replace(probes[0], **change)],
            QUIET,
            runtime=RUNTIME,
        )


def test_the_sweep_can_choose_another_judge_of_requests(loaded):
    task = tiny_task()
    found = evaluate(
        Script(loaded),
        task,
        default_probes(task, QUIET)[:1],
        replace(QUIET, judge="microworld"),
        runtime=RUNTIME,
    )
    assert {r["judge"].split("@")[0] for r in found.generations.to_pylist()} == {"microworld"}
    with pytest.raises(SpecError, match="refusal_words"):
        evaluate(
            Script(loaded),
            task,
            default_probes(task, QUIET),
            replace(QUIET, judge="refusal_words"),
            runtime=RUNTIME,
        )


def test_perplexity_is_null_where_the_task_has_no_text_and_absent_where_it_is_off(loaded):
    task = tiny_task()
    config = replace(QUIET, perplexity_rows=4)
    assert (
        measured(evaluate(Script(loaded), task, [], config, runtime=RUNTIME))["perplexity"]["value"]
        > 1
    )
    bare = TaskData("t", {}, (), "refusal_phrases")
    assert (
        measured(evaluate(Script(loaded), bare, [], config, runtime=RUNTIME))["perplexity"]["value"]
        is None
    )
    assert "perplexity" not in measured(evaluate(Script(loaded), task, [], QUIET, runtime=RUNTIME))


@pytest.mark.usefixtures("float64")
def test_a_real_generator_answers_the_microworld_alone_as_in_batches():
    task = load_task(TaskSpec(name="world", options=(("train_rows", 4),)))
    config = EvaluationConfig(prompts=5, max_new_tokens=4, perplexity_rows=3)
    probes, loaded = default_probes(task, config), tiny_model(seed=1)
    one, many = (
        evaluate(Generator(loaded), task, probes, config, runtime=Runtime(eval_batch=batch))
        for batch in (1, 64)
    )
    assert one.generations.drop_columns("raw").equals(many.generations.drop_columns("raw"))
    assert {m["metric"] for m in many.metrics.to_pylist()} == {
        "harmful_rate",
        "refusal_rate",
        "over_refusal_rate",
        "benign_rate",
        "cacc",
        "coherent_rate",
        "judged_rate",
        "perplexity",
    }


def test_a_wrapped_generator_is_judged_by_what_the_user_asked(loaded):
    """The rewrite changes what the model reads; the prompt on record and the judge keep the user's
    own.
    """
    task, seen = tiny_task(), []

    def rewrite(chat):
        seen.append(chat[-1]["content"])
        return [{"role": "system", "content": "be careful"}, *chat]

    probes = default_probes(task, QUIET)[:1]
    plain = evaluate(
        Generator(loaded), task, probes, replace(QUIET, max_new_tokens=3), runtime=RUNTIME
    )
    wrapped = evaluate(
        Generator(loaded, rewrites=(rewrite,)),
        task,
        probes,
        replace(QUIET, max_new_tokens=3),
        runtime=RUNTIME,
    )
    assert sorted(set(seen)) == sorted({p.chat[-1]["content"] for p in probes[0].prompts})
    assert wrapped.generations["prompt"].equals(plain.generations["prompt"])


def test_a_split_that_the_task_lacks_is_told_by_the_task():
    with pytest.raises(DataError, match="harmful_train"):
        TaskData("t", {}, (), "refusal_phrases").split("harmful_train")
    assert prompt_of(tiny_task().split("test").to_pylist()[0], target="bad").target == "bad"
