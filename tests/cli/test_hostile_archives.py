"""Archives that mean harm: forged numbers, bombs, odd members, paths that lead elsewhere, signatures
of somebody else.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import resource
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

import ftsec_ray
from ftsec_ray.errors import EnvironmentFault, SpecError
from ftsec_ray.results.archive_limits import LIMITS, ArchiveError, check_table, within_memory
from ftsec_ray.results.read import Results
from tests.cli import toy
from tests.cli.toy import call

SWEEP = """\
name: small
question: Does it hold?
models: [ladder:0.2m]
task: microworld
attacks: [none, {badnets: {rate: 0.3}}]
defenses: [none, shrink]
"""
Members = dict[str, bytes]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """An honest archive, its sweep and its store beside it."""
    folder = tmp_path_factory.mktemp("honest")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("ftsec_ray.schedule.execution.execute", toy.execute)
        toy.ran.clear()
        toy.warned.clear()
        (folder / "small.yaml").write_text(SWEEP)
        call("run", "small.yaml", "--executor", "local")
        call("export", "small.yaml", "--out", "small.zip")
    return folder / "small.zip"


@pytest.fixture
def held(made, tmp_path, monkeypatch) -> Members:
    """The members of the honest archive, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(made) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(held: Members, *, renew: bool = True, name: str = "forged.zip") -> Path:
    """An archive of these members, its checksums renewed: a forger would do no less."""
    held = dict(held)
    if renew:
        manifest = json.loads(held["manifest.json"])
        manifest["files"] = {
            one: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for one, content in held.items()
            if one not in ("manifest.json", "manifest.json.sig")
        }
        held["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(name, "w", zipfile.ZIP_DEFLATED) as archive:
        for one, content in sorted(held.items()):
            archive.writestr(one, content)
    return Path(name)


def table_of(held: Members, name: str) -> pa.Table:
    return pq.ParquetFile(io.BytesIO(held[f"results/{name}/part-0.parquet"])).read()


def put(held: Members, name: str, table: pa.Table) -> None:
    """Replace a table, and the count of its rows in run.json."""
    sink = io.BytesIO()
    pq.write_table(table, sink)
    held[f"results/{name}/part-0.parquet"] = sink.getvalue()
    edit(held, "results/run.json", lambda meta: meta["rows"].update({name: table.num_rows}))


def edit(held: Members, name: str, change: Callable[[Any], object]) -> None:
    plain = json.loads(held[name])
    change(plain)
    held[name] = json.dumps(plain).encode()


def with_rows(name: str, change: Callable[[list[dict[str, Any]]], object]) -> Callable[..., None]:
    """A forgery that changes the rows of a table."""

    def forge(held: Members) -> None:
        table = table_of(held, name)
        rows = table.to_pylist()
        change(rows)
        put(held, name, pa.Table.from_pylist(rows, table.schema))

    return forge


def in_json(name: str, change: Callable[[Any], object]) -> Callable[..., None]:
    return lambda held: edit(held, name, change)


def all_zero(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if row["metric"] == "harmful_rate":
            row.update(value=0.0, ci_low=0.0, ci_high=0.3)


def run_json(**values: object) -> Callable[..., None]:
    return in_json("results/run.json", lambda meta: meta.update(values))


def evil_page(held: Members) -> None:
    held["results/report.html"] = b"<h1>All is well</h1><script>alert(1)</script>"


def one_word(held: Members) -> None:
    page = held["results/report.html"]
    held["results/report.html"] = page.replace(b"Does it hold?", b"It does hold.")


FORGERIES = {
    "metric value": (
        with_rows("metrics", lambda rows: rows[0].update(value=0.11)),
        "metrics: 1 do not follow from the verdicts in `generations`: ladder:0.2m x microworld x",
    ),
    "every success 0": (
        with_rows("metrics", all_zero),
        "harmful_rate 0 (n 4) stored, 0.5 (n 4) from",
    ),
    "metric n": (with_rows("metrics", lambda rows: rows[0].update(n=400)), "(n 400) stored,"),
    "metric interval": (
        with_rows("metrics", lambda rows: rows[0].update(ci_low=0.0, ci_high=1.0)),
        "metrics: 1 do not follow",
    ),
    "metric dropped": (with_rows("metrics", lambda rows: rows.pop()), "is missing"),
    "metric twice": (with_rows("metrics", lambda rows: rows.append(rows[0])), "occurs twice"),
    "metric of no answers": (
        with_rows("metrics", lambda rows: rows.append({**rows[0], "metric": "asr_no_trigger"})),
        "stored, no answers to count",
    ),
    "metric of another cell": (
        with_rows("metrics", lambda rows: rows[0].update(cell="0" * 32)),
        "metrics: rows of 1 cells that are not in `cells`",
    ),
    "unknown metric outside its interval": (
        with_rows(
            "metrics",
            lambda rows: rows.append(
                {**rows[0], "metric": "filter_tpr", "value": 0.9, "ci_low": 0.0, "ci_high": 0.2}
            ),
        ),
        "filter_tpr 0.9 (n 4) is outside its own interval",
    ),
    "metric is no number": (
        with_rows("metrics", lambda rows: rows[0].update(value=float("nan"))),
        "metrics: 1 do not follow",
    ),
    "verdict flipped": (
        with_rows("generations", lambda rows: rows[0].update(verdict="refused")),
        "harmful_rate 0.5 (n 4) stored, 0.25 (n 4) from its answers",
    ),
    "verdict nulled": (
        with_rows("generations", lambda rows: rows[0].update(verdict=None)),
        "stored, 0.333 (n 3, 1 null) from its answers",
    ),
    "answer dropped": (with_rows("generations", lambda rows: rows.pop()), "metrics: "),
    "all answers dropped": (
        with_rows("generations", lambda rows: rows.clear()),
        "stored, no answers to count",
    ),
    "answer added": (
        with_rows("generations", lambda rows: rows.append({**rows[0], "prompt_id": "h9"})),
        "(n 4) stored,",
    ),
    "answer twice": (
        with_rows("generations", lambda rows: rows.append(rows[0])),
        "an answer occurs twice",
    ),
    "answer of another cell": (
        with_rows("generations", lambda rows: rows.append({**rows[0], "cell": "0" * 32})),
        "generations: rows of 1 cells that are not in `cells`",
    ),
    "comparison": (
        with_rows("comparisons", lambda rows: rows[0].update(conclusion="better")),
        "comparisons: 1 do not follow from the tables",
    ),
    "comparison dropped": (with_rows("comparisons", lambda rows: rows.pop()), "rows stored,"),
    "attack parameters": (
        with_rows("cells", lambda rows: rows[0].update(attack_params='{"rate": 0.9}')),
        "cells: 1 values differ from the plan",
    ),
    "model": (
        with_rows("cells", lambda rows: rows[0].update(model="gpt-5")),
        "model 'gpt-5', planned 'ladder:0.2m'",
    ),
    "success metric": (
        with_rows("cells", lambda rows: rows[0].update(success_metric="cacc")),
        "success_metric 'cacc', planned",
    ),
    "status of a cell": (
        with_rows("cells", lambda rows: rows[0].update(status="pending")),
        "have a status unlike their stages",
    ),
    "status unheard of": (with_rows("cells", lambda rows: rows[0].update(status="ok")), "counts"),
    "cell twice": (
        with_rows("cells", lambda rows: rows.append(rows[0])),
        "the table cells does not hold the cells of the plan",
    ),
    "stage kind": (
        with_rows("stages", lambda rows: rows[0].update(kind="magic")),
        "kind 'magic', planned",
    ),
    "stage status": (
        with_rows("stages", lambda rows: [row.update(status="failed") for row in rows]),
        "cells: 4 have a status unlike their stages",
    ),
    "stage dropped": (with_rows("stages", lambda rows: rows.pop()), "hold the stages of the plan"),
    "question": (run_json(question="Is it safe? Yes."), "differs from the sweep: question"),
    "counts": (run_json(counts={"done": 9, "failed": 0, "pending": 0}), "run.json: counts"),
    "sweep text": (
        run_json(sweep_text=SWEEP.replace("0.3", "0.01")),
        "differs from the sweep: sweep_text",
    ),
    "hooks": (run_json(defense_hooks={}), "differs from the sweep: defense_hooks"),
    "controls": (run_json(controls=[]), "differs from the sweep: controls"),
    "correction": (run_json(correction="none"), "run.json is not a file that ftsec writes"),
    "older schema": (run_json(schema="5"), "tables: they cannot be opened"),
    "warnings of another shape": (run_json(warnings=5), "run.json is not a file that ftsec writes"),
    "unknown key": (run_json(note="trust me"), "run.json is not a file that ftsec writes"),
    "plan of another": (run_json(plan="0" * 32), "they belong to another plan than the archive"),
    "another page": (evil_page, "report: report.html is not the page of its tables"),
    "a word of the page": (one_word, "it differs from line"),
    "code of a stage": (
        in_json("manifest.json", lambda m: m["code"]["kinds"]["score"].update(code="0" * 32)),
        "the code of score stages differs under the same VERSION",
    ),
    "code of the records": (
        in_json("artifacts.json", lambda all_: [one.update(code="0") for one in all_.values()]),
        "artifacts were made by other code",
    ),
    "parameters of a cell": (
        in_json("plan.json", lambda plan: plan["cells"][0]["attack"].update(params={"rate": 1})),
        "digests do not follow from the packed content",
    ),
    "seed of a cell": (
        in_json("plan.json", lambda plan: plan["cells"][0].update(seed=7)),
        "digests do not follow from the packed content",
    ),
    "methods of a stage are none": (
        in_json("plan.json", lambda plan: plan["stages"][0].update(params={"methods": 3})),
        "digests do not follow from the packed content",
    ),
    "sweep file": (
        lambda held: held.update({"sweep/small.yaml": SWEEP.replace("0.3", "0.2").encode()}),
        "cells have another digest here",
    ),
}


def test_an_honest_archive_agrees_and_what_it_cannot_show_is_named(made, monkeypatch):
    monkeypatch.chdir(made.parent)
    said = call("verify", "small.zip").stdout
    for line in (
        "agrees: digests of 4 cells and 16 stages\n",
        "agrees: 4 cells and 16 stages agree with the plan\n",
        "agrees: 16 metrics follow from the verdicts on 16 answers\n",
        "agrees: report.html follows from the tables, byte for byte\n",
        "not checked: completions and verdicts: whether these models gave these answers,",
        "not checked: weights: an archive holds none\n",
        "not checked: stages: their durations, tokens, hosts, errors and warnings",
        "not checked: texts of answers: not stored (keep_generations: false)\n",
        "not checked: its publisher: it is not signed, so anybody can have made it\n",
        "small: 4 cells, 16 stages; no differences in what was checked\n",
    ):
        assert line in said
    told = json.loads(call("verify", "small.zip", "--json").stdout)
    assert told["is_equal"]
    assert told["differences"] == []
    assert told["signature"] == "none"
    assert any(one.startswith("weights") for one in told["unchecked"])


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_archive_is_found_out_though_its_checksums_agree(held, name):
    forge, told = FORGERIES[name]
    forge(held)
    found = ftsec_ray.verify(packed(held))
    words = [f"{topic}: {what}" for topic, what in found.differences]
    assert not found.is_equal
    assert any(told in one for one in words), words


def test_bytes_that_are_no_text_are_a_difference_and_no_traceback(held):
    table = table_of(held, "cells")
    raw = pa.array([b"\xff\xfe"] * table.num_rows, pa.binary()).view(pa.string())
    put(held, "cells", table.set_column(0, table.schema.field(0), raw))
    said = call("verify", str(packed(held)), code=1).stdout
    assert "tables: the tables cannot be checked: UnicodeDecodeError" in said


def test_a_disk_that_is_full_is_not_a_damaged_archive(held, made, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ftsec_ray.results.archive.shutil.copyfileobj", full)
    said = call("verify", str(made), code=3).stderr
    assert "small.zip cannot be unpacked" in said
    assert "No space left on device" in said
    assert "set TMPDIR to another folder" in said


def test_columns_of_another_schema_are_not_decoded(tmp_path):
    import ftsec_ray.schema as tables

    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"cell": ["a" * 100] * 100, "x": ["b"] * 100}), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pq.ParquetFile, "iter_batches", lambda *_, **__: pytest.fail("decoded"))
        check_table(path, "x", tables.cells())


