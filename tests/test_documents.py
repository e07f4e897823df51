"""The documents: their links lead somewhere, their commands and files exist, their lines can be read
in a window of 100 columns.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

import pytest
import typer.main
import yaml

import ftsec_ray
from ftsec_ray.cli.app import app
from ftsec_ray.discovery import modules_in
from tests.test_layers import LAYERS

ROOT = Path(__file__).parents[1]
LISTED = subprocess.run(
    ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "--", "*.md"],
    capture_output=True,
    text=True,
    check=True,
).stdout.split()
DOCUMENTS = sorted(name for name in LISTED if (ROOT / name).is_file())
WIDEST, MOST_README_LINES = 100, 200
FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```\s*$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
LINK = re.compile(r"!?\[[^\]\[]*\]\(([^)\s]+)\)")
SHELLS = ("bash", "sh", "shell", "console")
PROGRAM = typer.main.get_command(app)


@cache
def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@cache
def prose_of(name: str) -> str:
    """A document without its code blocks."""
    return FENCE.sub("", text_of(name))


def blocks(name: str, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(text_of(name)) if language in languages]


def shell_lines(name: str) -> list[str]:
    """Lines of the shell blocks, continued ones joined."""
    shell = [body.replace("\\\n", " ") for body in blocks(name, *SHELLS)]
    return [line.strip().removeprefix("$ ") for body in shell for line in body.splitlines()]


def spans(name: str) -> list[str]:
    """Every code span of the prose."""
    return [" ".join(span.split()) for span in SPAN.findall(prose_of(name))]


def code_lines(name: str) -> list[str]:
    return [*shell_lines(name), *spans(name)]


def calls(lines: list[str], *programs: str) -> list[list[str]]:
    """Words behind every call of a program that stands where a shell looks for commands, as far as
    what ends the call.
    """
    made = []
    for line in lines:
        if not any(program in line for program in programs):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        lexer.commenters = "#"
        call: list[str] = []
        try:
            words = [*lexer, ";"]
        except ValueError:  # a span that is no command line
            continue
        for word in words:
            if word != "--" and not set(word) <= set("();<>|&"):
                call.append(word)
                continue
            if call and call[0].removeprefix(".venv/bin/") in programs:
                made.append(call[1:])
            call = []
    return made


def fault_of(words: list[str], *, is_whole: bool = True) -> str:
    """What the parser of `ftsec` has against these words; nothing is run.

    Args:
        words: Those behind `ftsec`.
        is_whole: Whether arguments may not be missing, as they may where the prose speaks of an
            option.
    """
    if not words or words[0].startswith("-"):
        known = {name for param in PROGRAM.params for name in param.opts}
        known |= {"--help", "-h", "--install-completion", "--show-completion"}
        return "" if set(words) <= known else f"no such option: {shlex.join(words)}"
    if words[0] not in PROGRAM.commands:
        return f"no such command: {words[0]}"
    command = PROGRAM.commands[words[0]]
    if len(words) == 1 and not is_whole:
        return ""
    try:
        command.make_context(words[0], ["1" if word == "N" else word for word in words[1:]])
    except Exception as error:  # of click, or of the copy of it that Typer brings
        if type(error).__name__ in ("MissingParameter", "NoArgsIsHelpError") and not is_whole:
            return ""
        return str(getattr(error, "message", None) or error or type(error).__name__)
    return ""


def slugs(name: str) -> set[str]:
    """Anchors of a document, as GitHub makes them of its headings."""
    made: dict[str, int] = {}
    anchors = set()
    for heading in re.findall(r"^#{1,6} +(.*?)\s*#*$", prose_of(name), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        anchors.add(slug if slug not in made else f"{slug}-{made[slug]}")
        made[slug] = made.get(slug, 0) + 1
    return anchors


def dead_links(name: str) -> list[str]:
    dead = []
    for target in LINK.findall(SPAN.sub("", prose_of(name))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        inside = file.resolve().is_relative_to(ROOT)
        if not inside or not file.exists():
            dead.append(f"{target}: no such file")
        elif anchor and anchor not in slugs(str(file.resolve().relative_to(ROOT))):
            dead.append(f"{target}: no such heading")
    return dead


def wide_lines(name: str) -> list[str]:
    lines = prose_of(name).splitlines()
    return [line for line in lines if len(line) > WIDEST and not line.lstrip().startswith("|")]


def test_the_documents_are_all_there():
    assert {
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "cluster/README.md",
        "ftsec_ray/README.md",
        "tests/README.md",
    } <= set(DOCUMENTS)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_relative_link_and_anchor_resolves(name):
    assert dead_links(name) == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_lines_of_prose_have_at_most_100_columns(name):
    assert wide_lines(name) == []


def test_the_readme_has_at_most_200_lines():
    assert len(text_of("README.md").splitlines()) <= MOST_README_LINES


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_of_ftsec_exists_with_its_options(name):
    made = [(words, True) for words in calls(shell_lines(name), "ftsec")]
    made += [(words, False) for words in calls(spans(name), "ftsec")]
    faults = {shlex.join(words): fault_of(words, is_whole=whole) for words, whole in made}
    assert {command: fault for command, fault in faults.items() if fault} == {}


def test_the_commands_of_the_documents_are_found():
    made = [words for name in DOCUMENTS for words in calls(code_lines(name), "ftsec")]
    assert {words[0] for words in made if words} >= {"plan", "run", "submit", "report", "list"}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("ftsec pln x.yaml", "no such command: pln"),
        ("ftsec plan x.yaml --gpu-prise 2", "--gpu-prise"),
        ("cd a && ftsec run x.yaml --workers many", "integer"),
        ("ftsec run x.yaml --executor tuna  # a comment", "tuna"),
        ("ftsec run x.yaml y.yaml", "y.yaml"),
        ("ftsec --versoin", "no such option"),
        ("ftsec status", "Missing"),
        (".venv/bin/ftsec run x.yaml --limit N", ""),
        ("ftsec doctor", ""),
    ],
)
def test_a_command_that_does_not_exist_would_be_noticed(line, fault):
    (words,) = calls([line], "ftsec")
    assert fault in fault_of(words)
    assert bool(fault) == bool(fault_of(words))


def test_prose_may_speak_of_an_option_without_the_arguments_but_not_of_one_that_there_is_not():
    assert fault_of(["report", "--markdown"], is_whole=False) == ""
    assert fault_of(["report", "--markdown"]) != ""
    assert "--markdwn" in fault_of(["report", "--markdwn"], is_whole=False)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_target_of_make_exists(name):
    targets = set(re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE))
    named = {words[0] for words in calls(code_lines(name), "make") if words}
    assert named <= targets


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_module_that_python_is_to_run_exists_with_its_options(name):
    for words in calls(code_lines(name), "python"):
        if words[:1] != ["-m"] or words[1].partition(".")[0] not in ("tests", "ftsec_ray"):
            continue
        assert importlib.util.find_spec(words[1]) is not None, words
        source = (ROOT / words[1].replace(".", "/")).with_suffix(".py")
        for option in (word for word in words[2:] if word.startswith("--")):
            assert f'"{option}"' in source.read_text(encoding="utf-8"), words


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name != "CHANGELOG.md"])
def test_every_file_of_the_repository_that_is_named_exists(name):
    shown = set(re.findall(r"^`(ftsec_ray/[\w/]+\.py)`:\n\n```python", text_of(name), re.MULTILINE))
    named = re.findall(
        r"(?<![\w/.<{-])((?:ftsec_ray|tests|sweeps|cluster)/[\w./-]*\w)(?![\w<{*])",
        " ".join(SPAN.findall(prose_of(name))),
    )
    missing = {path for path in named if not (ROOT / path).exists()}
    # Modules may also be named from the package on.
    places = (ROOT, ROOT / "ftsec_ray", (ROOT / name).parent)
    for span in spans(name):
        if re.fullmatch(r"[\w.]+/[\w./]+\.(py|lock)", span) and not any(
            (p / span).exists() for p in places
        ):
            missing.add(span)
    assert missing - shown == set()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_blocks_of_python_and_yaml_are_well_formed(name):
    for block in blocks(name, "python"):
        ast.parse(block)
    for block in blocks(name, "yaml"):
        yaml.safe_load(block)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_shell_blocks_are_well_formed(name):
    for block in blocks(name, "bash", "sh"):
        done = subprocess.run(
            ["bash", "-n"], input=block, text=True, capture_output=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), block


@pytest.mark.parametrize("block", blocks("cluster/README.md", "yaml"))
def test_a_part_of_a_sweep_that_the_cluster_document_shows_is_one(block, tmp_path):
    (tmp_path / "shown.yaml").write_text(
        "name: shown\nmodels: [ladder:1m]\ntask: microworld\nattacks: [none]\ndefenses: [none]\n"
        + block
    )
    assert ftsec_ray.load(tmp_path / "shown.yaml").name == "shown"


def section(name: str, heading: str) -> str:
    return text_of(name).split(f"\n## {heading}\n")[1].split("\n## ")[0]


def test_the_map_of_the_package_names_every_folder_and_module_and_nothing_else():
    package = ROOT / "ftsec_ray"
    folders = {
        f"{path.relative_to(package)}/"
        for path in package.rglob("*")
        if (path / "__init__.py").is_file()
    }
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", section("ftsec_ray/README.md", "Map"), re.M)
    assert sorted(place for place, _ in rows) == sorted(folders | modules)
    assert all(len(meaning) > 10 for _, meaning in rows)
    order = [re.split(r"[/.]", place)[0] for place, _ in rows if place != "data/microworld/"]
    assert order == [layer for layer in LAYERS if layer != "__main__"], "from the bottom up"


def test_the_map_of_the_package_lists_the_stage_kinds_in_the_order_of_the_lifecycle():
    from ftsec_ray.lifecycle import kinds

    rows = re.findall(
        r"^\| `(\w+)` \| (.*?) \|", section("ftsec_ray/README.md", "The lifecycle"), re.M
    )
    assert [name for name, _ in rows] == [
        name for name in kinds() if name in modules_in("ftsec_ray.stages")
    ]
    for name, acting in rows:
        assert set(re.findall(r"`(\w+)`", acting)) == set(kinds()[name].hooks)


def test_variables_of_the_environment_that_only_tests_read_are_documented_and_no_others():
    pattern = re.compile(r"\b(FTSEC_TEST_[A-Z_]+|FTSEC_CHROMIUM|KUBERAY_CRDS)\b")
    read = {
        variable
        for path in (ROOT / "tests").rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "environ" in line
        for variable in pattern.findall(line)
    }
    assert len(read) >= 4
    assert set(pattern.findall(section("tests/README.md", "Environment variables"))) == read


def test_every_benchmark_is_in_the_document_of_the_tests():
    figures = section("tests/README.md", "Benchmarks")
    names = {path.stem for path in (ROOT / "tests/benchmarks").glob("bench_*.py")}
    assert {name for name in names if name in figures} == names
