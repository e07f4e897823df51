"""One archive of a finished sweep: what somebody needs who wants to repeat its numbers, or to see what would differ.

    manifest.json                    plan, versions, code and local inputs by hash, and the checksum of every other file
    plan.json                        cells and stages with all that decides their digests
    artifacts.json                   checksums of the artifacts, as their records in the store told them
    sweep/<file>                     the sweep as its author wrote it
    results/report.html, results/run.json, results/<table>/part-0.parquet

A zip without time stamps, its names sorted: the same content gives the same bytes. It holds no weights and no rows of the
user. Checksums tell damage and not forgery: publish the archive's own SHA-256 beside a number.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from ftsec_ray.errors import DataError, SpecError
from ftsec_ray.identity import FORMAT_VERSION, canonical, source_fingerprint
from ftsec_ray.method import Method
from ftsec_ray.plan.code import content_hash, imports_code, kind_code, variant_of
from ftsec_ray.plan.graph import Plan
from ftsec_ray.plan.origin import local_path
from ftsec_ray.plan.stage import Cell
from ftsec_ray.redact import environment_secrets, redacted
from ftsec_ray.registry import name_of
from ftsec_ray.results.read import Results, held_tables
from ftsec_ray.results.write import PART, RUN_FILE
from ftsec_ray.schedule.upload import texts_in
from ftsec_ray.spec.faults import Faults
from ftsec_ray.spec.sweep import SweepSpec
from ftsec_ray.spec.yaml_text import read_yaml
from ftsec_ray.store.record import dumped, listing_fault, member_fault, sha256

T = TypeVar("T")
FORMAT = 1
"""Raise when an older package could not read the archive any more."""
MANIFEST, PLAN, ARTIFACTS = "manifest.json", "plan.json", "artifacts.json"
_NO_DATE = (1980, 1, 1, 0, 0, 0)
_MAX_TEXT_BYTES = 512 * 2**20
"""Larger than any plan; more is a mistake or an attack on the reader's memory."""
_CHUNK = 1 << 20


class ArchiveError(DataError):
    """A file that is no archive of a sweep, or an archive that must not be written."""

    code = "archive"
    exit_code = 2


@dataclass(frozen=True, kw_only=True)
class SweepFile:
    """A sweep as its author wrote it."""

    name: str
    """Of the file: a sweep without a name is called after it."""
    text: str
    base: Path
    """Where its relative paths start."""


@dataclass(frozen=True, kw_only=True)
class MethodCode:
    """What of a method's code enters a digest."""

    version: int
    source: str
    """Fingerprint of its module."""
    imports: dict[str, str]
    """Module that it calls -> fingerprint."""


@dataclass(frozen=True, kw_only=True)
class Code:
    """The code behind the digests of a plan."""

    format: int
    """Of stages: see identity.FORMAT_VERSION."""
    kinds: dict[str, list[tuple[str, str]]]
    """Kind of stage, with its variant -> (module, fingerprint)."""
    methods: dict[str, MethodCode]
    """`attack badnets` -> its code."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """A file or folder that the sweep names by path; it is not packed."""

    what: str
    path: str
    """As the sweep names it."""
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an archive says of itself."""

    format: int
    sweep: str
    file: str
    """Name of the sweep file among the files."""
    plan: str
    versions: dict[str, list[str]]
    """Package -> the versions that stages ran with."""
    code: Code
    inputs: list[Input]
    files: dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class PackedStage:
    """A stage and all that decides its digest."""

    digest: str
    kind: str
    method: str | None
    seed: int | None
    inputs: list[tuple[str, str]]
    params: dict[str, Any]

    @property
    def name(self) -> str:
        """The stage in words."""
        return f"{self.kind} {self.method}" if self.method else self.kind


@dataclass(frozen=True, kw_only=True)
class PackedMethod:
    """A method as the stages name it."""

    kind: str
    name: str
    params: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PackedCell:
    """A cell by names and digests."""

    cell: str
    model: str
    task: str
    attack: PackedMethod
    defenses: list[PackedMethod]
    seed: int
    evaluate: str
    stages: list[str]
    search: str | None = None
    """Digest of the attacker's search that the cell belongs to."""
    trial: int | None = None
    """Its number in the search; None for the chosen setting."""

    @property
    def names(self) -> tuple[object, ...]:
        """What a reader knows the cell by."""
        return self.model, self.task, self.attack.name, tuple(one.name for one in self.defenses), self.seed, self.search is not None, self.trial


