"""What tests of the command line share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli import toy


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory in which runs train nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ftsec_ray.schedule.execution.execute", toy.execute)
    toy.ran.clear()
    toy.warned.clear()
    return tmp_path
