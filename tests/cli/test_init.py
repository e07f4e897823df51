"""`ftsec init`: a starter sweep from a model and a data file that `ftsec plan` accepts."""

from __future__ import annotations

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftsec_ray import api
from ftsec_ray.data.sources import read_source
from tests.cli.toy import call

ROWS = 40
CHAT = [
    {
        "messages": [
            {"role": "user", "content": f"q {i}"},
            {"role": "assistant", "content": f"a {i}"},
        ]
    }
    for i in range(ROWS)
]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": f"q {i}"}, {"from": "gpt", "value": f"a {i}"}]}
    for i in range(ROWS)
]
PAIRS = [
    {"prompt": f"q {i}", "chosen": f"yes {i}", "rejected": f"no {i}", "id": i} for i in range(ROWS)
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_csv(path, header, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def write_lines(path, records):
    path.write_text("".join(f"{json.dumps(one)}\n" for one in records), encoding="utf-8")


def reviews(path, header=("text", "label"), words=("neg", "pos")):
    write_csv(path, header, [(f"film {i}", words[i % len(words)]) for i in range(ROWS)])


def planned(*args):
    """The source of the rows to train on, and the task, of a starter that `ftsec plan` takes."""
    result = call("init", "--out", "mine.yaml", *args)
    assert result.stdout.splitlines() == ["ftsec plan mine.yaml", "ftsec run mine.yaml"]
    assert "cells" in call("plan", "mine.yaml").stdout
    spec = api.load("mine.yaml")
    assert len(spec.attacks) == 4
    task = spec.tasks[0]
    for split, source in task.splits:
        assert read_source(
            source, split_name=split, labels=task.labels, instruction=task.instruction
        ).num_rows
    return dict(task.splits).get("train"), task


def test_a_table_of_texts_and_labels_becomes_a_labelled_task(folder):
    reviews(folder / "reviews.csv")
    train, task = planned("--data", "reviews.csv")
    assert (train.prompt, train.label, train.response) == ("text", "label", None)
    assert task.labels == ("neg", "pos")
    assert "Answer with one of: neg | pos" in task.instruction
    text = (folder / "mine.yaml").read_text(encoding="utf-8")
    assert "column 'label' has 2 different values" in text
    assert "{onion: {random_words: true}}" in text


def test_splits_of_a_starter_share_no_row(folder):
    write_lines(folder / "chat.jsonl", CHAT)
    _, task = planned("--data", "chat.jsonl")
    ids = [
        row
        for split, source in task.splits
        for row in (
            name.rpartition("/")[2]
            for name in read_source(source, split_name=split).column("row_id").to_pylist()
        )
    ]
    assert len(ids) == len(set(ids)) == ROWS


@pytest.mark.parametrize(
    ("records", "wanted"),
    [
        (CHAT, {"messages": "messages"}),
        (SHAREGPT, {"messages": "conversations"}),
        (PAIRS, {"prompt": "prompt", "response": "chosen", "rejected": "rejected"}),
        (
            [{"instruction": "do", "input": "", "output": f"a {i}"} for i in range(ROWS)],
            {"prompt": "instruction", "append": "input", "response": "output"},
        ),
        (
            [{"chosen": one["messages"], "rejected": one["messages"]} for one in CHAT],
            {"messages": "chosen", "rejected": "rejected"},
        ),
    ],
    ids=["messages", "sharegpt", "pairs", "alpaca", "pairs of conversations"],
)
def test_each_form_of_rows_is_found(folder, records, wanted):
    write_lines(folder / "rows.jsonl", records)
    train, _ = planned("--data", "rows.jsonl")
    named = ("prompt", "response", "append", "messages", "rejected", "label")
    assert {name: getattr(train, name) for name in named if getattr(train, name)} == wanted


def test_a_parquet_file_of_prompts_and_responses_is_read(folder):
    table = pa.table({"id": range(ROWS), "Question": ["why"] * ROWS, "Answer": ["so"] * ROWS})
    pq.write_table(table, folder / "rows.parquet")
    train, _ = planned("--data", "rows.parquet")
    assert (train.prompt, train.response) == ("Question", "Answer")
    assert "columns not used: id" in (folder / "mine.yaml").read_text(encoding="utf-8")


def test_numeric_labels_are_to_be_named_by_their_owner(folder):
    reviews(folder / "reviews.csv", words=("10", "9"))
    result = call("init", "--data", "reviews.csv")
    assert "check: the labels are numbers" in result.stderr
    assert api.load("reviews.yaml").tasks[0].labels == ("9", "10")


def test_a_label_column_of_500_values_is_taken_for_free_answers(folder):
    write_csv(folder / "ids.csv", ("text", "label"), [(f"t {i}", f"l{i}") for i in range(500)])
    train, task = planned("--data", "ids.csv")
    assert (train.response, task.labels) == ("label", ())
    text = (folder / "mine.yaml").read_text(encoding="utf-8")
    assert "500 different values, more than 20" in text
    assert "# CHECK: column 'label' is the answer" in text


def test_a_label_column_of_one_value_is_no_label(folder):
    reviews(folder / "one.csv", words=("pos",))
    _, task = planned("--data", "one.csv")
    assert task.labels == ()
    assert "# CHECK: column 'text' is the prompt" in (folder / "mine.yaml").read_text()


def test_columns_of_unknown_names_are_a_guess_that_says_so(folder):
    write_csv(folder / "t.csv", ("n", "frage", "antwort"), [(i, "was?", "das") for i in range(20)])
    train, _ = planned("--data", "t.csv")
    assert (train.prompt, train.response) == ("frage", "antwort")
    assert "# CHECK: column 'frage' is the prompt" in (folder / "mine.yaml").read_text()


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (('te"xt', "label"), ("a: b", "#c")),
        (("text", "label"), ("no", "2e-4")),
        (("text", "label"), ("~", "{text}")),
        (("te\nxt: x", "label"), ("é \U0001f600", "new\nline\n")),
        (("text # {", "label"), ("- '", '"\\x')),
        (("prompt", "label"), ("null", "08")),
    ],
)
def test_names_that_are_markup_in_yaml_read_back_as_they_are(folder, header, words):
    reviews(folder / "odd.csv", header, words)
    train, task = planned("--data", "odd.csv")
    assert train.prompt == header[0]
    assert set(task.labels) == {word.strip() for word in words}


