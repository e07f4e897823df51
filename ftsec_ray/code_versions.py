"""Who stands in `versions.lock`: all stage kinds, methods and judges of the package, their VERSION
and the modules that their work starts in.

`python -m ftsec_ray.code_versions` (`make lock`) writes the lock again.
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
"""Modules around every stage that can decide its bytes: batch sizes after an out-of-memory, which
rows and models a stage gets, threads, and how processes train together.
"""
NOT_FOLLOWED: Mapping[str, str] = {
    "ftsec_ray.code_versions": "names VERSIONs and makes the lock",
    "ftsec_ray.config.strategy": "over how many processes a fine-tune is spread: in no digest",
    "ftsec_ray.errors": "the texts of errors: a stage that fails leaves no artifact",
    "ftsec_ray.execute.watchdog": "ends a stage that takes too long: it leaves no artifact",
    "ftsec_ray.identity.content": "what it makes is in a digest, or a checksum",
    "ftsec_ray.identity.tokens": "makes the lock",
    "ftsec_ray.plan.build": "what it decides is in a digest: kind, methods, params, inputs, seed",
    "ftsec_ray.plan.graph": "what waits for what",
    "ftsec_ray.redact": "takes secrets out of messages and records",
    "ftsec_ray.store": "keeps bytes as they are, and checks them against their record",
    "ftsec_ray.version": "a release alone changes no result",
}
"""Modules and packages that cannot decide the result of a stage -> why."""


def owners() -> dict[str, Owner]:
    """All that must stand in the lock; what comes from outside of the package has none."""
    stages = {
        f"stage:{kind.name}": Owner(
            version=kind.version, modules=(module_of(kind.name), *kind.uses(), *ENGINE)
        )
        for kind in kinds().values()
        if outside_hash(module_of(kind.name)) is None
    }
    methods = {
        f"{registry.kind}:{name}": Owner(version=cls.VERSION, modules=(cls.__module__,))
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
    """The lock that fits the code below `root`, a folder of this package."""
    return make_lock(root, owners(), NOT_FOLLOWED)


def stage_entry(kind: str) -> Entry | None:
    """What the lock says of a stage kind; None when it does not stand there."""
    return read_lock().entries.get(f"stage:{kind}")


def method_code(kind: str, name: str) -> str | None:
    """Hash of the code of a method: from the lock, and for one from outside of the package the
    token hash of its file; None when neither is known here.
    """
    entry = read_lock().entries.get(f"{kind}:{name}")
    if entry is not None:
        return entry.code
    try:
        return outside_hash({"attack": ATTACKS, "defense": DEFENSES}[kind].get(name).__module__)
    except (KeyError, SpecError):
        return None


def stage_code(kind: str, methods: Iterable[Mapping[str, Any]] = ()) -> str:
    """Hash of the code that a stage is made by, as its record holds it.

    Args:
        kind: Of the stage.
        methods: As in its params: {"kind", "name", ...}.
    """
    entry = stage_entry(kind)
    acting = [(str(one["kind"]), str(one["name"])) for one in methods]
    return code_hash(
        entry.code if entry else None,
        [(name, method_code(method_kind, name)) for method_kind, name in acting],
    )


def code_hash(stage: str | None, methods: Iterable[tuple[str, str | None]]) -> str:
    """Hash of the code of a stage kind and of its methods, as (name, hash of its code)."""
    return digest([stage, [list(one) for one in methods]])


def main() -> int:
    """Write the lock again, and say on stderr what changed under an unchanged VERSION."""
    now = lock_of()
    before = read_lock() if LOCK_FILE.is_file() else Lock(entries={}, files={})
    faults = list(lock_faults(before, now))
    LOCK_FILE.write_text(now.text(), encoding="utf-8")
    for fault in faults:
        sys.stderr.write(f"written anew: {fault}\n")
    sys.stderr.write(f"{LOCK_FILE}: {len(now.entries)} entries, {len(now.files)} files\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