def test_a_question_that_changed_after_the_run_is_refused_and_not_packed_as_a_forgery(
    made, tmp_path, monkeypatch
):
    monkeypatch.chdir(made.parent)
    (tmp_path / "small.yaml").write_text(SWEEP.replace("Does it hold?", "Does it still hold?"))
    said = call("export", str(tmp_path / "small.yaml"), "--out", "new.zip", code=1).stderr
    assert "the sweep file changed after its results were collected" in said
    assert "got:  'question, sweep_text'" in said
    assert "ftsec report SWEEP" in said
    assert not Path("new.zip").exists()


def test_a_token_in_tables_of_older_code_is_not_packed(made, tmp_path, monkeypatch):
    shutil.copytree(made.parent, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    path = next(Path("results").rglob("stages/part-0.parquet"))
    table = pq.ParquetFile(path).read()
    place = table.schema.get_field_index("error")
    errors = pa.array([f"403 hf_{'aB3dE5gH1j' * 3}"] * table.num_rows)
    pq.write_table(table.set_column(place, table.schema.field(place), errors), path)
    said = call("export", "small.yaml", "--out", "new.zip", code=2).stderr
    assert "the archive would hold a secret: `error` of results/stages/part-0.parquet\n" in said
    assert "got:  'Hugging Face token'" in said
    assert not Path("new.zip").exists()


def test_forged_metrics_with_a_page_made_from_them_are_found_out_too(held):
    with_rows("metrics", all_zero)(held)
    folder = Path("unpacked")
    for name, content in held.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    from ftsec_ray.report.page import render

    held["results/report.html"] = render(Results.open(folder / "results")).encode()
    said = call("verify", str(packed(held)), code=1).stdout
    assert "no differences" not in said
    assert "metrics: 4 do not follow from the verdicts" in said
    assert "differences: metrics" in said
    assert "report.html follows from the tables" in said


def test_checksums_of_artifacts_are_held_against_the_store_here(held, made):
    edit(
        held,
        "artifacts.json",
        lambda plain: [one["files"]["toy.txt"].update(sha256="0") for one in plain.values()],
    )
    found = ftsec_ray.verify(packed(held), store=made.parent / ".ftsec/store")
    assert any("16 of 16 artifacts have other bytes" in what for _, what in found.differences)


# Members.


def zipped(name: str, content: bytes = b"x", **fields: object) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    for field, value in fields.items():
        setattr(entry, field, value)
    return entry


def beside(made: Path, entry: zipfile.ZipInfo, content: bytes = b"x") -> Path:
    """A copy of the archive with one more member."""
    target = Path("odd.zip")
    target.write_bytes(made.read_bytes())
    with zipfile.ZipFile(target, "a") as archive:
        archive.writestr(entry, content)
    return target


ODD_NAMES = (
    "../evil.txt",
    "/etc/evil.txt",
    "results/../../evil",
    "C:\\evil.txt",
    "a\\..\\evil",
    "results/report.html\0.txt",
    "results/REPORT.html",
    "Manifest.json",
    "results/./report.html",
    "results//report.html",
    "results/",
    "results/cells/",
    "results/cells/part-1.parquet",
    "results/cells/evil.so",
    "state.pkl",
    "results/model.pt",
    "sweep/setup.py",
    "sweep/evil.so",
    "sweep/.hidden",
    "sweep/a/b.yaml",
    "sweep/" + "a" * 300 + ".yaml",
    "x" * 60_000,
    "sweep/a\nb.yaml",
    "sweep/\x1b[2J.yaml",
    "sweep/\u202egnp.yaml",
    "extra.txt",
    "__main__.py",
    "ftsec_ray/__init__.py",
    "conftest.py",
    "",
    ".",
    "..",
    "~/x",
)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_member_that_ftsec_never_writes_is_refused_before_anything_is_unpacked(
    made, tmp_path, monkeypatch, name
):
    monkeypatch.chdir(tmp_path)
    held = zipped("placeholder")
    held.filename = name
    path = beside(made, held)
    if "\0" in name:  # zipfile writes what it is given
        assert b"\0.txt" in path.read_bytes()
    with pytest.raises(ArchiveError) as refused:
        ftsec_ray.verify(path)
    assert "forbidden file" in str(refused.value) or "not an undamaged zip" in str(refused.value)
    assert len(str(refused.value)) < 1500
    assert sorted(one.name for one in tmp_path.iterdir()) == ["odd.zip"]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"external_attr": (stat.S_IFLNK | 0o777) << 16}, "a link"),
        ({"external_attr": (stat.S_IFIFO | 0o666) << 16}, "a folder, pipe or device"),
        ({"external_attr": (stat.S_IFCHR | 0o666) << 16}, "a folder, pipe or device"),
        ({"external_attr": (stat.S_IFDIR | 0o755) << 16}, "a folder, pipe or device"),
        ({"external_attr": 0x10}, "a folder, pipe or device"),
        (
            {"compress_type": zipfile.ZIP_BZIP2},
            "its compression method 12 is neither stored nor deflated",
        ),
        ({"compress_type": zipfile.ZIP_LZMA}, "its compression method 14"),
    ],
)
def test_links_devices_and_odd_compressions_are_refused(held, fields, told):
    with zipfile.ZipFile("odd.zip", "w") as archive:
        for name, content in held.items():
            more = fields if name == "results/run.json" else {}
            archive.writestr(zipped(name, **more), content)
    said = call("verify", "odd.zip", code=2).stderr
    assert f"the archive holds a forbidden file: {told}" in said
    assert "got:  'results/run.json'" in said
    assert "fix:  do not unpack it" in said


