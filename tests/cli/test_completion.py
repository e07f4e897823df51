"""What TAB offers, by the script that the shell loads."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ftsec_ray.cli.completion import MAX_ENTRIES, sweep_files
from ftsec_ray.registry import ATTACKS, DEFENSES
from tests.cli.toy import call

ROOT = Path(__file__).parents[2]
bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweeps").mkdir()
    for name in ("mine.yaml", "notes.txt", ".hidden.yaml", "sweeps/grid.yaml", "sweeps/x.py"):
        (tmp_path / name).touch()
    return tmp_path


def offered(folder, *words):
    """What bash offers for the last of the words."""
    command = folder / "bin/ftsec"
    command.parent.mkdir(exist_ok=True)
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m ftsec_ray "$@"\n')
    command.chmod(0o755)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{command.parent}:{os.environ['PATH']}",
    }
    script = "\n".join(
        (
            'eval "$(_FTSEC_COMPLETE=source_bash ftsec)"',
            f"COMP_WORDS=({shlex.join(('ftsec', *words))})",
            f"COMP_CWORD={len(words)}",
            "eval \"$(complete -p ftsec | sed 's/.*-F \\([^ ]*\\) .*/\\1/') ftsec\"",
            'printf "%s\\n" "${COMPREPLY[@]}"',
        )
    )
    result = subprocess.run(
        ["bash", "--norc", "-c", script],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=120,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return [line for line in result.stdout.splitlines() if line]


@bash
def test_bash_completes_verbs_options_methods_and_sweep_files(folder):
    assert {"run", "plan", "init", "show"} <= set(offered(folder, ""))
    assert offered(folder, "run", "mine.yaml", "--dry") == ["--dry-run"]
    assert offered(folder, "show", "bad") == ["badedit", "badnets"]
    assert offered(folder, "run", "") == ["mine.yaml", "sweeps/grid.yaml"]
    assert offered(folder, "report", "mine.yaml", "--correction", "h") == ["holm"]


def test_the_command_installs_its_completion():
    shown = call("--help").stdout
    assert "--install-completion" in shown
    assert "--show-completion" in shown


def test_sweep_files_are_yaml_files_here_and_one_folder_below(folder):
    assert sweep_files("") == ["mine.yaml", "sweeps/grid.yaml"]
    assert sweep_files("sw") == sweep_files("sweeps/") == ["sweeps/grid.yaml"]
    assert sweep_files(f"{folder}/m") == [f"{folder}/mine.yaml"]
    assert sweep_files(".h") == [] == sweep_files("notes")


@pytest.mark.parametrize("odd", ["gone/", "~", "a\nb", "\0", "mine.yaml/", "a/" * 5000])
def test_an_odd_path_offers_nothing(folder, odd):
    assert sweep_files(odd) == []


def test_a_folder_of_very_many_files_is_not_read_whole(folder):
    for number in range(MAX_ENTRIES + 5):
        (folder / f"sweeps/{number}.yaml").touch()
    assert len(sweep_files("sweeps/")) <= MAX_ENTRIES


def test_every_method_is_offered_by_name():
    from ftsec_ray.cli.completion import methods

    assert set(methods("")) == {*ATTACKS.names(), *DEFENSES.names()}
    assert methods("zz") == []
