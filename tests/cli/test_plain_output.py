"""Terminals, files and pipes of every encoding, and pipes whose reader has gone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.toy import call

ROOT = Path(__file__).parents[2]
SWEEP = """\
name: small
question: Was hält – und was nicht?
models: [ladder:0.2m]
task: microworld
attacks: [none]
defenses: [none, shrink]
"""


@pytest.fixture
def folder(workplace):
    (workplace / "small.yaml").write_text(SWEEP, encoding="utf-8")
    call("run", "small.yaml")
    return workplace


def ftsec(*args, shell="", **variables):
    """The command line in a process of its own; `shell` stands behind it."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHONIO"))}
    line = " ".join([f"'{sys.executable}' -m ftsec_ray", *args, shell])
    return subprocess.run(
        ["/bin/bash", "-o", "pipefail", "-c", line],
        capture_output=True,
        timeout=120,
        env={**kept, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "0", **variables},
    )


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "ascii:strict"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "cp1252"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "utf-8"},
    ],
    ids=lambda variables: ",".join(variables.values()),
)
def test_the_markdown_table_comes_out_whole_in_every_encoding(folder, variables):
    result = ftsec("report", "small.yaml", "--markdown", **variables)
    assert (result.returncode, result.stderr) == (0, b"")
    name = variables.get("PYTHONIOENCODING", "ascii").partition(":")[0]
    text = result.stdout.decode(name)
    assert "| ladder:0.2m | none |" in text
    assert "One seed: the interval excludes" in text
    dash, dagger = {
        "ascii": ("-", "+"),
        "latin-1": ("-", "+"),
        "cp1252": ("–", "†"),
        "utf-8": ("–", "†"),
    }[name]
    assert f"0.50{dagger} (0.15{dash}0.85)" in text
    assert "?" not in text


def test_errors_and_texts_of_other_scripts_are_written_too_with_their_exit_code(folder):
    (folder / "größe 模.yaml").write_text("name: größe 模\n", encoding="utf-8")
    result = ftsec("plan", "'größe 模.yaml'", PYTHONIOENCODING="ascii")
    assert result.returncode == 2
    assert b"Traceback" not in result.stderr
    assert b"gr??e ?" in result.stderr
    bad = ftsec("plan", "$'\\xff.yaml'")
    assert bad.returncode == 2
    assert b"Traceback" not in bad.stderr


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_output_into_a_file_has_the_exit_code_of_the_command(folder, encoding):
    out = folder / "out.txt"
    result = ftsec("report", "small.yaml", "--markdown", f"> {out}", PYTHONIOENCODING=encoding)
    assert (result.returncode, result.stderr) == (0, b"")
    assert out.read_bytes().startswith(b"| model | attack |")


@pytest.mark.parametrize(
    ("command", "reader"),
    [
        (("schema",), "| head -1"),
        (("schema",), "2>&1 | head -c 1"),
        (("list", "columns"), "| true"),
        (("status", "small.yaml"), "| true"),
    ],
)
def test_a_pipe_that_closes_early_ends_the_command_quietly(folder, command, reader):
    result = ftsec(*command, shell=reader)
    assert result.stderr == b""
    assert result.returncode in (0, 141)
