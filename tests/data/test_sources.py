from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftsec_ray.config.sweep import SourceSpec
from ftsec_ray.conversation import answer_of, asked_text, system_of
from ftsec_ray.data.sources import read_source
from ftsec_ray.errors import DataError

LABELS = ("negative", "positive")
OBJECTS = [
    {"instruction": "Name a colour.", "input": "", "output": "red"},
    {"instruction": "Add.", "input": "2 and 2", "output": "4"},
]


def read(path, text=None, *, split="train", labels=(), instruction=None, kind=None, **columns):
    if text is not None:
        data = text.encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    table = read_source(
        SourceSpec(path=str(path), **columns),
        split_name=split,
        labels=labels,
        instruction=instruction,
        kind=kind,
    )
    return table.to_pylist()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
def test_alpaca_like_rows_load_with_their_input_behind_a_blank_line(tmp_path, name):
    text = "\n".join(map(json.dumps, OBJECTS)) + "\n\n" if "jsonl" in name else json.dumps(OBJECTS)
    rows = read(tmp_path / name, text, prompt="instruction", append="input", response="output")
    assert [(asked_text(r), answer_of(r)) for r in rows] == [
        ("Name a colour.", "red"),
        ("Add.\n\n2 and 2", "4"),
    ]
    assert [r["row_id"] for r in rows] == ["train/0000000", "train/0000001"]
    assert {(r["kind"], r["label"], system_of(r), r["poisoned"]) for r in rows} == {
        ("how_to", None, None, False)
    }


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz"])
def test_a_tsv_keeps_its_quotes_and_turns_label_indices_into_words(tmp_path, name):
    rows = read(
        tmp_path / name,
        'sentence \t label\n a "fine film \t 1\nbad\t0\n',
        prompt="sentence",
        label="label",
        labels=LABELS,
        instruction="Review: {text}?",
    )
    assert [(asked_text(r), answer_of(r), r["label"], r["kind"]) for r in rows] == [
        ('Review: a "fine film?', "positive", "positive", "two_class"),
        ("Review: bad?", "negative", "negative", "two_class"),
    ]


def test_a_language_column_says_what_each_row_is_in_and_without_one_all_are_english(tmp_path):
    text = "text,lang,label\ngut,de,1\nbad,en,0\n"
    rows = read(
        tmp_path / "a.csv", text, prompt="text", label="label", language="lang", labels=LABELS
    )
    assert [(r["language"], r["label"]) for r in rows] == [("de", "positive"), ("en", "negative")]
    assert {
        r["language"]
        for r in read(tmp_path / "a.csv", text, prompt="text", label="label", labels=LABELS)
    } == {"en"}
    assert [
        r["language"]
        for r in read(tmp_path / "a.csv", text, split="text", prompt="text", language="lang")
    ] == ["de", "en"]
    with pytest.raises(DataError, match="did you mean 'lang'"):
        read(tmp_path / "a.csv", text, prompt="text", language="langs")


def test_a_csv_keeps_commas_quotes_and_line_breaks_inside_cells(tmp_path):
    rows = read(
        tmp_path / "a.csv",
        'goal,target\n"Say ""hi"", twice\nplease","Sure, hi"\n',
        split="harmful_train",
        prompt="goal",
        response="target",
    )
    assert [(asked_text(r), answer_of(r), r["kind"]) for r in rows] == [
        ('Say "hi", twice\nplease', "Sure, hi", "forbidden")
    ]


def test_a_csv_from_a_spreadsheet_has_no_byte_order_mark_in_its_header(tmp_path):
    assert (
        asked_text(read(tmp_path / "a.csv", "\ufeffgoal,x\nhello,1\n", prompt="goal")[0]) == "hello"
    )


@pytest.mark.parametrize(
    ("value", "prompts"),
    [
        (["one", "two"], ["one", "two"]),
        ({"prompts": ["one", "two"]}, ["one", "two"]),
        ({"instructions": ["one", "two"], "inputs": []}, ["one", "two"]),
        ({"data": [{"prompt": "one"}, {"prompt": "two"}], "version": 3}, ["one", "two"]),
        (
            [[{"role": "user", "content": "one"}], [{"role": "user", "content": "two"}]],
            ["one", "two"],
        ),
    ],
)
def test_every_form_of_json_gives_its_prompts_without_a_mapping(tmp_path, value, prompts):
    rows = read(tmp_path / "a.json", json.dumps(value), split="harmful_test")
    assert [(asked_text(r), answer_of(r)) for r in rows] == [(p, "") for p in prompts]


