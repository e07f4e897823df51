"""The README's commands: every one of `ftsec` and `ray` exists with these options, and shell blocks
are well formed.
"""

from __future__ import annotations

import re
import shlex
import subprocess

import click
import pytest
import typer.main
from click.testing import CliRunner

from ftsec_ray.cli.app import app
from tests.cluster.files import FOLDER, README, ROOT, filled, shell_lines

PROGRAM = typer.main.get_command(app)


def words_of(program):
    """Arguments of every call of a program, as far as a `--` that ends them."""
    found = []
    for line in shell_lines():
        call: list[str] = []
        for word in [*shlex.shlex(line, posix=True, punctuation_chars=True), ";"]:
            if word != "--" and not set(word) <= set("();<>|&"):
                call.append(word)
                continue
            found += [call[1:]] if call[:1] == [program] else []
            call = []
    return found


def parsed(command, words):
    """What a click program says of these words; `--help` stands behind them, so that nothing is
    done.
    """
    return CliRunner().invoke(command, [*words, "--help"])


@pytest.mark.parametrize("words", words_of("ftsec"), ids=" ".join)
def test_a_command_of_ftsec_exists(words):
    said = parsed(PROGRAM, words)
    assert said.exit_code == 0, (words, said.output)


def test_the_readme_shows_the_way_from_a_plan_to_a_report():
    assert [words[0] for words in words_of("ftsec")] == [
        "plan",
        "submit",
        "run",
        "status",
        "report",
    ]


def test_the_commands_of_ray_exist():
    from ray.scripts.scripts import cli

    assert isinstance(cli, click.Group)
    calls = words_of("ray")
    assert {words[0] for words in calls} == {"up", "dashboard", "down", "job"}
    for words in calls:
        said = parsed(cli, words)
        assert said.exit_code == 0, (words, said.output)


def test_an_unknown_option_would_be_noticed():
    assert (
        CliRunner().invoke(PROGRAM, ["plan", "x.yaml", "--gpu-prise", "2", "--help"]).exit_code != 0
    )


def test_the_shell_blocks_are_well_formed():
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) > 8
    for block in blocks:
        done = subprocess.run(
            ["bash", "-n"], input=block, text=True, capture_output=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_filling_in_leaves_no_name_to_be_filled_in_and_each_file_is_filled_in():
    assert set(filled()) == {"aws", "gcp", "rayjob", "raycluster"}
    for name, text in filled().items():
        code = "\n".join(line.partition("#")[0] for line in text.splitlines())
        assert not re.search(r"\b(REGISTRY|PROJECT_ID|STORE)\b", code), name


def test_files_that_the_readme_speaks_of_exist():
    named = set(
        re.findall(
            r"(?<![\w/.-])((?:cluster|sweeps)/[\w./-]+\.\w+)", README.read_text(encoding="utf-8")
        )
    )
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    listed = re.findall(r"^\| (.*?) \|", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {name for cell in listed for name in re.findall(r"`([\w.-]+)/?`", cell)} == {
        path.name
        for path in FOLDER.iterdir()
        if path.name not in ("README.md", "Dockerfile.dockerignore")
    }
