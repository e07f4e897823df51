"""Packs a plan, its results and the sweep file into one archive, always with the same bytes and
without secrets.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ftsec_ray.code_versions import method_code, stage_entry
from ftsec_ray.config.faults import Faults
from ftsec_ray.config.sweep import SweepSpec
from ftsec_ray.config.yaml_text import read_yaml, redacted_yaml
from ftsec_ray.errors import DataError, SpecError
from ftsec_ray.identity import FORMAT_VERSION, canonical, content_hash, sha256
from ftsec_ray.identity.lock import edited_files, read_lock
from ftsec_ray.lifecycle import kind_of
from ftsec_ray.method import Method
from ftsec_ray.plan.graph import Plan
from ftsec_ray.plan.judge_origin import local_judges
from ftsec_ray.plan.origin import local_path
from ftsec_ray.plan.stage import Cell
from ftsec_ray.redact import environment_secret_in, redacted, secrets_in
from ftsec_ray.registry import name_of, outside_hash
from ftsec_ray.results.archive import (
    CHUNK,
    FORMAT,
    Code,
    CodeVersion,
    Input,
    Manifest,
    PackedArtifact,
    PackedCell,
    PackedMethod,
    PackedPlan,
    PackedStage,
)
from ftsec_ray.results.archive_limits import (
    CELL_ANSWERS,
    PACKED,
    TEXT_BYTES,
    UNPACKED,
    ArchiveError,
    check,
    check_json,
    check_table,
)
from ftsec_ray.results.archive_signature import signature_of
from ftsec_ray.results.archive_zip import (
    ARTIFACTS,
    MANIFEST,
    PAGE,
    PLAN,
    SIGNATURE,
    SWEEP_FOLDER,
    name_fault,
)
from ftsec_ray.results.planned_columns import facts_that_differ
from ftsec_ray.results.read import Results, held_tables
from ftsec_ray.results.redacted_tables import secret_in_table
from ftsec_ray.results.write import PART, RUN_FILE, table_schema
from ftsec_ray.schedule.upload import texts_in
from ftsec_ray.store.record import dumped

_NO_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, kw_only=True)
class SweepFile:
    """A sweep as its author wrote it."""

    name: str
    """Name of the file: a sweep without a name gets this name."""
    text: str
    base: Path
    """Folder of its relative paths."""


def sweep_file(sweep: object) -> SweepFile:
    """A sweep as a file: from a path, a YAML text, or a mapping; SpecError for an object without a
    text.
    """
    if isinstance(sweep, Mapping):
        return SweepFile(
            name="sweep.yaml",
            text=json.dumps(sweep, indent=1, ensure_ascii=False) + "\n",
            base=Path.cwd(),
        )
    if isinstance(sweep, str) and ("\n" in sweep or ": " in sweep):
        return SweepFile(name="sweep.yaml", text=sweep, base=Path.cwd())
    if isinstance(sweep, (str, Path)):
        path = Path(sweep)
        if name_fault(f"{SWEEP_FOLDER}/{path.name}") is not None:
            raise SpecError(
                "the name of the sweep file is not allowed in an archive",
                path.name,
                "printable characters, and the ending .yaml",
                "rename the file",
            )
        return SweepFile(
            name=path.name, text=path.read_text(encoding="utf-8"), base=path.parent.resolve()
        )
    raise SpecError(
        "the sweep has no text to export",
        type(sweep).__name__,
        "the path of a sweep file, its text, or a mapping",
        "pass the sweep file: an archive holds it, so that others can plan the sweep again",
    )


def pack(
    plan: Plan,
    results: Results,
    page: str,
    sweep: SweepFile,
    records: Mapping[str, Mapping[str, Any]],
    target: Path,
    *,
    sign: Path | None = None,
) -> Path:
    """Write the archive of a plan and its results to `target` and return it; ArchiveError if it
    would hold a secret, or more than `ftsec verify` reads by default, and DataError if the sweep
    changed after its results were collected.

    Args:
        plan: The plan as this machine makes it.
        results: Its tables.
        page: Its report, made from these tables.
        sweep: The sweep file of the plan.
        records: Records of the plan's finished stages that the store holds.
        target: The archive file; replaced if it exists.
        sign: Private key of the publisher; None: no signature.
    """
    _refuse_secrets_of_sweep(sweep)
    _refuse_changed_sweep(plan, results, sweep)
    members: dict[str, bytes | Path] = {
        f"{SWEEP_FOLDER}/{sweep.name}": sweep.text.encode(),
        PAGE: page.encode(),
        PLAN: _json(asdict(packed_plan(plan))),
        ARTIFACTS: _json(
            {
                digest: asdict(PackedArtifact(files=record["files"], code=record.get("code")))
                for digest, record in sorted(records.items())
            }
        ),
        **{
            f"results/{name}": results.folder / name
            for name in (RUN_FILE, *(f"{table}/{PART}" for table in held_tables(results.meta)))
        },
    }
    manifest = Manifest(
        format=FORMAT,
        sweep=plan.spec.name,
        file=f"{SWEEP_FOLDER}/{sweep.name}",
        plan=plan.digest,
        versions=_versions(results, records),
        code=code_of(plan),
        inputs=inputs_of(plan.spec, sweep),
        files={name: _checksum(content) for name, content in sorted(members.items())},
    )
    _refuse_secrets(results, members)
    held = _json(asdict(manifest))
    members[MANIFEST] = held
    _refuse_what_is_too_large(members)
    _refuse_too_many_answers(results)
    if sign is not None:
        members[SIGNATURE] = signature_of(held, sign)
    _write(members, target)
    return target


def _write(members: Mapping[str, bytes | Path], target: Path) -> None:
    scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(scratch, "w") as archive:
            for name, content in sorted(members.items()):
                _add(archive, name, content)
        check(PACKED, scratch.stat().st_size, "the archive", writes=True)
        scratch.replace(target)
    except OSError as error:
        raise ArchiveError(
            "the archive cannot be written", str(target), "a writable path for a file", str(error)
        ) from error
    finally:
        scratch.unlink(missing_ok=True)


def _refuse_what_is_too_large(members: Mapping[str, bytes | Path]) -> None:
    """ArchiveError for content that `ftsec verify` would not read."""
    sizes = {
        name: len(content) if isinstance(content, bytes) else content.stat().st_size
        for name, content in members.items()
    }
    check(UNPACKED, sum(sizes.values()), "the archive", writes=True)
    for name, content in members.items():
        if isinstance(content, Path) and content.name == PART:
            check_table(content, name, table_schema(content.parent.name), writes=True)
        elif name.endswith(".json"):
            held = content if isinstance(content, bytes) else content.read_bytes()
            check_json(held, name, writes=True)
        else:
            check(TEXT_BYTES, sizes[name], name, writes=True)


def _refuse_too_many_answers(results: Results) -> None:
    """ArchiveError for a cell with more answers than `ftsec verify` reads."""
    import pyarrow.compute as pc
    from pyarrow import parquet

    with parquet.ParquetFile(results.folder / "generations" / PART) as file:
        cells = file.read(columns=["cell"])["cell"]
    for count in pc.value_counts(cells).to_pylist():
        check(CELL_ANSWERS, count["counts"], f"cell {count['values']}", writes=True)


def packed_plan(plan: Plan) -> PackedPlan:
    """A plan in the form of an archive."""
    stages = [
        PackedStage(
            digest=stage.digest,
            kind=stage.kind,
            method=stage.method,
            seed=stage.seed,
            inputs=list(stage.inputs),
            params=dict(stage.params),
        )
        for stage in plan.stages.values()
    ]
    return PackedPlan(cells=[_packed_cell(cell) for cell in plan.cells], stages=stages)


def _packed_cell(cell: Cell) -> PackedCell:
    return PackedCell(
        cell=cell.digest,
        model=cell.model.name,
        task=cell.task.name,
        attack=_packed_method(cell.attack),
        defenses=[_packed_method(defense) for defense in cell.defenses],
        seed=cell.seed,
        answers=cell.answers,
        stages=list(cell.stages),
        search=cell.searched.key if cell.searched else None,
        trial=cell.searched.trial if cell.searched else None,
    )


def _packed_method(method: Method) -> PackedMethod:
    return PackedMethod(
        kind=method.KIND, name=name_of(method), params=json.loads(canonical(method))
    )


def code_of(plan: Plan) -> Code:
    """The code behind the digests of a plan."""
    kinds = sorted({stage.kind for stage in plan.stages.values()})
    methods = {
        f"{method.KIND} {name_of(method)}": type(method)
        for cell in plan.cells
        for method in (cell.attack, *cell.defenses)
    }
    return Code(
        format=FORMAT_VERSION,
        kinds={kind: code_of_kind(kind) for kind in kinds},
        methods={name: code_of_method(name, cls) for name, cls in sorted(methods.items())},
        edited=edited_files(read_lock()),
    )


def code_of_kind(kind: str) -> CodeVersion:
    """The code of a stage kind."""
    entry = stage_entry(kind)
    return CodeVersion(version=kind_of(kind).version, code=entry.code if entry else None)


def code_of_method(name: str, cls: type[Method]) -> CodeVersion:
    """The code of a method, by its kind and name, as in `attack badnets`."""
    kind, _, short = name.partition(" ")
    outside = outside_hash(cls.__module__)
    return CodeVersion(
        version=cls.VERSION,
        code=outside or method_code(kind, short),
        is_outside=outside is not None,
    )


def inputs_of(spec: SweepSpec, sweep: SweepFile) -> list[Input]:
    """The local models, rows and judges of a sweep by the hash of their bytes, each with its path
    in the sweep file.
    """
    named = {}
    for text in texts_in(read_yaml(sweep.text, Faults(sweep.name))):
        with suppress(OSError, RuntimeError, ValueError):  # an invalid path is not a path
            named[text] = located(text, sweep.base)
    inputs = []
    for what, path in _local_inputs(spec):
        written = next(
            (text for text, place in named.items() if place == path.resolve()), str(path)
        )
        inputs.append(Input(what=what, path=written, sha256=content_hash(path)))
    return inputs


def located(text: str, base: Path) -> Path:
    """A text of a sweep file as a path; a judge's path may follow its name and a colon."""
    _, colon, source = text.partition(":")
    is_judge = bool(colon) and "/" not in text.partition(":")[0]
    return (base / Path(source if is_judge else text).expanduser()).resolve()