@dataclass(frozen=True, kw_only=True)
class PackedPlan:
    """The cells and stages of a plan, in its order."""

    cells: list[PackedCell]
    stages: list[PackedStage]


# Packing.


def pack(plan: Plan, results: Results, page: Path, sweep: SweepFile, records: Mapping[str, Mapping[str, Any]], target: Path) -> Path:
    """Write the archive of a plan and its results to `target` and return it; ArchiveError when a secret would get into it.

    Args:
        plan: The plan as this machine makes it.
        results: Its tables.
        page: Its report.
        sweep: The file that gave the plan.
        records: Records of the plan's finished stages, as far as a store holds them.
        target: Replaced when it is there.
    """
    members: dict[str, bytes | Path] = {
        f"sweep/{sweep.name}": sweep.text.encode(), PLAN: _json(asdict(packed_plan(plan))),
        ARTIFACTS: _json({digest: record["files"] for digest, record in sorted(records.items())}),
        f"results/{page.name}": page,
        **{f"results/{name}": results.folder / name for name in (RUN_FILE, *(f"{table}/{PART}" for table in held_tables(results.meta)))}}
    manifest = Manifest(
        format=FORMAT, sweep=plan.spec.name, file=f"sweep/{sweep.name}", plan=plan.digest, versions=_versions(results, records),
        code=code_of(plan), inputs=inputs_of(plan.spec, sweep), files={name: _checksum(one) for name, one in sorted(members.items())})
    _refuse_secrets(sweep, members)
    members[MANIFEST] = _json(asdict(manifest))
    scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(scratch, "w") as archive:
            for name, content in sorted(members.items()):
                _add(archive, name, content)
        scratch.replace(target)
    except OSError as error:
        raise ArchiveError("the archive cannot be written", str(target), "a path that takes a file", str(error)) from error
    finally:
        scratch.unlink(missing_ok=True)
    return target


def packed_plan(plan: Plan) -> PackedPlan:
    """A plan as an archive holds it."""
    stages = [PackedStage(digest=one.digest, kind=one.kind, method=one.method, seed=one.seed, inputs=list(one.inputs), params=dict(one.params))
              for one in plan.stages.values()]
    return PackedPlan(cells=[_packed_cell(cell) for cell in plan.cells], stages=stages)


def _packed_cell(cell: Cell) -> PackedCell:
    return PackedCell(cell=cell.digest, model=cell.model.name, task=cell.task.name, attack=_packed_method(cell.attack),
                      defenses=[_packed_method(one) for one in cell.defenses], seed=cell.seed, evaluate=cell.evaluate, stages=list(cell.stages),
                      search=cell.searched.key if cell.searched else None, trial=cell.searched.trial if cell.searched else None)


def _packed_method(method: Method) -> PackedMethod:
    return PackedMethod(kind=method.KIND, name=name_of(method), params=json.loads(canonical(method)))


def code_of(plan: Plan) -> Code:
    """The code that the digests of a plan cover."""
    kinds = sorted({variant_of(stage.kind, stage.params) for stage in plan.stages.values()})
    methods = {f"{one.KIND} {name_of(one)}": type(one) for cell in plan.cells for one in (cell.attack, *cell.defenses)}
    return Code(format=FORMAT_VERSION, kinds={kind: kind_code(kind) for kind in kinds},
                methods={name: method_code(cls) for name, cls in sorted(methods.items())})


def method_code(cls: type[Method]) -> MethodCode:
    """The code of a method."""
    return MethodCode(version=cls.VERSION, source=source_fingerprint(cls.__module__), imports=imports_code(cls.__module__))


def inputs_of(spec: SweepSpec, sweep: SweepFile) -> list[Input]:
    """The local models, rows and judges of a sweep by the hash of their bytes, each by the path that the sweep gives."""
    named = {text: located(text, sweep.base) for text in texts_in(read_yaml(sweep.text, Faults(sweep.name))) if "\n" not in text and "\0" not in text}
    found = []
    for what, path in _local_inputs(spec):
        written = next((text for text, place in named.items() if place == path.resolve()), str(path))
        found.append(Input(what=what, path=written, sha256=content_hash(path)))
    return found


def located(text: str, base: Path) -> Path:
    """What a text of a sweep file means as a path; that of a judge stands behind its kind."""
    return (base / Path(text.removeprefix("classifier:")).expanduser()).resolve()


