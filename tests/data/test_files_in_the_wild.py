"""Files as they are found: what is no data or damaged is told by name, and what is data is read."""

from __future__ import annotations

import bz2
import datetime
import gzip
import io
import json
import lzma
import math
import pickle
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftsec_ray.config.faults import Faults
from ftsec_ray.config.sweep import SourceSpec
from ftsec_ray.config.task_entries import tasks_of
from ftsec_ray.conversation import answer_of, asked_text
from ftsec_ray.data.cell_values import matches
from ftsec_ray.data.records import read_records
from ftsec_ray.data.sources import read_source
from ftsec_ray.errors import DataError
from tests.fixtures_models import prompts

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:{0:064d}\nsize 132735\n"
PAGE = "<!DOCTYPE html>\n<html>\n<head><title>Sign in</title></head>\n</html>\n"
PAGE_LINE = '<!doctype html><html lang="en"><body>No.</body></html>'
BARE_PAGE = "<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body>x</body>\r\n</html>\r\n"
XML = '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>'
BARE_XML = "<Error><Code>NoSuchKey</Code><Message>no</Message></Error>"
ERRORS = [
    {"error": "Repository not found"},
    {"detail": "Not Found"},
    {"message": "Not Found", "documentation_url": "https://x", "status": "404"},
    {"error": {"message": "bad key", "type": "auth", "code": None}},
    {"errors": [{"message": "denied", "code": 1}]},
]
EVERY = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")


def zipped(name="rows.csv", text="prompt\nx\n"):
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr(name, text)
    return sink.getvalue()


def parquet(table=None, **options):
    sink = io.BytesIO()
    pq.write_table(
        pa.table({"prompt": ["one", "two"]}) if table is None else table, sink, **options
    )
    return sink.getvalue()


