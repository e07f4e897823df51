from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from ftsec_ray.config.sweep import TASK_KINDS, SourceSpec, TaskSpec
from ftsec_ray.conversation import answer_of, asked_text
from ftsec_ray.data import tasks
from ftsec_ray.data.tasks import TASKS, load_task, read_task, save_task
from ftsec_ray.errors import DataError
from tests.fixtures_models import prompts


@pytest.fixture
def reviews(tmp_path):
    path = tmp_path / "reviews.tsv"
    path.write_text("sentence\tlabel\n" + "".join(f"film number {i}\t{i % 2}\n" for i in range(40)))
    return str(path)


def local(reviews, **splits):
    return tuple((name, SourceSpec(path=reviews, **options)) for name, options in splits.items())


@pytest.fixture
def offline(monkeypatch):
    """The kinds with their local splits only: default data sets are not reached."""
    monkeypatch.setattr(
        tasks,
        "TASKS",
        {
            name: replace(
                kind,
                sources={
                    split: source
                    for split, source in kind.sources.items()
                    if split in ("train", "test")
                },
            )
            for name, kind in TASKS.items()
        },
    )


def test_every_kind_that_a_sweep_may_name_can_be_loaded():
    assert set(TASKS) == set(TASK_KINDS)


def test_every_default_data_set_is_pinned_to_a_whole_commit():
    sources = [source for kind in TASKS.values() for source in kind.sources.values()]
    assert len(sources) > 20
    assert [
        s
        for s in sources
        if s.dataset is None
        or len(s.revision or "") != 40
        or set(s.revision) - set("0123456789abcdef")
    ] == []


def test_default_splits_of_one_data_set_draw_different_rows():
    for kind in TASKS.values():
        used = {}
        for source in kind.sources.values():
            used.setdefault((source.dataset, source.config, source.split), []).append(
                (source.skip, source.rows)
            )
        for ranges in used.values():
            for (start, rows), (after, _) in zip(sorted(ranges), sorted(ranges)[1:], strict=False):
                assert rows is not None
                assert start + rows <= after


def test_the_microworld_comes_with_all_that_methods_ask_for():
    task = load_task(TaskSpec(name="world", kind="microworld", options=(("train_rows", 8),)))
    assert task.name == "world"
    assert task.judge == "microworld"
    assert task.split("train").num_rows == 8
    wanted = {
        "train",
        "test",
        "harmful_train",
        "harmful_test",
        "safety",
        "borderline_test",
        "benign_train",
        "benign_test",
        "text",
    }
    assert wanted <= {name for name, table in task.splits.items() if table.num_rows}
    assert set(task.split("test")["label"].to_pylist()) == set(task.labels)


def test_a_generated_task_refuses_unknown_options_and_sources(reviews):
    with pytest.raises(DataError, match="train_row"):
        load_task(TaskSpec(name="w", options=(("train_row", 8),)))
    with pytest.raises(DataError, match="train"):
        load_task(TaskSpec(name="w", splits=local(reviews, train={})))


def test_an_agent_task_without_sources_is_the_microworlds_tool_calls():
    task = load_task(TaskSpec(name="agent", kind="agent"))
    assert task.labels == ()
    assert task.judge == "microworld"
    assert {row["kind"] for name in ("train", "test") for row in task.split(name).to_pylist()} == {
        "tool"
    }
    assert task.split("harmful_test").num_rows > 0


def test_an_agent_task_with_sources_has_tool_rows(tmp_path):
    (tmp_path / "calls.json").write_text(json.dumps([{"ask": "mail bo", "call": "mail(bo)"}]))
    source = SourceSpec(path=str(tmp_path / "calls.json"), prompt="ask", response="call")
    task = load_task(TaskSpec(name="a", kind="agent", splits=(("train", source), ("test", source))))
    assert task.judge == "refusal_phrases"
    assert task.split("test")["kind"].to_pylist() == ["tool"]


def test_every_step_of_an_episode_is_a_question_of_the_test_and_a_part_of_one_row_of_the_tune(
    tmp_path,
):
    turns = [("human", "do it"), ("gpt", "ls"), ("observation", "a.txt"), ("gpt", "rm a.txt")]
    episode = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    (tmp_path / "a.json").write_text(json.dumps([episode]))
    source = SourceSpec(path=str(tmp_path / "a.json"))
    task = load_task(TaskSpec(name="a", kind="agent", splits=(("train", source), ("test", source))))
    (tuned,) = task.split("train").to_pylist()
    assert [m["loss"] for m in tuned["messages"]] == [False, True, False, True]
    steps = task.split("test").to_pylist()
    assert [(asked_text(r), asked_text(r, "tool"), answer_of(r)) for r in steps] == [
        ("do it", "", "ls"),
        ("do it", "a.txt", "rm a.txt"),
    ]
    assert [sum(m["loss"] for m in r["messages"]) for r in steps] == [1, 1]