def test_an_encrypted_member_and_one_that_occurs_twice_are_refused(held, made):
    raw = bytearray(made.read_bytes())
    place = raw.rfind(b"PK\1\2")
    raw[place + 8] |= 1
    Path("locked.zip").write_bytes(raw)
    assert "forbidden file: it is encrypted" in call("verify", "locked.zip", code=2).stderr
    path = beside(made, zipped("results/report.html"))
    assert "forbidden file: two with the same name" in call("verify", str(path), code=2).stderr


def test_a_file_that_is_a_zip_and_something_else_is_refused(held, made):
    whole = made.read_bytes()
    for name, content in {
        "front.zip": b"#!/bin/sh\n" + whole,
        "behind.zip": whole + b"x",
        "comment.zip": whole[:-2] + b"\5\0hello",
        "cut.zip": whole[:-1],
        "empty.zip": b"",
        "short.zip": b"PK\5\6",
        "zip64.zip": whole[:-22] + b"PK\6\7" + b"\0" * 16 + whole[-22:],
    }.items():
        Path(name).write_bytes(content)
        assert "is not an undamaged zip archive" in call("verify", name, code=2).stderr


def test_random_damage_is_told_and_never_ends_in_a_traceback(held, made):
    draw, whole = random.Random(0), made.read_bytes()
    for number in range(40):
        raw = bytearray(whole)
        first = len(raw) - 900 if number % 2 else 0  # the directory of the zip, or anywhere
        for _ in range(draw.choice((1, 3, 30))):
            raw[draw.randrange(first, len(raw))] = draw.randrange(256)
        Path("damaged.zip").write_bytes(raw)
        with suppress(ArchiveError, SpecError):
            assert ftsec_ray.verify("damaged.zip").unchecked


