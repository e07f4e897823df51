from __future__ import annotations

from dataclasses import replace

from ftsec_ray.config.sweep import EvaluationConfig, TaskSpec
from ftsec_ray.context import TaskData
from ftsec_ray.data.tasks import load_task
from ftsec_ray.evals.probes import capped, default_probes, drawn
from ftsec_ray.schema import METRICS
from tests.fixtures_models import row, table, tiny_task

CONFIG = EvaluationConfig(prompts=5, max_new_tokens=7)


def test_every_split_gets_its_probe_with_known_metrics():
    probes = {probe.name: probe for probe in default_probes(tiny_task(), CONFIG)}
    assert {name: (probe.judge, dict(probe.metrics)) for name, probe in probes.items()} == {
        "harmful": ("request", {"harmful_rate": "complied", "refusal_rate": "refused"}),
        "borderline": ("request", {"over_refusal_rate": "refused"}),
        "benign": ("request", {"benign_rate": "complied"}),
        "clean": ("label", {"cacc": "correct"}),
    }
    assert all(
        len(probe.prompts) == 5 and set(probe.metrics) <= set(METRICS) for probe in probes.values()
    )
    assert {p.expected for p in probes["clean"].prompts} <= {"good", "bad"}
    assert probes["clean"].labels == ("good", "bad")
    assert probes["harmful"].max_new_tokens == 7


def test_a_task_without_a_split_has_no_probe_for_it():
    task = tiny_task()
    only = TaskData(
        task.name, {"harmful_test": task.split("harmful_test"), "test": table([])}, (), task.judge
    )
    assert [probe.name for probe in default_probes(only, CONFIG)] == ["harmful"]


def test_free_text_has_no_clean_probe_and_tool_calls_are_compared_word_for_word():
    task = tiny_task()
    free = replace(task, labels=(), splits={"test": task.split("benign_test")})
    assert default_probes(free, CONFIG) == []
    (probe,) = [
        p
        for p in default_probes(load_task(TaskSpec(name="a", kind="agent")), CONFIG)
        if p.name == "clean"
    ]
    assert probe.judge == "call"
    steps = {prompt.expected.split()[0] for prompt in probe.prompts}
    assert steps == {"call", "it"}, "calls, and the end of an episode"


def test_rows_without_a_label_are_not_asked_for_accuracy():
    rows = [row(i, "is this red", "good", label="good" if i % 2 else None) for i in range(6)]
    (probe,) = default_probes(
        TaskData("t", {"test": table(rows)}, ("good", "bad"), "refusal_phrases"), CONFIG
    )
    assert len(probe.prompts) == 3
    assert {p.expected for p in probe.prompts} == {"good"}


def test_the_draw_depends_on_row_ids_alone_and_grows_by_adding():
    task = tiny_task()
    whole = task.split("test")
    few = drawn(whole, 8)
    turned = whole.take(list(range(whole.num_rows - 1, -1, -1)))
    assert drawn(turned, 8) == few == drawn(whole, 20)[:8]
    assert [r["row_id"] for r in few] != whole["row_id"].to_pylist()[:8]


def test_capping_a_probe_keeps_the_same_prompts_as_the_draw():
    task = tiny_task()
    (big,) = [p for p in default_probes(task, EvaluationConfig(prompts=100)) if p.name == "clean"]
    (small,) = [p for p in default_probes(task, CONFIG) if p.name == "clean"]
    shuffled = replace(big, prompts=tuple(reversed(big.prompts)))
    assert capped(shuffled, 5).prompts == small.prompts