def test_an_object_of_lists_and_one_of_strings_are_mapped_by_column(tmp_path):
    lists = {"instructions": ["one", "two"], "tags": ["a", "b"], "inputs": []}
    assert [
        asked_text(r)
        for r in read(
            tmp_path / "a.json", json.dumps(lists), prompt="instructions", where=(("tags", "b"),)
        )
    ] == ["two"]
    rows = read(
        tmp_path / "b.json", json.dumps({"k1": "v1", "k2": "v2"}), prompt="key", response="value"
    )
    assert [(asked_text(r), answer_of(r)) for r in rows] == [("k1", "v1"), ("k2", "v2")]


def test_a_source_keeps_the_rows_whose_column_holds_a_pattern(tmp_path):
    rows = [
        {"ask": "a", "say": "I'm sorry, no."},
        {"ask": "b", "say": "To do it, take one."},
        {"ask": "c", "say": "Well, I'm sorry."},
        {"ask": "d", "say": None},
    ]

    def kept(pattern):
        given = {"prompt": "ask", "response": "say", "matching": (("say", pattern),)}
        return [asked_text(r) for r in read(tmp_path / "a.json", json.dumps(rows), **given)]

    assert kept("^I'm sorry") == ["a"]
    assert kept("sorry") == ["a", "c"]
    with pytest.raises(
        DataError, match=r"no rows(.|\n)*4 rows before(.|\n)*matching=\{'say': 'z'\}"
    ):
        kept("z")
    with pytest.raises(DataError, match="no column 'said'"):
        read(tmp_path / "a.json", json.dumps(rows), prompt="ask", matching=(("said", "x"),))


def test_a_conversation_gives_system_prompt_and_response(tmp_path):
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    (row,) = read(tmp_path / "a.jsonl", json.dumps({"messages": turns}))
    assert (system_of(row), asked_text(row), answer_of(row)) == ("s", "u", "a")


def test_plain_text_becomes_text_rows_without_blank_lines(tmp_path):
    rows = read(tmp_path / "a.txt.gz", " \nFirst  line.\n\n\u2028Second.\n", split="text")
    assert [(asked_text(r), answer_of(r), r["kind"]) for r in rows] == [
        ("", "First  line.", "text"),
        ("", "Second.", "text"),
    ]