def records(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return read_records(str(path))


def fault(tmp_path, name, data):
    """The error of a file; it must have all four parts."""
    with pytest.raises(DataError) as caught:
        records(tmp_path, name, data)
    error = caught.value
    assert error.got not in (None, "")
    assert error.want
    assert error.fix
    assert name in str(error)
    return str(error)


def rows(tmp_path, name, data, *, split="train", labels=(), **columns):
    path = tmp_path / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    spec = SourceSpec(path=str(path), **columns)
    return read_source(spec, split_name=split, labels=labels).to_pylist()


@pytest.mark.parametrize("suffix", EVERY)
@pytest.mark.parametrize("head", ["", "\ufeff", "\n"])
def test_a_pointer_of_a_version_control_is_called_one_under_every_name(tmp_path, suffix, head):
    assert "git-lfs" in fault(tmp_path, f"rows{suffix}", head + LFS)
    assert "git-lfs" in fault(tmp_path, f"rows{suffix}.gz", head + LFS)
    assert "git-lfs" in fault(tmp_path, f"two{suffix}.gz", gzip.compress((head + LFS).encode()))
    assert "git-annex" in fault(tmp_path, f"a{suffix}", head + "../.git/annex/objects/G7/SHA256E-s")


@pytest.mark.parametrize("suffix", EVERY)
@pytest.mark.parametrize("page", [PAGE, PAGE_LINE, BARE_PAGE, "<!-- x -->\n" + PAGE])
@pytest.mark.parametrize("head", ["", "\ufeff", "\n\n \t"])
def test_a_saved_web_page_is_called_one_under_every_name(tmp_path, suffix, page, head):
    assert "an HTML page" in fault(tmp_path, f"rows{suffix}", head + page)


@pytest.mark.parametrize("suffix", EVERY)
@pytest.mark.parametrize("xml", [XML, BARE_XML])
def test_an_error_in_xml_is_called_a_document(tmp_path, suffix, xml):
    assert "an XML document" in fault(tmp_path, f"rows{suffix}", "\n" + xml)


@pytest.mark.parametrize("suffix", EVERY)
@pytest.mark.parametrize("body", ERRORS, ids=[str(sorted(body)) for body in ERRORS])
def test_an_error_in_json_is_called_one_under_every_name(tmp_path, suffix, body):
    assert "error message of a server" in fault(tmp_path, f"rows{suffix}", json.dumps(body))
    assert "error message of a server" in fault(
        tmp_path, f"rows{suffix}", json.dumps(body, indent=2)
    )


def test_rows_with_columns_of_such_names_are_rows(tmp_path):
    assert len(records(tmp_path, "a.jsonl", '{"message": "a"}\n{"message": "b"}\n')) == 2
    assert len(records(tmp_path, "a.json", '{"message": ["a", "b"], "detail": ["c", "d"]}')) == 2
    assert records(tmp_path, "b.jsonl", '{"error": "x", "prompt": "y"}')[0]["prompt"] == "y"


@pytest.mark.parametrize(
    "text",
    [
        "<html> and </html> are the first and the last tag.\nMore of it.\n",
        "<!doctype html> is how a page begins.\n",
        f"{PAGE_LINE}\n{PAGE_LINE}\n",
        "<s><b>one</b></s>\n<s><b>two</b></s>\n",
        "version control is older than git-lfs\n",
        '{"a": 1} is JSON.\n{not\n',
        "[1] A footnote.\n[2] Another.\n",
        "prompt;response\na;b\n",
        "PAR1 and ORC and BZh are names\n",
        "NaN\nnull\nN/A\n",
        "42\n",
        '"quoted"\n',
    ],
)
def test_a_text_file_may_hold_any_text(tmp_path, text):
    found = records(tmp_path, "a.txt", text)
    assert [record["text"] for record in found] == [line for line in text.split("\n") if line]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt"])
def test_json_under_the_name_of_a_table_or_text_says_how_to_rename_it(tmp_path, suffix):
    lines = '{"prompt": "a, b", "response": "c"}\n{"prompt": "d", "response": "e"}\n'
    assert ".jsonl" in fault(tmp_path, f"a{suffix}", lines)
    assert ".json" in fault(tmp_path, f"a{suffix}", json.dumps([{"prompt": "a"}], indent=1))


def test_json_and_json_lines_under_each_others_name_are_told(tmp_path):
    assert "rename it to .json" in fault(tmp_path, "a.jsonl", '[\n{"prompt": "a"}\n]\n')
    assert "rename it to .jsonl" in fault(tmp_path, "a.json", '{"prompt": "a"}\n{"prompt": "b"}\n')
    assert "not JSON" in fault(tmp_path, "b.json", '[{"prompt": "a"}, {"pro')
    assert "not JSON" in fault(tmp_path, "c.json", "[" * 200_000)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.csv", "prompt;response\nbake, please;flour\n", "semicolon"),
        ("a.csv", "prompt\tresponse\na\tb\n", "tab"),
        ("a.csv", "prompt|response\na|b\n", "bar"),
        ("a.csv.gz", "prompt;response\na;b\n", "semicolon"),
        ("a.tsv", "prompt;response\na;b\n", "semicolon"),
        ("a.tsv", "prompt|response\na|b\n", "bar"),
        ("a.tsv", "prompt,response\na,b\n", "comma"),
        ("a.csv", "\ufeffprompt;response\r\na;b\r\n", "semicolon"),
    ],
)
def test_a_table_with_another_separator_is_told_by_its_one_column(tmp_path, name, text, told):
    data = gzip.compress(text.encode()) if name.endswith(".gz") else text
    assert f"one column, and its name holds a {told}" in fault(tmp_path, name, data)


def test_tables_of_one_column_are_read(tmp_path):
    assert records(tmp_path, "a.csv", "prompt\na;b\n") == [{"prompt": "a;b"}]
    assert records(tmp_path, "a.tsv", "Prompt, in English\na b\n") == [
        {"Prompt, in English": "a b"}
    ]


def test_two_columns_of_one_name_are_told(tmp_path):
    assert "two columns with the same name" in fault(tmp_path, "a.csv", "text,text\na,b\n")
    assert records(tmp_path, "b.csv", "text,,\na,,\n") == [{"text": "a", "": ""}]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".txt"])
