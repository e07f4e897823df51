"""The entries of `versions.lock`: all stage kinds, methods and judges of the package, with their
VERSION and their main modules.

`python -m ftsec_ray.code_versions` (`make lock`) writes the file again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ftsec_ray.discovery import modules_in
from ftsec_ray.errors import SpecError
from ftsec_ray.evals.judging import PACKAGE as JUDGES
from ftsec_ray.evals.judging import judge_class
from ftsec_ray.identity import digest
from ftsec_ray.identity.lock import (
    LOCK_FILE,
    ROOT,
    Entry,
    Lock,
    Owner,
    lock_faults,
    make_lock,
    read_lock,
)
from ftsec_ray.lifecycle import kinds, module_of
from ftsec_ray.registry import ATTACKS, DEFENSES, outside_hash

ENGINE = (
    "ftsec_ray.execute.stage_job",
    "ftsec_ray.execute.unit",
    "ftsec_ray.execute.session",
    "ftsec_ray.execute.worker",
    "ftsec_ray.execute.dist_worker",
)
"""Engine modules that can change the result of every stage: batch sizes after an out-of-memory
error, the rows and models of a stage, threads, and training in several processes.
"""
NOT_FOLLOWED: Mapping[str, str] = {
    "ftsec_ray.code_versions": "lists VERSIONs and makes the lock",
    "ftsec_ray.config.strategy": "sets the number of processes of a fine-tune; in no digest",
    "ftsec_ray.errors": "texts of errors; a failed stage leaves no artifact",
    "ftsec_ray.execute.watchdog": "kills a stage that takes too long; it leaves no artifact",
    "ftsec_ray.identity.content": "its hashes are part of a digest, or a checksum",
    "ftsec_ray.identity.tokens": "makes the lock",
    "ftsec_ray.plan.build": "its decisions are in a digest: kind, methods, params, inputs, seed",
    "ftsec_ray.plan.graph": "the order of stages",
    "ftsec_ray.redact": "removes secrets from messages and records",
    "ftsec_ray.store": "keeps bytes unchanged, and checks them against their record",
    "ftsec_ray.version": "a new release alone changes no result",
}
"""Modules and packages that cannot change the result of a stage -> the reason."""


def owners() -> dict[str, Owner]:
    """The entries of the lock; stage kinds, methods and judges of other packages have none."""
    stages = {
        f"stage:{kind.name}": Owner(
            version=kind.version, modules=(module_of(kind.name), *kind.uses(), *ENGINE)
        )
        for kind in kinds().values()
        if outside_hash(module_of(kind.name)) is None
    }
    methods = {
        f"{registry.kind}:{name}": Owner(version=cls.VERSION, modules=(cls.__module__, *cls.USES))
        for registry in (ATTACKS, DEFENSES)
        for name, cls in ((name, registry.get(name)) for name in registry.names())
        if outside_hash(cls.__module__) is None
    }
    judges = {
        f"judge:{name}": Owner(version=judge_class(name).VERSION, modules=(module,))
        for name, module in modules_in(JUDGES).items()
        if outside_hash(module) is None
    }
    return stages | methods | judges


def lock_of(root: Path = ROOT) -> Lock:
    """The lock for the code in `root`, the folder of this package."""
    return make_lock(root, owners(), NOT_FOLLOWED)


def stage_entry(kind: str) -> Entry | None:
    """The entry of a stage kind in the lock; None if it has none."""
    return read_lock().entries.get(f"stage:{kind}")


def method_code(kind: str, name: str) -> str | None:
    """Hash of the code of a method: from the lock, or for a method of another package the token
    hash of its file; None if it is not installed.
    """
    entry = read_lock().entries.get(f"{kind}:{name}")
    if entry is not None:
        return entry.code
    try:
        return outside_hash({"attack": ATTACKS, "defense": DEFENSES}[kind].get(name).__module__)
    except (KeyError, SpecError):
        return None


def stage_code(kind: str, methods: Iterable[Mapping[str, Any]] = ()) -> str:
    """Hash of the code of a stage, for its record.

    Args:
        kind: Kind of the stage.
        methods: Its methods as in its params: {"kind", "name", ...}.
    """
    entry = stage_entry(kind)
    acting = [(str(method["kind"]), str(method["name"])) for method in methods]
    return code_hash(
        entry.code if entry else None,
        [(name, method_code(method_kind, name)) for method_kind, name in acting],
    )


def code_hash(stage: str | None, methods: Iterable[tuple[str, str | None]]) -> str:
    """Hash of the code of a stage; `methods` are (name, hash of the code) pairs."""
    return digest([stage, [list(pair) for pair in methods]])


def main() -> int:
    """Write the lock again, and print to stderr what changed without a new VERSION."""
    now = lock_of()
    before = read_lock() if LOCK_FILE.is_file() else Lock(entries={}, files={})
    faults = list(lock_faults(before, now))
    LOCK_FILE.write_text(now.text(), encoding="utf-8")
    for fault in faults:
        sys.stderr.write(f"updated: {fault}\n")
    sys.stderr.write(f"{LOCK_FILE}: {len(now.entries)} entries, {len(now.files)} files\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