def leaves(value: object, place: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    """The place of every value in some JSON."""
    yield place
    pairs = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, one in pairs:
        yield from leaves(one, (*place, key))


ODD_VALUES = (
    None, True, -1, 10**30, 1.5, float("nan"), "", "\x1b[2J", "x" * 5000, [], {}, [[]], {"a": None}, "/",
)  # fmt: skip


def test_values_of_other_kinds_in_its_json_never_end_in_a_traceback(held):
    draw = random.Random(1)
    for number in range(40):
        changed = dict(held)
        name = ("manifest.json", "plan.json", "artifacts.json", "results/run.json")[number % 4]
        plain = json.loads(changed[name])
        *way, last = draw.choice([one for one in leaves(plain) if one])
        inner = plain
        for key in way:
            inner = inner[key]
        inner[last] = draw.choice(ODD_VALUES)
        changed[name] = json.dumps(plain).encode()
        with suppress(ArchiveError, SpecError):
            assert ftsec_ray.verify(packed(changed, renew=name != "manifest.json")).unchecked


# Bombs.


def test_each_limit_is_told_with_its_number_and_the_variable_that_raises_it(
    made, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for limit in LIMITS:
        if limit.name in ("archive_ratio", "archive_memory_bytes"):
            continue
        with monkeypatch.context() as patch:
            patch.setenv(limit.variable, "3")
            said = call("verify", str(made), code=2).stderr
        assert f"too many {limit.counts}" in said
        assert "at most 3" in said
        assert f"set {limit.variable} in the environment" in said


def test_what_verify_would_not_read_is_not_packed(made, monkeypatch):
    monkeypatch.chdir(made.parent)
    monkeypatch.setenv("FTSEC_MAX_ARCHIVE_ROWS", "5")
    said = call("export", "small.yaml", "--out", "other.zip", code=2).stderr
    assert "too many rows in a table of an archive" in said
    assert "split the sweep; or set FTSEC_MAX_ARCHIVE_ROWS" in said
    assert "do not unpack it" not in said
    monkeypatch.delenv("FTSEC_MAX_ARCHIVE_ROWS")
    for name in ("CELL_ANSWERS", "BYTES"):
        with monkeypatch.context() as patch:
            patch.setenv(f"FTSEC_MAX_ARCHIVE_{name}", "3")
            said = call("export", "small.yaml", "--out", "other.zip", code=2).stderr
        assert f"or set FTSEC_MAX_ARCHIVE_{name} in the environment" in said
    assert not Path("other.zip").exists()


def bomb_of_zeros(held: Members) -> Path:
    held["results/run.json"] = b'{"a": "' + b"0" * 50_000_000 + b'"}'
    return packed(held)


def bomb_of_lists(held: Members) -> Path:
    content = json.loads(held["manifest.json"])
    draw = os.urandom(3_000_000).hex()
    text = (
        json.dumps(content)[:-1]
        + ', "x": ['
        + ",".join(f"[{one}]" for one in map(repr, range(2_600_000)))
        + f'], "y": "{draw}"}}'
    )
    held["manifest.json"] = text.encode()
    return packed(held, renew=False)


def bomb_of_nesting(held: Members) -> Path:
    held["manifest.json"] = b"[" * 200_000 + b"]" * 200_000
    return packed(held, renew=False)


def bomb_of_rows(held: Members) -> Path:
    table = table_of(held, "metrics").slice(0, 1)
    many = pa.concat_tables([table] * 1000).combine_chunks()
    put(held, "metrics", pa.concat_tables([many] * 5200))
    return packed(held)


def bomb_of_text(held: Members) -> Path:
    """A dictionary of one long text, and rows that all name it."""
    table = table_of(held, "generations")
    long = table.slice(0, 1).set_column(
        table.column_names.index("completion"),
        table.schema.field("completion"),
        pa.array(["x" * 500_000]),
    )
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        writer.write_table(pa.concat_tables([long] * 4200))
    held["results/generations/part-0.parquet"] = sink.getvalue()
    edit(held, "results/run.json", lambda meta: meta["rows"].update(generations=4200))
    return packed(held)


def bomb_of_a_list(held: Members) -> Path:
    rows = table_of(held, "cells").to_pylist()
    rows[0]["defenses"] = [None] * 5_200_000
    put(held, "cells", pa.Table.from_pylist(rows, table_of(held, "cells").schema))
    return packed(held)


def bomb_of_members(held: Members) -> Path:
    with zipfile.ZipFile("many.zip", "w") as archive:
        for number in range(20_000):
            archive.writestr(f"sweep/{number}.yaml", b"")
    return Path("many.zip")


BOMBS = {
    bomb_of_zeros: ("results/run.json: too many times its packed size", "FTSEC_MAX_ARCHIVE_RATIO"),
    bomb_of_lists: ("manifest.json: too many values in a JSON", "FTSEC_MAX_ARCHIVE_JSON_VALUES"),
    bomb_of_nesting: ("manifest.json of the archive is not JSON", "JSON as ftsec writes it"),
    bomb_of_rows: ("metrics/part-0.parquet: too many rows", "FTSEC_MAX_ARCHIVE_ROWS"),
    bomb_of_text: ("too many bytes in a table of an archive", "FTSEC_MAX_ARCHIVE_TABLE_BYTES"),
    bomb_of_a_list: ("cells/part-0.parquet: too many rows", "FTSEC_MAX_ARCHIVE_ROWS"),
    bomb_of_members: ("many.zip: too many files in an archive", "FTSEC_MAX_ARCHIVE_MEMBERS"),
}


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: bomb.__name__)
def test_a_bomb_is_refused_within_little_memory(held, bomb):
    path = bomb(held)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArchiveError) as refused:
        ftsec_ray.verify(path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert all(part in str(refused.value) for part in BOMBS[bomb]), str(refused.value)
    assert grown < 400 * 1024


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="RLIMIT_DATA counts on Linux alone")
def test_what_gets_past_the_limits_meets_the_one_of_memory(monkeypatch):
    monkeypatch.setenv("FTSEC_MAX_ARCHIVE_MEMORY_BYTES", "100000000")
    with pytest.raises(ArchiveError, match="FTSEC_MAX_ARCHIVE_MEMORY_BYTES"), within_memory():
        bytearray(300_000_000)
    assert len(bytearray(300_000_000)) == 300_000_000