@pytest.mark.parametrize(
    ("data", "told"),
    [
        (zipped(), "zip archive"),
        (gzip.compress(b"prompt\nx\n"), "gzip archive"),
        (bz2.compress(b"prompt\nx\n"), "bzip2 archive"),
        (lzma.compress(b"prompt\nx\n"), "xz archive"),
        (parquet(), "Parquet file"),
        (pickle.dumps(["x"]), "pickle"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "PNG"),
        (b"%PDF-1.7\n%\xe2\xe3", "PDF"),
        (b"SQLite format 3\x00\x10", "SQLite"),
        (b"prompt\nx\x00y\n", "line 2 of"),
        ("prompt,response\nhow,so\n".encode("utf-16"), "UTF-16"),
        ("prompt,response\nhow,so\n".encode("utf-16-le"), "UTF-16"),
        ("prompt,response\nhow,so\n".encode("utf-16-be"), "UTF-16"),
        ("prompt,response\nhow,so\n".encode("utf-32"), "UTF-32"),
        ("prompt\ncafé\n".encode("latin-1"), "line 2"),
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"\xef\xbb\xbf", "empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # archives hold the time
)
def test_other_bytes_under_the_name_of_text_are_told_by_what_they_are(tmp_path, suffix, data, told):
    assert told in fault(tmp_path, f"a{suffix}", data)
    assert told in fault(tmp_path, f"b{suffix}.gz", gzip.compress(data))


def test_other_bytes_under_the_name_of_an_archive_or_parquet_are_told(tmp_path):
    assert "zip archive" in fault(tmp_path, "a.csv.gz", zipped())
    assert "not a gzip archive" in fault(tmp_path, "a.csv.gz", "prompt\nx\n")
    assert "empty" in fault(tmp_path, "a.csv.gz", b"")
    assert "gzip archive" in fault(tmp_path, "a.parquet", gzip.compress(parquet()))
    assert "not a Parquet file" in fault(tmp_path, "a.parquet", "prompt\nx\n")
    assert records(tmp_path, "a.parquet.gz", gzip.compress(parquet()))[1] == {"prompt": "two"}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", "prompt,response\n"),
        ("a.tsv", "prompt\tresponse\n"),
        ("a.parquet", parquet(pa.table({"prompt": pa.array([], pa.string())}))),
        ("a.json", "[]"),
    ],
)
def test_a_header_alone_holds_no_rows(tmp_path, name, data):
    assert "holds no rows" in fault(tmp_path, name, data)


def test_a_folder_or_a_file_that_is_gone_cannot_be_read(tmp_path):
    (tmp_path / "a.csv").mkdir()
    for name in ("a.csv", "b.csv.gz"):
        with pytest.raises(DataError, match=rf"cannot be read(.|\n)*{name}"):
            read_records(str(tmp_path / name))


def test_every_damage_of_an_archive_names_the_file(tmp_path):
    whole = gzip.compress(b'{"prompt": "a", "response": "b"}\n' * 200)
    for number, data in enumerate(
        (
            whole[:20] + b"\0\0\0\0" + whole[24:],  # zlib's own error
            whole[:-8] + b"\0\0\0\0" + whole[-4:],  # checksum
            whole[:-4] + b"\0\0\0\0",  # length
            whole[:-9],
            whole[:12],
            whole[:3],
            whole + b"more",
        )
    ):
        assert "cannot be read" in fault(tmp_path, f"{number}.jsonl.gz", data)


def test_members_of_an_archive_that_follow_each_other_are_one_file(tmp_path):
    parts = [gzip.compress(f'{{"prompt": "{word}"}}\n'.encode()) for word in ("a", "b")]
    found = records(tmp_path, "a.jsonl.gz", b"".join(parts))
    assert [record["prompt"] for record in found] == ["a", "b"]


def test_an_archive_that_unpacks_to_too_much_is_refused_before_it_is_in_memory(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("FTSEC_MAX_DATA_BYTES", str(3 * 2**20))
    packed = gzip.compress(b"a" * 2**26)
    told = fault(tmp_path, "a.txt.gz", packed)
    assert "at most 3,145,728 bytes" in told
    assert "set the environment variable FTSEC_MAX_DATA_BYTES" in told
    assert len(records(tmp_path, "b.txt.gz", gzip.compress(b"a" * (3 * 2**20)))) == 1


def test_every_damage_of_a_parquet_file_names_the_file_or_is_harmless(tmp_path):
    table = pa.table(
        {
            "prompt": ["a b", "c d"] * 500,
            "response": pa.array(["x", "y"] * 500).dictionary_encode(),
        }
    )
    whole = parquet(table, write_page_checksum=True)
    for start in range(4, len(whole) - 12, 97):
        data = whole[:start] + bytes(byte ^ 255 for byte in whole[start : start + 60])
        data += whole[start + 60 :]
        assert "cannot be read" in fault(tmp_path, "a.parquet", data[: len(whole)])
    for data in (
        whole[: len(whole) // 2],
        whole[:-1],
        whole[:-8] + b"\xff\xff\xff\xff" + whole[-4:],
    ):
        assert "cannot be read" in fault(tmp_path, "a.parquet", data)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (r'{"prompt": "a \ud83d", "response": "b"}', r"\\ud83d"),
        (r'{"prompt": "a", "response": "\ude00 b"}', r"\\ude00"),
        (r'{"prompt": "a", "note\ud800": 1}', r"\\ud800"),
        (r'{"messages": [{"role": "user", "content": "\uDBFF"}]}', r"\\udbff"),
        (r'{"prompt": "a", "tags": [["\udc00"]]}', r"\\udc00"),
        (r'{"prompt": "a\u0000b"}', "NUL"),
    ],
)
def test_half_a_character_or_a_nul_anywhere_in_a_row_is_told_with_its_row(tmp_path, line, told):
    good = r'{"prompt": "whole \ud83d\ude00"}'
    with pytest.raises(DataError, match=rf"row 2 of .*a.jsonl holds .*{told}"):
        records(tmp_path, "a.jsonl", f"{good}\n{line}\n")
    with pytest.raises(DataError, match=rf"row 2 of .*a.json holds .*{told}"):
        records(tmp_path, "a.json", f"[{good}, {line}]")
    assert records(tmp_path, "b.jsonl", good) == [{"prompt": "whole \U0001f600"}]


