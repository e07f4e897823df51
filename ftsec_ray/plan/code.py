"""Which code and which files decide the result of a stage: fingerprints of its kind, its methods
and its inputs on disk.

A kind is covered by the modules listed in `KIND_SOURCES`, a method by its own module (see
`registry`) and by whatever that module imports from the packages in `METHOD_PACKAGES`, so that an
edited helper reruns the stages that call it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ftsec_ray.errors import SpecError
from ftsec_ray.identity import digest, source_fingerprint

_TRAINING = (
    "ftsec_ray.training.setup",
    "ftsec_ray.training.loop",
    "ftsec_ray.training.encode",
    "ftsec_ray.training.losses",
    "ftsec_ray.training.zero",
    "ftsec_ray.models.chat",
    "ftsec_ray.models.lora",
)
_TASK = ("ftsec_ray.data.tasks", "ftsec_ray.data.rows")
_LADDER = (
    "ftsec_ray.models.ladder",
    "ftsec_ray.models.chat",
    "ftsec_ray.training.pretrain",
    "ftsec_ray.data.microworld.*",
)

KIND_SOURCES: dict[str, tuple[str, ...]] = {
    "task": (*_TASK, "ftsec_ray.data.sources", "ftsec_ray.data.records"),
    "task:microworld": (*_TASK, "ftsec_ray.data.microworld.*"),
    "source": ("ftsec_ray.models.load", "ftsec_ray.models.convert"),
    "source:ladder": _LADDER,
    "align": _TRAINING,
    "align:ladder": _LADDER,
    "prepare": (),
    "craft": (),
    "finetune": _TRAINING,
    "bank": _TRAINING,
    "revise": (),
    "inspect": (),
    "score": (),
    "generate": (
        "ftsec_ray.evals.*",
        "ftsec_ray.data.microworld.judge",
        "ftsec_ray.models.generator",
        "ftsec_ray.models.chat",
    ),
}
"""Stage kind, with a variant after a colon where the code differs -> modules; `package.*` means all
of a package.
"""

METHOD_PACKAGES = ("attacks", "defenses", "training", "evals", "data", "models")
_CONTRACTS = ()


def modules_of(kind: str) -> list[str]:
    """Names of all modules that `KIND_SOURCES` lists for a kind, packages expanded."""
    names: list[str] = []
    for entry in KIND_SOURCES[kind]:
        names += _package_modules(entry[:-2]) if entry.endswith(".*") else [entry]
    return names


def _package_modules(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    return sorted(f"{package}.{info.name}" for info in pkgutil.iter_modules(folders or []))


def variant_of(kind: str, params: Mapping[str, Any]) -> str:
    """Key of `KIND_SOURCES` for a stage of this kind and these params."""
    if kind == "task":
        return "task:microworld" if params["task"]["kind"] == "microworld" else kind
    return (
        f"{kind}:ladder"
        if kind in ("source", "align") and str(params.get("source", "")).startswith("ladder:")
        else kind
    )


def kind_code(kind: str) -> list[tuple[str, str]]:
    """(module, fingerprint) of the code of a stage kind."""
    return [(name, source_fingerprint(name)) for name in modules_of(kind)]


@cache
def kind_fingerprint(kind: str) -> str:
    """Digest of the code of a stage kind."""
    return digest(kind_code(kind))


@cache
def imports_fingerprint(module: str) -> str:
    """Digest of the code that a method's module imports from this package, through any number of
    steps.
    """
    return digest(imports_code(module))


def imports_code(module: str) -> dict[str, str]:
    """Module -> fingerprint of the code that a method's module imports from this package, through
    any number of steps.
    """
    seen: dict[str, str] = {}
    waiting = list(_imports_of(module))
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen[name] = source_fingerprint(name)
            waiting += _imports_of(name)
    return seen


@cache
def _imports_of(module: str) -> tuple[str, ...]:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return ()
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    return tuple(sorted({name for name in _imported(tree) if _counts(name)}))


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue  # names for annotations cannot change a result
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from _imported(node)


def _counts(name: str) -> bool:
    parts = name.split(".")
    if (
        parts[0] != "ftsec_ray"
        or len(parts) < 3
        or parts[1] not in METHOD_PACKAGES
        or name in _CONTRACTS
    ):
        return False
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # `name` is a function of a module
        return False


# Files that a sweep names by path enter a digest by their bytes.

_REMEMBER_BYTES = 16 * 2**20


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or of the names and bytes of a folder's files; SpecError when there is
    nothing at `path`.
    """
    if path.is_file():
        return _file_hash(path)
    if not path.is_dir():
        raise SpecError(
            "no file or folder at this path",
            str(path),
            "an existing path",
            "check the spelling; paths are "
            "relative to the folder of the sweep file or to the working directory",
        )
    files = sorted(p for p in path.rglob("*") if p.is_file() and not _is_aside(p.relative_to(path)))
    if not files:
        raise SpecError("an empty folder", str(path), "a folder with a model or rows in it")
    return digest([[str(p.relative_to(path)), _file_hash(p)] for p in files])


def _is_aside(relative: Path) -> bool:
    return relative.suffix == ".md" or any(part.startswith(".") for part in relative.parts)


def _file_hash(path: Path) -> str:
    stat = path.stat()
    return _hash_known(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@cache
def _hash_known(path: str, size: int, mtime_ns: int) -> str:
    if size < _REMEMBER_BYTES:
        return _sha256(path)
    cache = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ftsec_ray" / "content"
    )
    entry = cache / f"{digest([path, size, mtime_ns])}.json"
    if entry.is_file():
        return str(json.loads(entry.read_text())["sha256"])
    found = _sha256(path)
    cache.mkdir(parents=True, exist_ok=True)
    scratch = entry.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps({"path": path, "sha256": found}))
    scratch.rename(entry)
    return found


def _sha256(path: str) -> str:
    with open(path, "rb") as stream:  # noqa: PTH123
        return hashlib.file_digest(stream, "sha256").hexdigest()