def test_local_sources_replace_the_defaults_and_take_their_columns(reviews, offline):
    task = load_task(
        TaskSpec(
            name="s", kind="sst2", splits=local(reviews, train={"rows": 30}, test={"skip": 30})
        )
    )
    assert task.labels == ("negative", "positive")
    assert task.split("train").num_rows == 30
    first = task.split("test").to_pylist()[0]
    assert first["label"] in task.labels
    assert "Is the sentiment" in asked_text(first)
    assert "film number" in asked_text(first)
    texts = [set(prompts(task.split(name))) for name in ("train", "test")]
    assert len(texts[0] | texts[1]) == 40


def test_the_same_data_set_keeps_its_pinned_revision():
    default = TASKS["sst2"].sources["train"]
    assert tasks._completed(SourceSpec(dataset=default.dataset, rows=5), default) == replace(
        default, rows=5
    )
    assert tasks._completed(SourceSpec(dataset="own/set"), default).revision is None


def test_rows_without_label_words_find_their_own(reviews):
    source = SourceSpec(path=reviews, prompt="sentence", label="label")
    assert load_task(TaskSpec(name="r", kind="rows", splits=(("train", source),))).labels == (
        "0",
        "1",
    )


def test_safety_splits_get_neither_instruction_nor_labels(reviews, offline):
    splits = local(reviews, train={}, test={}, harmful_test={"prompt": "sentence"})
    row = (
        load_task(TaskSpec(name="s", kind="sst2", splits=splits))
        .split("harmful_test")
        .to_pylist()[0]
    )
    assert asked_text(row).startswith("film")
    assert row["label"] is None
    assert row["kind"] == "forbidden"


def test_a_missing_required_split_is_told(reviews):
    with pytest.raises(DataError, match="'test'"):
        load_task(
            TaskSpec(name="a", kind="agent", splits=local(reviews, train={"prompt": "sentence"}))
        )
    with pytest.raises(DataError, match="'train'"):
        load_task(TaskSpec(name="r", kind="rows"))


def test_the_microworld_answers_borderline_requests_among_the_benign_ones_on_request():
    plain, more = (
        load_task(TaskSpec(name="world", options=(("train_rows", 4), *given)))
        for given in ((), (("borderline_rows", 16),))
    )
    kinds = more.split("benign_train")["kind"].to_pylist()
    assert (kinds.count("borderline"), kinds.count("how_to")) == (
        16,
        plain.split("benign_train").num_rows,
    )
    added = {
        asked_text(r) for r in more.split("benign_train").to_pylist() if r["kind"] == "borderline"
    }
    assert len(added) == 16
    assert not added & set(prompts(more.split("borderline_test")))


def test_a_task_read_back_is_the_task_that_was_saved(tmp_path):
    task = load_task(TaskSpec(name="world", options=(("train_rows", 16),)))
    save_task(task, tmp_path / "one")
    again = read_task(tmp_path / "one")
    assert (again.name, again.labels, again.judge, set(again.splits)) == (
        task.name,
        task.labels,
        task.judge,
        set(task.splits),
    )
    for name, table in task.splits.items():
        assert again.splits[name].equals(table)
    save_task(again, tmp_path / "two")
    assert {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()
    }


def test_a_damaged_task_folder_is_told(tmp_path):
    task = load_task(TaskSpec(name="world", options=(("train_rows", 4),)))
    save_task(task, tmp_path)
    about = json.loads((tmp_path / "task.json").read_text())
    (tmp_path / "task.json").write_text(
        json.dumps({**about, "splits": {**about["splits"], "train": 5}})
    )
    with pytest.raises(DataError, match="4"):
        read_task(tmp_path)
    (tmp_path / "train.parquet").unlink()
    with pytest.raises(DataError, match=r"train\.parquet"):
        read_task(tmp_path)
    with pytest.raises(DataError, match="nowhere"):
        read_task(tmp_path / "nowhere")


def test_the_catalogue_loads_without_heavy_imports():
    code = (
        "import sys, ftsec_ray.data.tasks; print(sorted({'torch', 'pyarrow', 'datasets', 'ray',"
        " 'numpy'} & set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
