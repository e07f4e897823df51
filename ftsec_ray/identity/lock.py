"""The lock: what holds the code of stages and methods to their VERSION.

`stages/versions.lock` keeps, per stage kind and per method of the package, its VERSION and a hash
of all the code that it uses from the package, and the token hash of each of those files. A digest
holds the VERSION alone: whoever changes code either raises it, so that artifacts are made anew, or
writes the lock again, and thereby says that results stay the same. `code_versions` knows who
stands in the lock, and a test compares.
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
    """A stage kind or a method, as its declaration says."""

    version: int
    modules: tuple[str, ...]
    """Dotted names of the modules that its work starts in."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the lock says of one owner."""

    version: int
    code: str
    """Hash of the names and token hashes of all files that it uses."""


@dataclass(frozen=True, kw_only=True)
class Lock:
    """What a lock file holds."""

    entries: Mapping[str, Entry]
    """By `stage:craft`, `attack:badnets`, `defense:onion`."""
    files: Mapping[str, str]
    """Path below the package -> token hash."""
    uses: Mapping[str, list[str]] = field(default_factory=dict)
    """Owner -> paths of the files that it uses; empty in a lock that was read."""

    def text(self) -> str:
        """The lock file: sorted, one line per owner and per file."""
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
    """The lock in a file; EnvironmentFault when there is none."""
    try:
        plain = tomllib.loads(path.read_text(encoding="utf-8"))
        return Lock(
            entries={name: Entry(**entry) for name, entry in plain["entries"].items()},
            files=plain["files"],
        )
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise EnvironmentFault(
            f"the lock of the package cannot be read: {error}",
            str(path),
            "the file that is installed with ftsec_ray",
            "install ftsec_ray again, or in a checkout `make lock`",
        ) from error


def make_lock(root: Path, owners: Mapping[str, Owner], without: Iterable[str]) -> Lock:
    """The lock that fits the code below `root`; modules in `without` are not followed."""
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
    """Files of the lock whose tokens are others below `root`, or that are not there."""
    return [
        path
        for path, tokens in lock.files.items()
        if not (root / path).is_file() or file_token_hash(root / path) != tokens
    ]


def lock_faults(lock: Lock, now: Lock) -> Iterator[str]:
    """What of a lock does not fit the code, in sentences that say what to do.

    Args:
        lock: As read from its file.
        now: As `make_lock` makes it.
    """
    again = "run `make lock`"
    changed: dict[str, list[str]] = defaultdict(list)
    for name, entry in now.entries.items():
        locked = lock.entries.get(name)
        if locked is None:
            yield f"{_words(name)} is not in versions.lock: {again}"
        elif locked.version != entry.version:
            yield (
                f"the VERSION of {_words(name)} is {entry.version}, and {locked.version} in"
                f" versions.lock: {again}"
            )
        elif locked.code != entry.code:
            files = [path for path in now.uses[name] if now.files[path] != lock.files.get(path)]
            changed[", ".join(files)].append(name)
    for paths, names in changed.items():
        which = f"files {paths}" if paths else "it uses other files"
        yield (
            f"the code of {_words(*names)} changed ({which}): raise VERSION, or {again} if"
            " results are the same"
        )
    for name in lock.entries.keys() - now.entries.keys():
        yield f"{_words(name)} is in versions.lock and not in the package: {again}"
    stale = sorted(lock.files.keys() - now.files.keys())
    if stale:
        yield f"versions.lock holds files that nothing uses ({', '.join(stale)}): {again}"


def _words(*names: str) -> str:
    """Owners in words: `stages craft, tune; attack badnets`."""
    by_sort: dict[str, list[str]] = defaultdict(list)
    for sort, _, name in (name.partition(":") for name in names):
        by_sort[sort].append(name)
    return "; ".join(
        f"{sort}{'s' if len(own) > 1 else ''} {', '.join(own)}" for sort, own in by_sort.items()
    )