def _local_inputs(spec: SweepSpec) -> Iterator[tuple[str, Path]]:
    for model in spec.models:
        for source in (model.source, model.unaligned):
            path = local_path(source) if source and not source.startswith("ladder:") else None
            if path is not None:
                yield (
                    (
                        f"model {model.name}"
                        if source == model.source
                        else f"unaligned version of model {model.name}"
                    ),
                    path,
                )
    for task in spec.tasks:
        yield from (
            (f"rows {split} of task {task.name}", Path(source.path))
            for split, source in task.splits
            if source.path is not None
        )
    yield from ((f"judge {name}", path) for name, path in local_judges(spec))


def _versions(results: Results, records: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    sources = [
        results.meta.get("versions", {}),
        *(record.get("versions", {}) for record in records.values()),
    ]
    return {
        name: sorted({str(source[name]) for source in sources if name in source})
        for name in sorted({name for source in sources for name in source})
    }


def _json(value: Mapping[str, Any]) -> bytes:
    return dumped(value).encode()


def _checksum(content: bytes | Path) -> dict[str, Any]:
    if isinstance(content, bytes):
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return {"bytes": content.stat().st_size, "sha256": sha256(content)}


def _add(archive: zipfile.ZipFile, name: str, content: bytes | Path) -> None:
    entry = zipfile.ZipInfo(name, _NO_DATE)
    entry.compress_type, entry.external_attr, entry.create_system = (
        zipfile.ZIP_DEFLATED,
        0o644 << 16,
        3,
    )
    if isinstance(content, bytes):
        archive.writestr(entry, content)
        return
    entry.file_size = content.stat().st_size
    with content.open("rb") as source, archive.open(entry, "w") as sink:
        shutil.copyfileobj(source, sink, CHUNK)


def _refuse_secrets_of_sweep(sweep: SweepFile) -> None:
    """ArchiveError if the sweep file holds a secret of this environment, or text that looks like
    one.
    """
    if redacted_yaml(sweep.text) == sweep.text:
        return
    where = [
        number
        for number, line in enumerate(sweep.text.splitlines(), start=1)
        if redacted(line) != line
    ]
    raise ArchiveError(
        "the sweep file holds a secret, or text that looks like one",
        f"line {', '.join(map(str, where))}" if where else sweep.name,
        "a sweep that anybody may read",
        "remove it; give tokens and passwords through the environment",
    )


def _refuse_changed_sweep(plan: Plan, results: Results, sweep: SweepFile) -> None:
    """DataError if the sweep differs from the one in the results: `ftsec verify` would report the
    archive as forged.
    """
    changed = facts_that_differ(plan, results.meta, sweep.text)
    if changed:
        raise DataError(
            "the sweep file changed after its results were collected",
            ", ".join(changed),
            f"the sweep as in {results.folder / RUN_FILE}",
            "run `ftsec report SWEEP` to collect them again; it runs no stage",
        )


def _refuse_secrets(results: Results, members: Mapping[str, bytes | Path]) -> None:
    """ArchiveError if a file holds a secret of this environment, or the results hold text that
    looks like one.
    """
    for name in held_tables(results.meta):
        secret = secret_in_table(results.table(name, trials=True))
        if secret is not None:
            raise _holds_secret(*secret, f"results/{name}/{PART}")
    for place, what in secrets_in(results.meta):
        raise _holds_secret(f"`{place}`", what, f"results/{RUN_FILE}")
    for name, content in members.items():
        if not name.endswith(f"/{PART}"):
            text = content if isinstance(content, bytes) else content.read_bytes()
            source = environment_secret_in(text.decode("utf-8", "surrogateescape"))
            if source is not None:
                raise _holds_secret("a text", f"the value of {source} in this environment", name)


def _holds_secret(place: str, what: str, name: str) -> ArchiveError:
    return ArchiveError(
        f"the archive would hold a secret: {place} of {name}",
        what,
        "files without secrets",
        "run `ftsec report`: it writes tables and report again without secrets",
    )