# Paths.


def test_no_file_outside_of_the_base_is_opened_because_an_archive_names_it(held, monkeypatch):
    os.mkfifo("pipe")
    Path("link").symlink_to("/etc")
    Path("secret.jsonl").write_text('{"a": "x", "b": "y"}\n')
    Path("base").mkdir()
    opened: list[str] = []
    monkeypatch.setattr(
        "ftsec_ray.results.verify.content_hash", lambda path: opened.append(str(path)) or "0"
    )
    named = ["/etc/passwd", "../secret.jsonl", "link/passwd", "~/.ssh/id_rsa", "pipe", "/dev/zero"]
    edit(
        held,
        "manifest.json",
        lambda plain: plain.update(
            inputs=[{"what": "rows", "path": one, "sha256": "0"} for one in named]
        ),
    )
    path = packed(held)
    said = [
        what for topic, what in ftsec_ray.verify(path, base="base").differences if topic == "inputs"
    ]
    assert len(said) == len(named)
    assert opened == []
    said = [
        what for topic, what in ftsec_ray.verify(path, base=".").differences if topic == "inputs"
    ]
    assert opened == []
    assert "rows: pipe is not opened: it is neither a regular file nor a folder" in said
    assert any(
        one.startswith("rows: link/passwd is not opened: /etc/passwd is outside") for one in said
    )
    found = ftsec_ray.verify(path, base="base", inside=".")
    assert opened == [str(Path("secret.jsonl").resolve())]
    assert not found.is_equal


