"""The interpreters of this machine under which identities must be equal."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUPPORTED = ("3.11", "3.12", "3.13")


def _candidates(version: str) -> Iterator[str]:
    on_path = shutil.which(f"python{version}")
    if on_path is not None:
        yield on_path
    home = Path.home()
    for place in (".pyenv/versions", ".local/share/uv/python"):
        for folder in sorted((home / place).glob(f"*{version}*")):
            yield str(folder / "bin" / f"python{version}")


@cache
def interpreter(version: str) -> str | None:
    """Path of a Python of this version; None when there is none."""
    asked = "import sys; print('%d.%d' % sys.version_info[:2])"
    for path in _candidates(version):
        try:
            said = subprocess.run(
                [path, "-c", asked], capture_output=True, text=True, check=False, timeout=60
            )
        except OSError:
            continue
        if said.stdout.strip() == version:
            return path
    return None


def output_under(version: str, *args: str) -> str:
    """What a plain interpreter of this version prints, without any package from elsewhere; skips
    where there is none.
    """
    path = interpreter(version)
    if path is None:
        pytest.skip(f"no Python {version} on this machine")
    done = subprocess.run(
        [path, "-S", *args],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