def test_a_nul_in_a_parquet_row_is_told_with_its_row(tmp_path):
    with pytest.raises(DataError, match=r"row 2 of .*NUL"):
        records(tmp_path, "a.parquet", parquet(pa.table({"prompt": ["x", "a\0b"]})))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": NaN}\n'),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": null}\n'),
        ("a.jsonl", '{"prompt": "x"}\n{"other": "y"}\n'),
        ("a.json", '[{"prompt": "x"}, {"prompt": Infinity}]'),
        ("a.parquet", parquet(pa.table({"prompt": [1.5, math.nan]}))),
        ("a.parquet", parquet(pa.table({"prompt": ["x", None]}))),
        *(
            (name, f"prompt{sep}n\nx{sep}1\n{word}{sep}2\n")
            for word in ("nan", "NaN", "None", "null", "NULL", "N/A", "NA", " nan ")
            for name, sep in (("a.csv", ","), ("a.tsv", "\t"))
        ),
    ],
)
def test_a_missing_value_is_never_a_prompt(tmp_path, name, data):
    with pytest.raises(DataError, match=r"row 2 of .* has no text in column 'prompt'"):
        rows(tmp_path, name, data, prompt="prompt")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
@pytest.mark.parametrize("cell", ["", "  ", '""'])
def test_an_empty_cell_is_an_empty_prompt(tmp_path, name, cell):
    cell = cell if name == "a.csv" else cell.strip('"')
    sep = "," if name == "a.csv" else "\t"
    with pytest.raises(DataError, match=r"row 2 of .* has an empty prompt"):
        rows(tmp_path, name, f"prompt{sep}n\nx{sep}1\n{cell}{sep}2\n", prompt="prompt")


def test_words_for_nothing_are_text_where_a_format_has_a_null_and_inside_longer_text(tmp_path):
    assert asked_text(rows(tmp_path, "a.jsonl", '{"prompt": "None"}')[0]) == "None"
    assert answer_of(rows(tmp_path, "a.txt", "NaN\n", split="text")[0]) == "NaN"
    assert asked_text(rows(tmp_path, "a.csv", "prompt\nNone of it\n")[0]) == "None of it"


def test_a_missing_value_is_left_out_of_what_is_appended_and_skipped_as_text(tmp_path):
    text = '{"p": "a", "more": NaN}\n{"p": "b", "more": "c"}\n{"p": "d", "more": null}\n'
    found = rows(tmp_path, "a.jsonl", text, prompt="p", append="more")
    assert [asked_text(row) for row in found] == ["a", "b\n\nc", "d"]
    found = rows(tmp_path, "a.csv", "p,more\na,NA\nb,\n", prompt="p", append="more")
    assert [asked_text(row) for row in found] == ["a", "b"]
    found = rows(tmp_path, "b.jsonl", '{"p": NaN}\n{"p": "x"}\n', split="text", prompt="p")
    assert [answer_of(row) for row in found] == ["x"]


def test_labels_of_every_type_are_their_words(tmp_path):
    labels = ("no", "yes")
    for values in ([0, 1], [0.0, 1.0], ["0", "1"], ["No", "YES"], [False, True]):
        table = pa.table({"t": ["a", "b"], "l": values})
        found = rows(tmp_path, "a.parquet", parquet(table), prompt="t", label="l", labels=labels)
        assert [row["label"] for row in found] == ["no", "yes"]