def test_a_comment_cannot_be_left_by_a_name_of_a_column(folder):
    write_lines(
        folder / "rows.jsonl",
        [{"prompt": "a", "response": "b", "x\nattacks: [none]\u2028": 1} for _ in range(ROWS)],
    )
    planned("--data", "rows.jsonl")
    text = (folder / "mine.yaml").read_text(encoding="utf-8")
    assert r"x\nattacks: [none]\u2028" in text


def test_paths_are_relative_to_the_sweep_file(folder):
    (folder / "da ta").mkdir()
    (folder / "sweeps").mkdir()
    reviews(folder / "da ta/#reviews: 1.csv")
    call("init", "--data", "da ta/#reviews: 1.csv", "--out", "sweeps/mine.yaml")
    text = (folder / "sweeps/mine.yaml").read_text(encoding="utf-8")
    assert 'path: "../da ta/#reviews: 1.csv"' in text
    call("plan", "sweeps/mine.yaml")


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", b"not json\n" * 20, ("line 1 of", "is not JSON", "valid JSON")),
        ("a.csv", b"", ("is empty", "0 bytes")),
        ("a.csv", b"text,label\n", ("holds no rows", "only a header")),
        ("a.csv", b"text,label\nx,pos\n", ("too few rows", "got:  1", "10 rows or more")),
        ("a.csv", b"text\n" + b"x\n" * 20, ("no answers", "got:  'text'", "text and a label")),
        ("a.parquet", b"PAR1 and no more" * 9, ("cannot be read", "Parquet")),
        ("a.png", b"\x89PNG\r\n", ("unknown format", ".jsonl | .json")),
        ("a.csv", b"<html><body></body></html>", ("an HTML page",)),
        ("a.csv", b"text,label\n" + b"x,a\ny,b\n" * 9 + b",a\n", ("has an empty prompt", "row 19")),
        ("a.csv", b"text,label\n" + b"x,a\ny,b\n" * 9 + b"z,\n", ("row 19", "label")),
    ],
)
def test_what_is_no_data_is_refused_and_nothing_is_written(folder, name, content, parts):
    (folder / name).write_bytes(content)
    result = call("init", "--data", name, "--out", "mine.yaml", code=1)
    assert all(part in result.stderr for part in parts), result.stderr
    assert not (folder / "mine.yaml").exists()
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (("--data", "gone.csv"), ("no such data file", "looked for 'gone.csv'")),
        (("--data", "."), ("a folder, not a data file",)),
        (("--data", "owner/rows"), ("without a commit", "owner/rows@<commit>", "40 hex digits")),
        (("--model", "ladder:9m"), ("unknown ladder size", "ladder:0.2m")),
        (("--model", "./gone"), ("no such model",)),
        (("--model", "owner/m@main"), ("not a local file", "owner/name@<commit>")),
        (("--out", "gone/mine.yaml"), ("a folder that does not exist", "mkdir -p gone")),
        (("--out", "."), ("--out is a folder",)),
    ],
)
def test_a_wrong_argument_says_what_is_wanted(folder, args, parts):
    result = call("init", *args, code=2)
    assert all(part in result.stderr for part in parts), result.stderr
    assert list(folder.iterdir()) == []