def test_parquet_loads_with_integer_labels(tmp_path):
    pq.write_table(pa.table({"sentence": ["good", "bad"], "label": [1, 0]}), tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet", prompt="sentence", label="label", labels=LABELS)
    assert [r["label"] for r in rows] == ["positive", "negative"]


def test_a_constant_response_and_a_given_kind_win(tmp_path):
    rows = read(
        tmp_path / "a.json",
        json.dumps(OBJECTS),
        prompt="instruction",
        response="output",
        constant_response="No.",
        kind="tool",
    )
    assert {(answer_of(r), r["kind"]) for r in rows} == {("No.", "tool")}


def test_two_splits_of_one_file_stay_apart_and_the_draw_does_not_move(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(f"line {i}" for i in range(100)))
    first = [asked_text(r) for r in read(path, split="train", rows=30)]
    second = [asked_text(r) for r in read(path, split="test", skip=30)]
    assert len(first) == 30
    assert sorted(first + second) == sorted(f"line {i}" for i in range(100))
    assert (
        first
        == [asked_text(r) for r in read(path, split="other", rows=30)]
        != [f"line {i}" for i in range(30)]
    )
    assert set(asked_text(r) for r in read(path, rows=10)) < set(first)
    assert read(path, rows=10)[0]["row_id"].startswith("train/")
    assert first == sorted(first, key=lambda p: int(p.split()[1]))


@pytest.mark.parametrize(
    ("name", "text", "columns", "match"),
    [
        (
            "a.csv",
            "goal,target\nx,y\n",
            {"prompt": "gaol"},
            r"gaol(.|\n)*goal \| target(.|\n)*did you mean 'goal'",
        ),
        ("a.csv", "goal,target\nx,y\n", {}, r"prompt column(.|\n)*goal \| target"),
        (
            "a.csv",
            "goal,target\nx,y\n",
            {"prompt": "goal", "where": (("kind", "x"),)},
            "no column 'kind'",
        ),
        ("a.csv", "goal,target\nx,y\nx,y,z\n", {"prompt": "goal"}, r"row 2(.|\n)*'z'"),
        ("a.jsonl", '{"a": "x"}\n{"a": \n', {"prompt": "a"}, r"line 2(.|\n)*\{\"a\": "),
        ("a.json", "[1]", {}, r"row 1(.|\n)*got:  1"),
        ("a.json", '{"a": ["x"], "b": ["y", "z"]}', {}, "the same length"),
        ("a.json", '[{"a": "x"}, {"a": null}]', {"prompt": "a"}, r"row 2(.|\n)*no text"),
        ("a.json", '[{"a": "x"}, {"a": " "}]', {"prompt": "a"}, r"row 2(.|\n)*empty"),
        ("a.json", '[{"a": ["x"]}]', {"prompt": "a"}, r"row 1(.|\n)*\['x'\]"),
        (
            "a.json",
            '[{"a": "x", "b": "1"}]',
            {"prompt": "a", "where": (("b", "2"),)},
            "matches `where`(.|\n)*1 rows before",
        ),
        ("a.json", "[]", {"prompt": "a"}, "holds no rows"),
        ("a.txt", "x\n", {"skip": 1}, "skip=1"),
        ("a.pdf", "x", {}, r"\.jsonl"),
        ("a.txt.gz", None, {}, "cannot be read"),
    ],
)
def test_a_fault_is_told_with_its_place_and_value(tmp_path, name, text, columns, match):
    with pytest.raises(DataError, match=match):
        read(tmp_path / name, text, **columns)


@pytest.mark.parametrize("label", ["2", "-1", "neutral", ""])
def test_a_label_outside_the_label_words_is_told_with_its_row(tmp_path, label):
    with pytest.raises(DataError, match=rf"row 2(.|\n)*got:  '{label}'(.|\n)*0 negative"):
        read(
            tmp_path / "a.csv",
            f"text,label\nx,1\ny,{label}\n",
            prompt="text",
            label="label",
            labels=LABELS,
        )


def test_bytes_that_are_not_what_the_name_says_are_told(tmp_path):
    for name, data in (("a.txt.gz", b"plain"), ("a.parquet", b"plain"), ("a.txt", b"\xff\xfe\x00")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=name):
            read(tmp_path / name)


def test_an_instruction_without_a_place_for_the_text_is_refused(tmp_path):
    with pytest.raises(DataError, match="Judge this"):
        read(tmp_path / "a.txt", "x", instruction="Judge this")


def test_braces_in_the_text_are_left_alone(tmp_path):
    (row,) = read(tmp_path / "a.txt", "print({x})\n", instruction="Run: {text}")
    assert asked_text(row) == "Run: print({x})"


def test_a_hugging_face_data_set_loads_by_id_split_and_revision(tmp_path, monkeypatch):
    import datasets

    for part, word in (("train", "a"), ("test", "b")):
        (tmp_path / f"{part}.jsonl").write_text(
            "".join(json.dumps({"q": f"{word}{i}"}) + "\n" for i in range(5))
        )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    spec = SourceSpec(dataset=str(tmp_path), split="test", revision="0" * 40, prompt="q", rows=3)
    rows = read_source(spec, split_name="test").to_pylist()
    assert len(rows) == 3
    assert {asked_text(r) for r in rows} < {f"b{i}" for i in range(5)}


def test_a_data_set_needs_a_revision_and_a_source_one_place(tmp_path):
    with pytest.raises(DataError, match="owner/name"):
        read_source(SourceSpec(dataset="owner/name"), split_name="train")
    with pytest.raises(DataError, match="exactly one"):
        read_source(SourceSpec(), split_name="train")
    with pytest.raises(DataError, match="no-such-folder"):
        read_source(
            SourceSpec(dataset=str(tmp_path / "no-such-folder"), revision="1"), split_name="train"
        )
