"""What the shell offers behind TAB for arguments whose values this package knows: sweep files and
names of methods and catalogues. Where nothing is offered, the shell completes file names itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

MAX_ENTRIES = 2_000
"""Entries of one folder that are looked at: TAB must answer at once."""
_SUFFIXES = (".yaml", ".yml")


def sweep_files(incomplete: str) -> list[str]:
    """YAML files whose path begins with the text, and those in the folders that do.

    A folder is offered by its files, since the shell would put a space behind its name.
    """
    if "\n" in incomplete or incomplete.startswith("~"):
        return []
    parent, _, start = incomplete.rpartition("/")
    here = f"{parent}/" if "/" in incomplete else ""
    found: list[str] = []
    for entry in _entries(here or "."):
        if not entry.name.startswith(start) or (entry.name.startswith(".") and not start):
            continue
        if entry.is_dir():
            inner = (file.name for file in _entries(entry.path) if _is_sweep(file))
            found += [f"{here}{entry.name}/{name}" for name in inner]
        elif _is_sweep(entry):
            found.append(f"{here}{entry.name}")
    return sorted(name for name in found if "\n" not in name)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(islice(entries, MAX_ENTRIES))
    except (OSError, ValueError):  # a folder that is gone or closed offers nothing
        return []


def _is_sweep(entry: os.DirEntry[str]) -> bool:
    return (
        entry.name.endswith(_SUFFIXES)
        and not entry.name.startswith(".")
        and Path(entry.path).is_file()
    )


def methods(incomplete: str) -> list[str]:
    """Names of attacks and defenses that begin with the text; no method is imported for it."""
    from ftsec_ray.registry import ATTACKS, DEFENSES

    return _beginning({*ATTACKS.names(), *DEFENSES.names()}, incomplete)


def catalogues(incomplete: str) -> list[str]:
    """What `ftsec list` lists."""
    from ftsec_ray.cli.catalogue import KINDS

    return _beginning(KINDS, incomplete)


def judges(incomplete: str) -> list[str]:
    """Names of judges; no judge is imported for it."""
    from ftsec_ray.discovery import modules_in
    from ftsec_ray.evals.judging import PACKAGE

    return _beginning(modules_in(PACKAGE), incomplete)


def _beginning(names: Iterable[str], incomplete: str) -> list[str]:
    return sorted(name for name in names if name.startswith(incomplete))