def _local_inputs(spec: SweepSpec) -> Iterator[tuple[str, Path]]:
    for model in spec.models:
        for source in (model.source, model.unaligned):
            path = local_path(source) if source and not source.startswith("ladder:") else None
            if path is not None:
                yield f"model {model.name}" if source == model.source else f"unaligned twin of model {model.name}", path
    for task in spec.tasks:
        yield from ((f"rows {split} of task {task.name}", Path(source.path)) for split, source in task.splits if source.path is not None)
    kind, _, place = (spec.evaluation.judge or "").partition(":")
    if kind == "classifier" and Path(place).is_dir():
        yield "judge", Path(place)


def _versions(results: Results, records: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    told = [results.meta.get("versions", {}), *(record.get("versions", {}) for record in records.values())]
    return {name: sorted({str(one[name]) for one in told if name in one}) for name in sorted({name for one in told for name in one})}


def _json(value: Mapping[str, Any]) -> bytes:
    return dumped(value).encode()


def _checksum(content: bytes | Path) -> dict[str, Any]:
    if isinstance(content, bytes):
        return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return {"bytes": content.stat().st_size, "sha256": sha256(content)}


def _add(archive: zipfile.ZipFile, name: str, content: bytes | Path) -> None:
    entry = zipfile.ZipInfo(name, _NO_DATE)
    entry.compress_type, entry.external_attr, entry.create_system = zipfile.ZIP_DEFLATED, 0o644 << 16, 3
    if isinstance(content, bytes):
        archive.writestr(entry, content)
        return
    entry.file_size = content.stat().st_size
    with content.open("rb") as source, archive.open(entry, "w") as sink:
        shutil.copyfileobj(source, sink, _CHUNK)


def _refuse_secrets(sweep: SweepFile, members: Mapping[str, bytes | Path]) -> None:
    """ArchiveError where a file holds a secret of this environment, or the sweep file anything that looks like one."""
    if redacted(sweep.text) != sweep.text:
        where = [number for number, line in enumerate(sweep.text.splitlines(), start=1) if redacted(line) != line]
        raise ArchiveError("the sweep file holds a secret, or what looks like one", f"line {', '.join(map(str, where))}" if where else sweep.name,
                           "a sweep that anybody may read", "take it out; tokens and passwords come from the environment")
    secrets = environment_secrets()
    for name, content in members.items():
        found = next((source for secret, source in secrets.items() if _holds(content, secret)), None)
        if found is not None:
            raise ArchiveError("a secret would get into the archive", f"{found} in {name}", "files without it",
                               "`ftsec report` writes tables and report again without the secrets of the environment")


def _holds(content: bytes | Path, secret: str) -> bool:
    if isinstance(content, Path) and content.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        texts = [column for column in pq.read_table(content).columns if pa.types.is_string(column.type)]
        return any(pc.any(pc.match_substring(column, secret)).as_py() for column in texts)
    return secret.encode() in (content if isinstance(content, bytes) else content.read_bytes())


# Reading.


@dataclass(frozen=True)
class Archive:
    """An archive that is one: its manifest can be read, and no name in it leads out of a folder."""

    path: Path
    manifest: Manifest
    damage: dict[str, str] = field(default_factory=dict)
    """File that is not as the manifest says -> what is wrong with it."""

    @classmethod
    def open(cls, path: Path) -> Archive:
        """The archive in a file, every checksum looked at; ArchiveError when it is none or of a newer format."""
        want, fix = "a zip that `ftsec export` wrote", "get it again, or give the path of an archive"
        if not path.is_file():
            raise ArchiveError("no such archive", str(path), want, fix)
        try:
            with zipfile.ZipFile(path) as archive:
                entries = {entry.filename: entry for entry in archive.infolist()}
                for name in sorted(entries):
                    fault = member_fault(name)
                    if fault is not None:
                        raise ArchiveError(f"a file that no archive may hold: {fault}", name, "names inside of one folder, and no pickles",
                                           "do not unpack it")
                if MANIFEST not in entries:
                    raise ArchiveError(f"{path.name} is not an archive of a sweep", sorted(entries)[:8], f"a zip with {MANIFEST}", fix)
                manifest = _manifest(_read(archive, entries[MANIFEST], _MAX_TEXT_BYTES))
                twice = len(archive.infolist()) - len(entries)
                return cls(path, manifest, {**_damage(archive, entries, manifest), **({"names": f"{twice} of them occur twice"} if twice else {})})
        except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError) as broken:
            raise ArchiveError(f"{path.name} is not a whole zip archive", str(broken), want, fix) from broken

    def read(self, name: str, shape: type[T]) -> T | None:
        """The values of a JSON file of the archive; None when the file is damaged or not of this shape."""
        text = self.text(name)
        return None if text is None else _parsed(text, shape)

    def text(self, name: str) -> str | None:
        """A text of the archive; None when it is damaged."""
        if name in self.damage or name not in self.manifest.files:
            return None
        with zipfile.ZipFile(self.path) as archive:
            return _read(archive, archive.getinfo(name), _MAX_TEXT_BYTES).decode(errors="replace")

    def unpack(self, under: str, folder: Path) -> Path:
        """Write the undamaged files below a name of the archive into a folder, and return it."""
        with zipfile.ZipFile(self.path) as archive:
            for name in sorted(self.manifest.files):
                if name.startswith(f"{under}/") and name not in self.damage:
                    target = folder / name.removeprefix(f"{under}/")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(name) as source, target.open("wb") as sink:
                        shutil.copyfileobj(source, sink, _CHUNK)
        return folder