def test_an_existing_file_is_overwritten_with_force_alone(folder):
    (folder / "mine.yaml").write_text("mine")
    result = call("init", "--out", "mine.yaml", code=2)
    assert "exists already" in result.stderr
    assert "--force" in result.stderr
    assert (folder / "mine.yaml").read_text() == "mine"
    call("init", "--out", "mine.yaml", "--force")
    assert api.load("mine.yaml").tasks[0].kind == "microworld"


def test_without_data_a_real_model_gets_a_public_task(folder):
    assert api.load(_written("--model", "owner/thing-1b-instruct")).tasks[0].kind == "alpaca"
    text = (folder / "mine.yaml").read_text(encoding="utf-8")
    assert "# CHECK: the model is not pinned" in text
    model = api.load("mine.yaml").models[0]
    assert (model.family, model.aligned) == ("thing", True)


def _written(*args):
    call("init", "--out", "mine.yaml", *args)
    call("plan", "mine.yaml")
    return "mine.yaml"


def test_a_model_folder_gets_the_family_of_its_config(folder):
    place = folder / "m"
    place.mkdir()
    (place / "config.json").write_text('{"model_type": "llama\\nx: 1"}')
    (place / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (place / "tokenizer.json").write_text("{}")
    model = api.load(_written("--model", "m")).models[0]
    assert model.aligned
    text = (folder / "mine.yaml").read_text(encoding="utf-8")
    assert r"config.json: llama\nx: 1" in text
    assert "chat template: found" in text
    assert "# CHECK: `aligned`" in text


def test_a_data_set_that_cannot_be_opened_leaves_its_columns_to_fill_in(folder, monkeypatch):
    from ftsec_ray.errors import EnvironmentFault

    def offline(spec):
        raise EnvironmentFault("no network", spec.dataset)

    monkeypatch.setattr("ftsec_ray.data.sources.records_of", offline)
    call("init", "--data", f"owner/rows@{'a' * 40}", "--out", "mine.yaml")
    call("plan", "mine.yaml")
    text = (folder / "mine.yaml").read_text(encoding="utf-8")
    assert "the data set was not read: no network" in text
    assert "# CHECK: the names of the columns" in text
    source = dict(api.load("mine.yaml").tasks[0].splits)["train"]
    assert (source.dataset, source.revision) == ("owner/rows", "a" * 40)


def test_methods_that_do_not_fit_the_model_are_left_out_with_the_reason(folder):
    place = folder / "moe"
    place.mkdir()
    (place / "config.json").write_text('{"model_type": "mixtral", "num_local_experts": 8}')
    text = (folder / _written("--model", "moe")).read_text(encoding="utf-8")
    assert "# Does not fit this model: refusal_ablation:" in text
    assert len(api.load("mine.yaml").attacks) == 4