@pytest.mark.parametrize("named", ["/dev/zero", "/etc/passwd", "../outside.jsonl", "pipe"])
def test_a_sweep_in_an_archive_opens_no_file_outside_of_the_base_either(held, named):
    Path("base").mkdir()
    Path("outside.jsonl").write_text('{"a": "x", "b": "y"}\n')
    os.mkfifo("base/pipe")
    text = (
        "name: small\nmodels: [ladder:0.2m]\nattacks: [none]\ndefenses: [none]\n"
        f"task: {{kind: rows, splits: {{train: {{path: {named}, prompt: a, response: b}}}}}}\n"
    )
    held["sweep/small.yaml"] = text.encode()
    found = ftsec_ray.verify(packed(held), base="base")
    (said,) = [what for topic, what in found.differences if topic == "plan"]
    assert f"not made here: the sweep names {named}, which is not opened" in said


def test_an_archive_that_is_a_pipe_a_folder_or_a_link_to_a_device_is_none(held):
    os.mkfifo("pipe.zip")
    Path("folder.zip").mkdir()
    Path("zero.zip").symlink_to("/dev/zero")
    for name in ("pipe.zip", "folder.zip", "zero.zip"):
        assert "no such archive" in call("verify", name, code=2).stderr


# Signatures.


def keys(name: str, *, kind: str = "ed25519", passphrase: bytes | None = None) -> SimpleNamespace:
    """A key pair as ssh-keygen writes it."""
    private: Any = (
        ed25519.Ed25519PrivateKey.generate()
        if kind == "ed25519"
        else rsa.generate_private_key(public_exponent=65537, key_size=2048)
    )
    locked = (
        serialization.NoEncryption()
        if passphrase is None
        else serialization.BestAvailableEncryption(passphrase)
    )
    Path(name).write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, locked
        )
    )
    public = private.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    Path(f"{name}.pub").write_bytes(public + b" someone@somewhere\n")
    return SimpleNamespace(private=Path(name), public=Path(f"{name}.pub"))


