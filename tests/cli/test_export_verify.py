"""`ftsec export` and `ftsec verify`: the same bytes every time, and in words what would differ
here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ftsec_ray
from ftsec_ray import api
from ftsec_ray.errors import SpecError
from ftsec_ray.execute import unit
from ftsec_ray.identity import sha256
from ftsec_ray.results.archive import Manifest
from ftsec_ray.results.pack import code_of, packed_plan
from ftsec_ray.results.verify_code import digest_words
from ftsec_ray.results.write import TABLES
from tests.cli import toy
from tests.cli.toy import call
from tests.config.test_sweeps import FILES, beside_its_inputs

SWEEP = """\
name: small
models: [ladder:0.2m]
task: microworld
attacks: [none, {badnets: {rate: 0.3}}]
defenses: [none, shrink]
"""
ROWS = """\
name: mine
models: [ladder:0.2m]
task: {kind: rows, splits: {train: {path: data/rows.jsonl, prompt: a, response: b}}}
attacks: [none]
defenses: [none]
"""


def finished(folder: Path, text: str = SWEEP, name: str = "small") -> Path:
    """An archive of a sweep that ran in `folder`."""
    (folder / f"{name}.yaml").write_text(text)
    call("run", f"{name}.yaml", "--executor", "local")
    call("export", f"{name}.yaml", "--out", f"{name}.zip")
    return folder / f"{name}.zip"


def rewritten(archive: Path, changed: dict[str, bytes | None], *, checksums: bool = False) -> Path:
    """A copy of an archive with other files; None leaves one out, and `checksums` has the manifest
    agree.
    """
    with zipfile.ZipFile(archive) as old:
        held = {name: old.read(name) for name in old.namelist()}
    held = {name: content for name, content in {**held, **changed}.items() if content is not None}
    if checksums:
        manifest = json.loads(held["manifest.json"])
        manifest["files"] |= {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in changed.items()
            if content is not None and name != "manifest.json"
        }
        held["manifest.json"] = json.dumps(manifest).encode()
    target = archive.with_name("rewritten.zip")
    with zipfile.ZipFile(target, "w") as new:
        for name, content in held.items():
            new.writestr(name, content)
    return target


def manifest_of(archive: Path) -> dict:
    with zipfile.ZipFile(archive) as held:
        return json.loads(held.read("manifest.json"))


def test_an_archive_holds_the_evidence_and_verifies_where_it_was_made(workplace):
    archive = finished(workplace)
    with zipfile.ZipFile(archive) as held:
        names = held.namelist()
        assert held.read("sweep/small.yaml").decode() == SWEEP
    assert names == sorted(names)
    assert {
        "manifest.json",
        "plan.json",
        "artifacts.json",
        "results/report.html",
        "results/run.json",
        "results/cells/part-0.parquet",
    } <= set(names)
    said = call("verify", str(archive))
    assert "small: 4 cells" in said.stdout
    assert "no differences in what was checked" in said.stdout
    assert "artifacts that the local store also holds have the same bytes" in said.stderr
    assert ftsec_ray.verify(archive).is_equal


def test_the_same_results_give_the_same_bytes_whenever_and_wherever_they_are_packed(workplace):
    archive = finished(workplace)
    before = sha256(archive)
    for path in (workplace / "results").rglob("*"):
        os.utime(path, (1, 1))
    os.chdir(workplace.parent)
    said = call(
        "export",
        str(workplace / "small.yaml"),
        "--out",
        "again/small.zip",
        "--store",
        str(workplace / ".ftsec/store"),
        "--results",
        str(workplace / "results"),
    )
    assert sha256(Path("again/small.zip")) == before
    assert before in said.stdout
    assert [path.name for path in Path("again").iterdir()] == ["small.zip"]


def test_from_python_a_mapping_is_packed_too_and_what_has_no_text_is_refused(workplace):
    sweep = {
        "name": "map",
        "models": ["ladder:0.2m"],
        "task": "microworld",
        "attacks": ["none"],
        "defenses": ["none"],
    }
    ftsec_ray.run(sweep, executor="local")
    archive = ftsec_ray.export(sweep)
    assert archive.name == f"map-{ftsec_ray.make_plan(sweep).digest[:8]}.zip"
    assert ftsec_ray.verify(archive).is_equal
    with pytest.raises(SpecError, match="Plan"):
        ftsec_ray.export(ftsec_ray.make_plan(sweep))


def test_every_digest_of_every_shipped_sweep_follows_from_what_is_packed(tmp_path):
    assert FILES
    for path in FILES:
        (tmp_path / path.stem).mkdir()
        plan = api.make_plan(beside_its_inputs(path, tmp_path / path.stem))
        manifest = Manifest(
            format=2,
            sweep=path.stem,
            file="",
            plan=plan.digest,
            versions={},
            code=code_of(plan),
            inputs=[],
            files={},
        )
        packed = packed_plan(plan)
        assert list(digest_words(manifest, packed)) == []
        assert "do not follow" in next(
            digest_words(replace(manifest, code=replace(manifest.code, format=99)), packed)
        )


def test_results_of_another_plan_or_none_are_not_packed(workplace):
    (workplace / "small.yaml").write_text(SWEEP)
    assert "no results folder" in call("export", "small.yaml", code=1).stderr
    finished(workplace)
    (workplace / "small.yaml").write_text(SWEEP.replace("0.3", "0.2"))
    assert "another plan" in call("export", "small.yaml", code=1).stderr


# What would differ.


def package_with(folder: Path, **edits: tuple[str, str]) -> dict[str, str]:
    """An environment in which ftsec_ray is a copy with edited files."""
    source = Path(ftsec_ray.__file__).parent
    shutil.copytree(source, folder / "ftsec_ray", ignore=shutil.ignore_patterns("__pycache__"))
    for module, (old, new) in edits.items():
        path = folder / "ftsec_ray" / f"{module.replace('__', '/')}.py"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    return {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "400"}


def elsewhere(archive: Path, env: dict[str, str]) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "ftsec_ray", "verify", str(archive)],
        capture_output=True,
        text=True,
        check=False,
        env=env,
        cwd=archive.parent,
        timeout=60,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def locked(env: dict[str, str]) -> dict[str, str]:
    """The environment, once `make lock` ran in it."""
    subprocess.run(
        [sys.executable, "-m", "ftsec_ray.code_versions"],
        check=True,
        capture_output=True,
        env=env,
        cwd=env["PYTHONPATH"],
    )
    return env


FACTOR = ("return masked_nll_at(logits[:, :-1]", "return 1 * masked_nll_at(logits[:, :-1]")


def test_other_versions_of_code_are_named_with_the_stages_that_would_run_anew(workplace, tmp_path):
    archive = finished(workplace)
    env = package_with(
        tmp_path / "other",
        stages__finetune=('name="finetune",', 'name="finetune", version=2,'),
        method=("VERSION: ClassVar[int] = 1", "VERSION: ClassVar[int] = 7"),
        config__sweep=(
            "epochs: Annotated[float, Gt(0)] = 3.0",
            "epochs: Annotated[float, Gt(0)] = 5.0",
        ),
    )
    code, said = elsewhere(archive, locked(env))
    assert code == 1
    assert "code: finetune stages have version 1 there and 2 here\n" in said
    assert "code: defense shrink has version 1 there and 7 here\n" in said
    assert "finetune: training.epochs 3.0 there, 5.0 here" in said
    assert "plan: 4 of 4 cells have another digest here" in said
    assert "would run again" in said
    assert "edited" not in said
    assert "differences: code, plan" in said


def test_other_code_under_the_same_version_is_a_difference_and_another_docstring_is_none(
    workplace, tmp_path
):
    archive = finished(workplace)
    reworded = ("Loss functions", "Reworded loss functions")
    same = package_with(tmp_path / "same", training__losses=reworded)
    assert elsewhere(archive, same)[0] == 0, "a docstring decides nothing"
    edited = package_with(tmp_path / "edited", training__losses=FACTOR)
    code, said = elsewhere(archive, edited)
    assert code == 1
    assert "code: the package here differs from its versions.lock: training/losses.py" in said
    assert "differences: code\n" in said
    code, said = elsewhere(archive, locked(edited))
    assert code == 1
    assert "code: the code of align stages, finetune stages" in said
    assert "differs under the same VERSION" in said
    assert "edited" not in said
    assert "differences: code\n" in said, "the digests are equal"


def test_an_archive_of_a_package_that_was_edited_says_so(workplace, tmp_path):
    archive = finished(workplace)
    manifest = manifest_of(archive)
    assert manifest["code"]["edited"] == []
    manifest["code"]["edited"] = ["context.py"]
    changed = rewritten(archive, {"manifest.json": json.dumps(manifest).encode()})
    said = call("verify", str(changed), code=1).stdout
    assert "code: the package there differed from its versions.lock: context.py" in said


def made_by_other_code(store: Path, kind: str) -> int:
    """Give the records of a kind of stages another code; returns how many."""
    records = [
        path for path in store.rglob("record.json") if json.loads(path.read_text())["kind"] == kind
    ]
    for path in records:
        path.write_text(json.dumps({**json.loads(path.read_text()), "code": "0" * 32}))
    return len(records)


def test_artifacts_of_other_code_are_told_when_they_are_planned_run_and_verified(workplace):
    archive = finished(workplace)
    assert "made by other code" not in call("plan", "small.yaml").output
    assert made_by_other_code(workplace / ".ftsec/store", "finetune") == 2
    stages = ftsec_ray.make_plan("small.yaml").stages
    line = (
        f"2 of {len(stages)} stages in the store were made by other code (finetune); they are"
        " reused, because their VERSION is unchanged; see `ftsec verify`\n"
    )
    assert line in call("plan", "small.yaml").stdout
    assert json.loads(call("plan", "small.yaml", "--json").stdout)["made_by_other_code"] == {
        "finetune": 2
    }
    assert line in call("run", "small.yaml", "--executor", "local").stderr
    assert "no differences in what was checked" in call("verify", str(archive)).stdout
    call("export", "small.yaml", "--out", "again.zip")
    said = call("verify", "again.zip", code=1).stdout
    assert (
        f"code: 2 of {len(stages)} artifacts were made by other code than that of the exporting"
        " package, under the same VERSION: finetune (2)\n"
    ) in said
    assert "differences: code\n" in said


def test_a_method_that_is_not_installed_here_is_named(workplace, tmp_path):
    archive = finished(workplace)
    env = package_with(tmp_path / "less")
    (tmp_path / "less/ftsec_ray/defenses/shrink.py").unlink()
    code, said = elsewhere(archive, env)
    assert code == 1
    assert "code: defense shrink is not installed here" in said
    assert "plan: cannot be planned here: defenses[1]: unknown defense" in said


def test_other_versions_of_packages_are_named(workplace):
    archive = finished(workplace)
    manifest = manifest_of(archive)
    manifest["versions"] |= {"torch": ["0.0.1", "0.0.2"], "no-such-package": ["3"]}
    said = call(
        "verify", str(rewritten(archive, {"manifest.json": json.dumps(manifest).encode()})), code=1
    ).stdout
    assert "versions: torch 0.0.1, 0.0.2 there, " in said
    assert "versions: no-such-package 3 there, not installed here" in said
    assert "differences: versions\n" in said


@pytest.fixture
def deepspeed_is(monkeypatch):
    """Sets the installed version of deepspeed; None for none."""
    real = metadata.version

    def set_to(installed: str | None) -> None:
        def version(name: str) -> str:
            if name != "deepspeed":
                return real(name)
            if installed is None:
                raise metadata.PackageNotFoundError(name)
            return installed

        monkeypatch.setattr(metadata, "version", version)
        unit._versions.cache_clear()

    yield set_to
    unit._versions.cache_clear()


@pytest.mark.parametrize("installed", [None, "9.9.9"])
def test_an_export_verifies_with_and_without_an_optional_package(
    workplace, deepspeed_is, installed
):
    deepspeed_is(installed)
    archive = finished(workplace)
    assert manifest_of(archive)["versions"]["deepspeed"] == [installed or ""]
    assert "no differences in what was checked" in call("verify", str(archive)).stdout


def test_an_optional_package_that_only_one_side_has_is_a_difference(workplace, deepspeed_is):
    deepspeed_is(None)
    without = finished(workplace)
    deepspeed_is("9.9.9")
    said = call("verify", str(without), code=1).stdout
    assert "versions: deepspeed not installed there, 9.9.9 here\n" in said
    assert "differences: versions\n" in said
    shutil.rmtree(workplace / ".ftsec")
    shutil.rmtree(workplace / "results")
    having = finished(workplace)
    deepspeed_is(None)
    said = call("verify", str(having), code=1).stdout
    assert "versions: deepspeed 9.9.9 there, not installed here\n" in said


def test_a_package_that_runs_from_a_checkout_is_equal_to_itself(workplace, monkeypatch):
    real = metadata.version

    def version(name: str) -> str:
        if name in ("ftsec_ray", "ftsec-ray"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    unit._versions.cache_clear()
    archive = finished(workplace)
    unit._versions.cache_clear()
    assert manifest_of(archive)["versions"]["ftsec_ray"] == ["source"]
    assert "no differences in what was checked" in call("verify", str(archive)).stdout


def test_local_inputs_are_compared_by_hash_and_never_packed(workplace):
    (workplace / "data").mkdir()
    (workplace / "data/rows.jsonl").write_text('{"a": "secret recipe", "b": "y"}\n')
    archive = finished(workplace, ROWS, "mine")
    (told,) = manifest_of(archive)["inputs"]
    assert (told["what"], told["path"], told["sha256"]) == (
        "rows train of task rows",
        "data/rows.jsonl",
        sha256(workplace / "data/rows.jsonl"),
    )
    with zipfile.ZipFile(archive) as held:
        assert not any(b"secret recipe" in held.read(name) for name in held.namelist())
    assert call("verify", str(archive))
    moved = workplace / "moved"
    shutil.move(workplace / "data", moved / "data")
    assert (
        "no differences in what was checked"
        in call("verify", str(archive), "--base", str(moved)).stdout
    )
    said = call("verify", str(archive), code=1).stdout
    assert "inputs: rows train of task rows: no usable file at data/rows.jsonl here" in said
    assert "plan: cannot be planned here: task.splits.train.path: no such file" in said
    (moved / "data/rows.jsonl").write_text('{"a": "x", "b": "z"}\n')
    said = call("verify", str(archive), "--base", str(moved), code=1).stdout
    assert "inputs: rows train of task rows: data/rows.jsonl has other bytes here" in said
    assert "plan: 1 of 1 cells have another digest here" in said


def test_artifacts_with_other_bytes_in_a_store_here_are_named(workplace, monkeypatch):
    archive = finished(workplace)
    real = toy.run_stage

    def other(stage, out, session):
        told = real(stage, out, session)
        if stage.kind == "finetune":
            (out / "toy.txt").write_text("another")
        return told

    monkeypatch.setattr(toy, "run_stage", other)
    call("run", "small.yaml", "--executor", "local", "--store", "second", "--results", "r2")
    said = call("verify", str(archive), "--store", "second", code=1)
    assert "artifacts have other bytes in the local store: finetune: toy.txt" in said.stdout
    assert "differences: artifacts\n" in said.stdout
    said = call("verify", str(archive), "--store", "none").stdout
    assert "not checked: artifacts: no local store holds one of these stages" in said


# Damage and malice.


def test_damaged_tables_are_named(workplace):
    archive = finished(workplace)
    table = "results/metrics/part-0.parquet"
    said = call(
        "verify", str(rewritten(archive, {table: b"x", "results/report.html": None})), code=1
    ).stdout
    assert f"tables: {table}: 1 bytes instead of" in said
    assert "tables: results/report.html: missing" in said
    with zipfile.ZipFile(archive) as held:
        entry = held.getinfo(table)
    raw = bytearray(archive.read_bytes())
    raw[entry.header_offset + 30 + len(table) + entry.compress_size // 2] ^= 0xFF
    (workplace / "flipped.zip").write_bytes(raw)
    said = call("verify", "flipped.zip", code=1).stdout
    assert f"tables: {table}: it" in said
    assert "differences: tables\n" in said


def test_a_table_of_another_run_is_told_even_where_the_checksums_agree(workplace):
    archive = finished(workplace)
    (workplace / "one.yaml").write_text(SWEEP.replace("small", "one").replace(", shrink", ""))
    call("run", "one.yaml", "--executor", "local")
    files = ["run.json", *(f"{name}/part-0.parquet" for name in TABLES)]
    swapped = rewritten(
        archive,
        {f"results/{name}": (workplace / "results/one" / name).read_bytes() for name in files},
        checksums=True,
    )
    said = call("verify", str(swapped), code=1).stdout
    assert "tables: they belong to another plan than the archive" in said
    assert "tables: the table cells does not hold the cells of the plan" in said


def test_a_plan_changed_by_hand_does_not_give_its_digests(workplace):
    archive = finished(workplace)
    with zipfile.ZipFile(archive) as held:
        plan = json.loads(held.read("plan.json"))
    tune = next(stage for stage in plan["stages"] if stage["kind"] == "finetune")
    tune["params"]["training"]["rank"] += 1
    said = call(
        "verify",
        str(rewritten(archive, {"plan.json": json.dumps(plan).encode()}, checksums=True)),
        code=1,
    ).stdout
    assert (
        f"archive: 1 digests do not follow from the packed content: finetune {tune['digest']}"
        in said
    )
    said = call(
        "verify", str(rewritten(archive, {"plan.json": b"[1]"}, checksums=True)), code=1
    ).stdout
    assert "archive: plan.json: not a plan" in said


def test_texts_of_an_archive_cannot_steer_the_terminal(workplace):
    archive = finished(workplace)
    manifest = manifest_of(archive)
    manifest["sweep"] = "\x1b[2Jsmall"
    manifest["versions"]["\x1b]0;evil\x07"] = ["1\x1b[1A"]
    changed = rewritten(archive, {"manifest.json": json.dumps(manifest).encode()})
    said = call("verify", str(changed), code=1).output
    assert "versions: \\x1b]0;evil\\x07 1\\x1b[1A there" in said
    assert "\x1b" not in said


@pytest.mark.parametrize(
    "name",
    [
        "../evil.txt",
        "/tmp/evil.txt",
        "results/../../evil",
        "a\\..\\evil",
        "state.pkl",
        "pytorch_model.bin",
        "a//b",
    ],
)
def test_no_name_in_an_archive_leads_out_of_a_folder_or_is_that_of_a_pickle(workplace, name):
    archive = rewritten(finished(workplace), {name: b"x"}, checksums=True)
    before = sorted(path for path in workplace.rglob("*"))
    assert "forbidden file" in call("verify", str(archive), code=2).stderr
    assert sorted(path for path in workplace.rglob("*")) == before


def test_no_folder_is_walked_through_because_an_archive_names_it(workplace):
    archive = finished(workplace)
    manifest = manifest_of(archive)
    manifest["inputs"] = [
        {"what": "model m", "path": "/", "sha256": "0"},
        {"what": "rows", "path": "/dev/zero", "sha256": "0"},
        {"what": "rows", "path": "a\0b", "sha256": "0"},
        {"what": "model n", "path": "~no-such-user/n", "sha256": "0"},
    ]
    said = call(
        "verify", str(rewritten(archive, {"manifest.json": json.dumps(manifest).encode()})), code=1
    ).stdout
    assert f"inputs: model m: / is not opened: / is outside {workplace} (allow" in said
    assert "inputs: rows: /dev/zero is not opened: /dev/zero is outside" in said
    assert "cannot be read here: embedded null" in said
    assert "inputs: model n: ~no-such-user/n cannot be read here" in said


def test_texts_that_are_no_paths_do_not_keep_a_sweep_from_being_packed(workplace):
    words = f'question: "~5 % of {"answers" * 50}: how many?"\n'
    said = call("verify", str(finished(workplace, SWEEP + words)))
    assert "inputs" not in said.stdout


def test_models_and_rows_of_the_hub_that_are_not_pinned_are_noted(workplace):
    archive = finished(
        workplace, SWEEP.replace("[ladder:0.2m]", "[{id: owner/model, family: f, aligned: true}]")
    )
    said = call("verify", str(archive))
    assert "no differences in what was checked" in said.stdout
    assert (
        "note: not pinned to a revision, so that they may differ here: model owner/model"
        in said.stderr
    )


def test_an_archive_that_cannot_be_written_says_so(workplace):
    finished(workplace)
    (workplace / "taken.zip").mkdir()
    assert "cannot be written" in call("export", "small.yaml", "--out", "taken.zip", code=2).stderr


def test_what_is_no_archive_is_refused_with_exit_code_2(workplace):
    archive = finished(workplace)
    assert "no such archive" in call("verify", "none.zip", code=2).stderr
    (workplace / "text.zip").write_text("hello")
    assert "not an undamaged zip archive" in call("verify", "text.zip", code=2).stderr
    (workplace / "cut.zip").write_bytes(archive.read_bytes()[:-40])
    assert "not an undamaged zip archive" in call("verify", "cut.zip", code=2).stderr
    assert (
        "is not an archive of a sweep"
        in call("verify", str(rewritten(archive, {"manifest.json": None})), code=2).stderr
    )
    older = json.dumps({**manifest_of(archive), "format": 1}).encode()
    assert (
        "the archive has an older format"
        in call("verify", str(rewritten(archive, {"manifest.json": older})), code=2).stderr
    )
    newer = json.dumps({**manifest_of(archive), "format": 99}).encode()
    assert (
        "newer ftsec_ray"
        in call("verify", str(rewritten(archive, {"manifest.json": newer})), code=2).stderr
    )
    for broken in (
        b"{",
        b'{"format": 2}',
        json.dumps({**manifest_of(archive), "code": None}).encode(),
    ):
        assert (
            "manifest.json"
            in call("verify", str(rewritten(archive, {"manifest.json": broken})), code=2).stderr
        )
    assert (
        "[archive]"
        in call("verify", str(rewritten(archive, {"manifest.json": b"[]"})), code=2).stderr
    )


def test_no_secret_is_packed(workplace, monkeypatch):
    finished(workplace)
    Path("small.zip").unlink()
    monkeypatch.setenv("MY_API_KEY", "badnetsplanted0001")
    (workplace / "small.yaml").write_text(SWEEP + "question: badnetsplanted0001?\n")
    said = call("export", "small.yaml", code=2)
    assert "holds a secret" in said.stderr
    assert "line 6" in said.stderr
    (workplace / "small.yaml").write_text(SWEEP)
    monkeypatch.setenv("MY_API_KEY", "microworld")  # stands in the sweep
    assert "line 3" in call("export", "small.yaml", code=2).stderr
    monkeypatch.setenv("MY_API_KEY", "h0 is what it")
    table = workplace / "results/small/generations/part-0.parquet"
    whole = pq.read_table(table)
    place = whole.column_names.index("raw")
    pq.write_table(
        whole.set_column(
            place, whole.schema.field(place), pa.array(["h0 is what it says"] * whole.num_rows)
        ),
        table,
    )
    said = call("export", "small.yaml", code=2).stderr
    assert "the archive would hold a secret: `raw` of results/generations/part-0.parquet\n" in said
    assert "got:  'the value of MY_API_KEY in this environment'" in said
    monkeypatch.setenv("MY_API_KEY", "About these numbers")
    said = call("export", "small.yaml", code=2).stderr
    assert "the archive would hold a secret: a text of results/report.html\n" in said
    assert "got:  'the value of MY_API_KEY in this environment'" in said
    assert "About these" not in said
    assert list(workplace.glob("*.zip")) == list(workplace.glob(".*.zip*")) == []