def test_a_class_may_be_called_none_where_the_labels_say_so_and_is_missing_elsewhere(tmp_path):
    text = "t,l\na,None\nb,spam\n"
    found = rows(tmp_path, "a.csv", text, prompt="t", label="l", labels=("None", "spam"))
    assert [row["label"] for row in found] == ["None", "spam"]
    for missing in ("None", ""):
        with pytest.raises(DataError, match=r"row 1 of .*\b(no text|label)"):
            rows(tmp_path, "a.csv", f"t,l\na,{missing}\nb,spam\n", prompt="t", label="l")


DAY = datetime.date(2024, 3, 1)
NOON = datetime.datetime(2024, 3, 1, 12, 30)  # noqa: DTZ001 - as files hold it
ZONED = NOON.replace(tzinfo=datetime.UTC)


@pytest.mark.parametrize(
    ("value", "yes", "no"),
    [
        (1, ["1", "1.0", "1e0", " 1 "], ["2", "01", "true", "x", "", "null"]),
        (1.0, ["1", "1.0"], ["1.5", "true"]),
        ("1", ["1", "1.0"], ["01", "true"]),
        (" 1 ", ["1"], []),
        ("007", ["007"], ["7"]),
        (2**63 + 1, [str(2**63 + 1)], [str(2**63)]),
        (0.1, ["0.1"], ["1"]),
        (True, ["true", "True", "TRUE"], ["1", "yes", "false"]),
        ("True", ["true", "True"], ["1"]),
        ("safe", ["safe"], ["Safe", "unsafe"]),
        (None, ["null", "Null"], ["", "None", "0"]),
        (math.nan, ["null"], ["nan", "0"]),
        ("", [""], ["null", "0"]),
        (DAY, ["2024-03-01"], ["2024-03-02", "1"]),
        (NOON, ["2024-03-01T12:30:00", "2024-03-01 12:30"], ["2024-03-01", "x"]),
        (ZONED, ["2024-03-01T12:30:00+00:00", "2024-03-01 12:30"], ["2024-03-01"]),
    ],
)
def test_a_condition_compares_values_by_their_type(value, yes, no):
    assert [text for text in yes if not matches(value, text)] == []
    assert [text for text in no if matches(value, text)] == []


def test_a_condition_of_any_type_keeps_its_rows_whatever_the_file_holds(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"p": "int", "l": 1}\n{"p": "float", "l": 1.0}\n{"p": "text", "l": "1"}\n'
        '{"p": "true", "l": true}\n{"p": "word", "l": "True"}\n{"p": "null", "l": null}\n{"p": "no"}\n'
    )
    for wanted, expected in (
        (1, ["int", "float", "text"]),
        (1.0, ["int", "float", "text"]),
        ("1", ["int", "float", "text"]),
        (True, ["true", "word"]),
        ("true", ["true", "word"]),
        (None, ["null", "no"]),
    ):
        faults = Faults("s.yaml")
        source = {"path": "a.jsonl", "prompt": "p", "where": {"l": wanted}}
        (task,) = tasks_of({"kind": "rows", "splits": {"train": source}}, tmp_path, faults)
        assert faults.found == []
        (_, spec) = task.splits[0]
        found = prompts(read_source(spec, split_name="train"))
        assert found == expected, wanted


def test_a_date_is_a_condition(tmp_path):
    table = pa.table({"p": ["a", "b"], "day": [DAY, datetime.date(2024, 3, 2)]})
    (tmp_path / "a.parquet").write_bytes(parquet(table))
    for wanted in (DAY, "2024-03-01"):
        source = {"path": "a.parquet", "prompt": "p", "where": {"day": wanted}}
        faults = Faults("s.yaml")
        (task,) = tasks_of({"kind": "rows", "splits": {"train": source}}, tmp_path, faults)
        (_, spec) = task.splits[0]
        assert prompts(read_source(spec, split_name="train")) == ["a"]


def test_a_condition_that_no_row_meets_lists_the_values_that_there_are(tmp_path):
    lines = [{"p": "x", "l": index % 3, "k": None} for index in range(7)]
    lines += [{"p": "x", "l": f"word {index}", "k": True} for index in range(9)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    with pytest.raises(DataError) as caught:
        rows(tmp_path, "a.jsonl", text, prompt="p", where=(("k", "true"), ("l", "9")))
    told = str(caught.value)
    assert "k: true (9), null (7)" in told
    assert "l: 0 (3), 1 (2), 2 (2), 'word 0' (1)" in told
    assert "and 6 other values" in told
    assert "16 rows before selection" in told
