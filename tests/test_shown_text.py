"""Texts from outside as terminals, Markdown and pages get them: nothing acts, nothing hides."""

from __future__ import annotations

import ast
import io
import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import ftsec_ray
from ftsec_ray.cli import console
from ftsec_ray.shown_text import for_html, for_markdown, for_terminal
from tests.report.hostile import CORPUS

ROOT = Path(ftsec_ray.__file__).parent
ACTS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u115f\u1160\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\u2800\u3164\ufe00-\ufe0d\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e0fff]"
)
"""What moves a cursor, starts a command of a terminal, turns a text round or shows nothing."""
LONE = ("\ud800 alone", "a\udcffb", "\x00", "\x1b", "\x9b0m", "\r", "\x7f")


@pytest.mark.parametrize("text", [*CORPUS, *LONE])
def test_no_target_gets_what_acts_or_hides(text):
    for shown in (
        for_terminal(text),
        for_terminal(text, one_line=True),
        for_html(text),
        for_markdown(text),
    ):
        assert not ACTS.search(shown)
        shown.encode("utf-8")
    assert not re.search(r"[\n\t]", for_terminal(text, one_line=True) + for_markdown(text))
    assert for_terminal(for_terminal(text)) == for_terminal(text)
    assert for_html(for_html(text)) == for_html(text)


def test_what_was_there_can_still_be_read():
    assert for_terminal("\x1b[2J a\rb\n\tc \u202egnp.exe") == "\\x1b[2J a\\rb\n\tc \\u202egnp.exe"
    assert for_terminal("a\nfailed cells: 0", one_line=True) == "a\\nfailed cells: 0"
    assert for_html("\x1b[2J \u202egnp.exe \ud800") == "⟨U+001B⟩[2J ⟨U+202E⟩gnp.exe ⟨U+D800⟩"
    for text in ("模型 🙂 ❤️ e\u0301 ﷽", "déjà vu – “quoted” → 0.5 ± 0.1", "a\n\tb"):
        assert for_terminal(text) == for_html(text) == text


@pytest.mark.parametrize("text", [*CORPUS, *LONE])
def test_markdown_leaves_every_text_as_it_is(text):
    """Read by a parser of CommonMark with GitHub's tables, raw HTML and bare links."""
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    for source in (
        f"| head | two |\n|---|---|\n| {for_markdown(text)} | x |",
        f"- warning: {for_markdown(text)}",
    ):
        tokens = parser.parse(source)
        cells = [one for one in tokens if one.type == "inline"]
        assert len(cells) == (4 if source.startswith("|") else 1), "no cell or block more"
        inside = cells[2 if source.startswith("|") else 0].children or []
        assert {one.type for one in inside} <= {"text", "text_special"}, "no markup in it"
        said = "".join(one.content for one in inside).removeprefix("warning:")
        assert said.strip() == for_html(" ".join(text.split()))
    assert not re.search(r"(?i)(https?|ftp)://|www\.", for_markdown(text)), "or GitHub links it"


def test_markdown_keeps_the_names_of_methods_readable():
    assert for_markdown("refusal_ablation (rate 0.5) + ladder:0.2m") == (
        "refusal_ablation (rate 0.5) + ladder:0.2m"
    )


@pytest.mark.parametrize("text", CORPUS)
def test_the_console_writes_no_text_that_acts_and_no_line_that_a_name_made(
    text, monkeypatch, capsys
):
    monkeypatch.setenv("MY_TOKEN", "plantedtoken1")
    console.say(f"{text} plantedtoken1")
    console.say(f"{text} plantedtoken1", err=True)
    console.say_json({f"{text} plantedtoken1": [text, "plantedtoken1"]})
    console.table("t", ["a", text or "b"], [[f"{text} plantedtoken1", 1], ["next", 2]])
    out, err = capsys.readouterr()
    assert not ACTS.search(out + err)
    assert "plantedtoken1" not in out + err
    console.table("t", ["a", "b"], [["x\nforged  1", "y"]])
    assert capsys.readouterr().out.splitlines()[1:] == ["x\\nforged  1  y"]


def test_a_terminal_gets_the_styles_of_the_command_line_and_none_of_a_name(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    said = Terminal()
    monkeypatch.setattr("sys.stdout", said)
    monkeypatch.setenv("TERM", "xterm-256color")
    console.say("\x1b[2Jname", style="red")
    console.table("title\x1b[2J", ["a"], [["\x1b]8;;https://evil.example\x1b\\x"]])
    assert set(re.findall(r"\x1b[^m]{0,12}m?", said.getvalue())) <= {
        *("\x1b[31m", "\x1b[0m", "\x1b[1m", "\x1b[3m"),
    }


PRINTERS = {"print", "echo", "secho", "pprint", "print_exception", "print_exc"}
ALLOWED = {
    "cli/console.py",  # what everything else goes through
    "cli/progress.py: self._console.print",  # of `shown`
    "cli/__init__.py: sys.stderr.write",  # of `for_terminal`: Rich may be what is missing
    "cli/submit.py: sys.stdout.write",  # of `shown`: the job's log comes in pieces of lines
    "execute/worker.py: print",  # JSON into the pipe to the parent
    "identity/tokens.py: sys.stdout.write",  # a digest
    "code_versions.py: sys.stderr.write",  # for developers, of the package's own files
}


def test_nothing_is_written_to_a_terminal_past_the_one_function_for_it():
    found = set()
    for path in sorted(ROOT.rglob("*.py")):
        place = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            if name.rpartition(".")[2] in PRINTERS or re.fullmatch(
                r"sys\.(__)?std(out|err)(__)?\.(buffer\.)?write(lines)?|(rich\.)?(console\.)?Console",
                name,
            ):
                found.add(f"{place}: {name}")
    assert {
        one for one in found if one not in ALLOWED and one.split(":")[0] not in ALLOWED
    } == set()
    assert {one for one in ALLOWED if ": " in one} <= found, "allowed, but no longer there"


def test_nothing_in_the_page_is_marked_safe_but_the_page_itself():
    for path in (ROOT / "report").glob("*.j2"):
        assert not re.search(
            r"\|\s*safe|autoescape\s+false|Markup", path.read_text(encoding="utf-8")
        )
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Markup":
                (given,) = node.args
                allowed = isinstance(given, ast.Constant) or path.name == "page.py"
                assert allowed, f"{path.name}:{node.lineno}: {ast.unparse(given)}"


def test_a_traceback_is_shown_without_secrets_and_without_what_acts(monkeypatch, capsys):
    from ftsec_ray.cli import _show_bug

    monkeypatch.setenv("MY_TOKEN", "plantedtoken1")
    error = RuntimeError("\x1b[2J\rplantedtoken1")
    _show_bug(RuntimeError, error, None)
    assert capsys.readouterr().err == "RuntimeError: \\x1b[2J\\r[MY_TOKEN]\n"