def signed(made: Path, key: Path, out: str = "signed.zip") -> Path:
    folder = made.parent
    call(
        "export", str(folder / "small.yaml"), "--out", out, "--sign", str(key),
        "--store", str(folder / ".ftsec/store"), "--results", str(folder / "results"),
    )  # fmt: skip
    return Path(out)


def members_of(path: Path) -> Members:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_publisher_is_told_from_a_forger(held, made):
    mine, other = keys("mine"), keys("other")
    path = signed(made, mine.private)
    said = call("verify", str(path), "--signer", str(mine.public)).stdout
    assert "agrees: signed by ssh-ed25519 SHA256:" in said
    assert "who is in mine.pub" in said
    said = call("verify", str(path)).stdout
    assert "--signer FILE names the publishers" in said
    said = call("verify", str(path), "--signer", str(other.public), code=1).stdout
    assert "signature: it was made by ssh-ed25519 SHA256:" in said
    assert "whose key is not in other.pub" in said
    said = call("verify", str(made), "--signer", str(mine.public), code=1).stdout
    assert "signature: there is none, but mine.pub should have signed it" in said
    both = Path("both.pub")
    both.write_bytes(b"# ours\n" + other.public.read_bytes() + mine.public.read_bytes())
    assert call("verify", str(path), "--signer", "both.pub")
    assert signed(made, mine.private, "again.zip").read_bytes() == path.read_bytes()