def _manifest(content: bytes) -> Manifest:
    try:
        plain = json.loads(content)
    except ValueError as broken:
        raise ArchiveError(f"its {MANIFEST} is not JSON", str(broken), "JSON as ftsec writes it") from broken
    form = plain.get("format") if isinstance(plain, dict) else None
    if not isinstance(form, int) or form > FORMAT:
        raise ArchiveError("an archive of a format that this ftsec_ray does not know", form, f"up to {FORMAT}", "read it with a newer ftsec_ray")
    fault = listing_fault(plain)
    found = _parsed(content.decode(errors="replace"), Manifest)
    if found is None or fault is not None or found.file not in found.files:
        raise ArchiveError(f"its {MANIFEST} does not say what a manifest says", fault or sorted(plain), "a manifest as ftsec writes it")
    return found


def _parsed(text: str, shape: type[T]) -> T | None:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(shape).validate_json(text)
    except ValidationError:
        return None


def _damage(archive: zipfile.ZipFile, entries: Mapping[str, zipfile.ZipInfo], manifest: Manifest) -> dict[str, str]:
    found = {name: "not in its manifest" for name in entries if name != MANIFEST and name not in manifest.files}
    for name, expected in manifest.files.items():
        fault = _fault(archive, entries.get(name), expected)
        if fault is not None:
            found[name] = fault
    return dict(sorted(found.items()))


def _fault(archive: zipfile.ZipFile, entry: zipfile.ZipInfo | None, expected: Mapping[str, Any]) -> str | None:
    if entry is None:
        return "missing"
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "a link"
    if entry.file_size != expected["bytes"]:
        return f"{entry.file_size} bytes instead of {expected['bytes']}"
    try:
        with archive.open(entry) as stream:
            same = _digest(stream) == expected["sha256"]
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as broken:
        return f"it cannot be read back: {broken}"
    return None if same else "its bytes have changed"


def _digest(stream: IO[bytes]) -> str:
    seen = hashlib.sha256()
    while part := stream.read(_CHUNK):
        seen.update(part)
    return seen.hexdigest()


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, limit: int) -> bytes:
    if entry.file_size > limit:
        raise ArchiveError(f"{entry.filename} is larger than any that ftsec writes", f"{entry.file_size} bytes", f"at most {limit}")
    with archive.open(entry) as stream:
        return stream.read(limit)


def sweep_file(sweep: object) -> SweepFile:
    """A sweep as a file: from a path, a YAML text, or a mapping; SpecError for what has no text of its own."""
    if isinstance(sweep, Mapping):
        return SweepFile(name="sweep.yaml", text=json.dumps(sweep, indent=1, ensure_ascii=False) + "\n", base=Path.cwd())
    if isinstance(sweep, str) and ("\n" in sweep or ": " in sweep):
        return SweepFile(name="sweep.yaml", text=sweep, base=Path.cwd())
    if isinstance(sweep, (str, Path)):
        path = Path(sweep)
        fault = member_fault(path.name)
        if fault is not None:
            raise SpecError("a sweep file whose name no archive can hold", path.name, "printable characters", "rename the file")
        return SweepFile(name=path.name, text=path.read_text(encoding="utf-8"), base=path.parent.resolve())
    raise SpecError("a sweep without a text of its own", type(sweep).__name__, "the path of a sweep file, its text, or a mapping",
                    "an archive holds the sweep as its author wrote it, so that others can plan it again")
