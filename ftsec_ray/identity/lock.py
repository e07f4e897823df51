"""The lock file: it checks that code changes of stages and methods come with a new VERSION.

For each stage kind, method and judge of the package, `stages/versions.lock` holds its VERSION and a
hash of all code of the package that it uses; it also holds the token hash of each of these files. A
digest contains only the VERSION. So after a code change, the developer either increases VERSION, so
that artifacts are made again, or updates the lock, to confirm that results stay the same. A test
compares the lock with the code; `code_versions` lists its entries.
"""

from __future__ import annotations

import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path

from ftsec_ray.errors import EnvironmentFault
from ftsec_ray.identity.canonical import digest
from ftsec_ray.identity.import_closure import ImportGraph
from ftsec_ray.identity.tokens import file_token_hash

ROOT = Path(__file__).resolve().parents[1]
"""Folder of the package."""
LOCK_FILE = ROOT / "stages" / "versions.lock"
_HEADER = """\
# VERSION of every stage kind and method, and a hash of the code that it uses from the package:
# tokens without comments, docstrings and layout. Written by `make lock`; do not edit.
"""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """A stage kind, method or judge."""

    version: int
    modules: tuple[str, ...]
    """Dotted names of its main modules."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The entry of one owner in the lock."""

    version: int
    code: str
    """Hash of the names and token hashes of all files that it uses."""


@dataclass(frozen=True, kw_only=True)
class Lock:
    """The content of a lock file."""

    entries: Mapping[str, Entry]
    """By `stage:craft`, `attack:badnets`, `defense:onion`."""
    files: Mapping[str, str]
    """Path below the package -> token hash."""
    uses: Mapping[str, list[str]] = field(default_factory=dict)
    """Owner -> paths of the files that it uses; empty in a lock that was read from a file."""

    def text(self) -> str:
        """The text of the lock file: sorted, one line per owner and per file."""
        lines = [_HEADER, "[entries]"]
        lines += [
            f'"{name}" = {{ version = {entry.version}, code = "{entry.code}" }}'
            for name, entry in sorted(self.entries.items())
        ]
        lines += ["", "[files]"]
        lines += [f'"{path}" = "{tokens}"' for path, tokens in sorted(self.files.items())]
        return "\n".join(lines) + "\n"


@cache
def read_lock(path: Path = LOCK_FILE) -> Lock:
    """The lock in a file; EnvironmentFault if it cannot be read."""
    try:
        plain = tomllib.loads(path.read_text(encoding="utf-8"))
        return Lock(
            entries={name: Entry(**entry) for name, entry in plain["entries"].items()},
            files=plain["files"],
        )
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise EnvironmentFault(
            f"cannot read versions.lock: {error}",
            str(path),
            "the file that is installed with ftsec_ray",
            "install ftsec_ray again; in a checkout, run `make lock`",
        ) from error


def make_lock(root: Path, owners: Mapping[str, Owner], without: Iterable[str]) -> Lock:
    """The lock for the code in `root`; modules in `without` are not followed."""
    graph = ImportGraph(root, without)
    uses = {name: graph.closure(owner.modules) for name, owner in owners.items()}
    files = {path: file_token_hash(root / path) for path in sorted(set(chain(*uses.values())))}
    entries = {
        name: Entry(
            version=owner.version, code=digest([[path, files[path]] for path in uses[name]])
        )
        for name, owner in owners.items()
    }
    return Lock(entries=entries, files=files, uses=uses)


def edited_files(lock: Lock, root: Path = ROOT) -> list[str]:
    """Files of the lock that are changed or missing in `root`."""
    return [
        path
        for path, tokens in lock.files.items()
        if not (root / path).is_file() or file_token_hash(root / path) != tokens
    ]


def lock_faults(lock: Lock, now: Lock) -> Iterator[str]:
    """The differences between a lock and the code, as sentences that say what to do.

    Args:
        lock: The lock in the file.
        now: The lock for the current code.
    """
    again = "run `make lock`"
    changed: dict[str, list[str]] = defaultdict(list)
    for name, entry in now.entries.items():
        locked = lock.entries.get(name)
        if locked is None:
            yield f"{_words(name)} is not in versions.lock: {again}"
        elif locked.version != entry.version:
            yield (
                f"the VERSION of {_words(name)} is {entry.version}, but {locked.version} in"
                f" versions.lock: {again}"
            )
        elif locked.code != entry.code:
            files = [path for path in now.uses[name] if now.files[path] != lock.files.get(path)]
            changed[", ".join(files)].append(name)
    for paths, names in changed.items():
        which = f"files {paths}" if paths else "it uses other files"
        yield (
            f"the code of {_words(*names)} changed ({which}): increase VERSION, or {again} if"
            " results are the same"
        )
    for name in lock.entries.keys() - now.entries.keys():
        yield f"{_words(name)} is in versions.lock but not in the package: {again}"
    stale = sorted(lock.files.keys() - now.files.keys())
    if stale:
        yield f"versions.lock contains unused files ({', '.join(stale)}): {again}"


def _words(*names: str) -> str:
    """Owners in words: `stages craft, tune; attack badnets`."""
    by_sort: dict[str, list[str]] = defaultdict(list)
    for sort, _, name in (name.partition(":") for name in names):
        by_sort[sort].append(name)
    return "; ".join(
        f"{sort}{'s' if len(own) > 1 else ''} {', '.join(own)}" for sort, own in by_sort.items()
    )