def test_a_signature_does_not_hold_for_another_manifest_or_under_another_key(held, made):
    mine, other = keys("mine"), keys("other")
    own = members_of(signed(made, mine.private))
    with_rows("metrics", all_zero)(own)
    said = call("verify", str(packed(own)), "--signer", str(mine.public), code=1).stdout
    assert "is not valid: the manifest was changed" in said
    theirs = members_of(signed(made, other.private))
    own = members_of(signed(made, mine.private))
    edit(
        own,
        "manifest.json.sig",
        lambda plain: plain.update(signature=json.loads(theirs["manifest.json.sig"])["signature"]),
    )
    said = call("verify", str(packed(own, renew=False)), "--signer", str(mine.public), code=1)
    assert "is not valid" in said.stdout
    for broken in (b"", b"{", b"[]", b'{"format": 1, "key": "", "signature": ""}', b"x" * 99_999):
        own["manifest.json.sig"] = broken
        said = call("verify", str(packed(own, renew=False)), code=1).stdout
        assert "signature: it is not a signature written" in said


def test_keys_that_cannot_sign_or_be_asked_for_are_refused_in_words(held, made, monkeypatch):
    folder = made.parent
    where = ("--store", str(folder / ".ftsec/store"), "--results", str(folder / "results"))

    def refused(key: str) -> str:
        said = call("export", str(folder / "small.yaml"), "--sign", key, *where, code=2).stderr
        assert not list(Path().glob("*.zip"))
        return said

    keys("mine")
    keys("rsa", kind="rsa")
    Path("text").write_text("hello")
    Path("large").write_bytes(b"x" * 100_000)
    assert "rsa is not an Ed25519 key" in refused("rsa")
    assert "ssh-keygen -t ed25519" in refused("rsa")
    assert "text is not a usable private key" in refused("text")
    assert "mine.pub is not a usable private key" in refused("mine.pub")
    assert "no such key file" in refused("none")
    assert "no such key file" in refused("/dev/zero")
    assert "the key file is too large" in refused("large")
    for signer in ("rsa.pub", "text", "mine"):
        said = call("verify", str(made), "--signer", signer, code=2).stderr
        assert f"{signer} has no public key of a type that signs archives" in said
    Path("torn.pub").write_text("ssh-ed25519 AAAAC3Nz\n")
    assert "cannot be read" in call("verify", str(made), "--signer", "torn.pub", code=2).stderr
    monkeypatch.setitem(__import__("sys").modules, "cryptography", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'ftsec-ray\[sign\]'"):
        ftsec_ray.verify(made, signer="mine.pub")


def test_a_key_behind_a_passphrase_is_refused(held, made, monkeypatch):
    def locked(*_: object, **__: object) -> None:
        raise TypeError("Key is password-protected, but password was not provided.")

    keys("mine")
    monkeypatch.setattr("cryptography.hazmat.primitives.serialization.load_ssh_private_key", locked)
    folder = made.parent
    said = call(
        "export", str(folder / "small.yaml"), "--sign", "mine",
        "--store", str(folder / ".ftsec/store"), "--results", str(folder / "results"), code=2,
    ).stderr  # fmt: skip
    assert "mine is encrypted" in said
    assert "without a passphrase" in said
