"""A failure on the terminal: what it says, what it got and how to mend it, at any width."""

from __future__ import annotations

import pytest

from ftsec_ray.cli.failure_text import details, headline
from ftsec_ray.errors import DataError
from tests.cli import toy
from tests.cli.toy import SWEEP, call

OURS = DataError("row 3 of rows/a.csv has no text in column 'p'", None, "a string", "repair it")
TRACE = """\
Traceback (most recent call last):
  File "/x/torch/nn.py", line 12, in forward
    return self.weight[ids]
           ~~~~~~~~~~~^^^^^
IndexError: index 900 is out of range"""
CUT = TRACE.split("\n", 2)[2]
"""The last lines alone, as they are kept: the frame above them is gone."""
LONG = TRACE.replace("index 900 is", "two things:\n\tsize 3\n\tis")
CHAINED = (
    f"{TRACE}\n\nDuring handling of the above exception, another occurred:\n\n"
    + TRACE.replace("IndexError: index 900 is out of range", "RuntimeError")
)


@pytest.mark.parametrize(
    ("error", "first", "others"),
    [
        (str(OURS), "[data] row 3 of rows/a.csv has no text in column 'p'", ["want", "fix"]),
        (TRACE, "IndexError: index 900 is out of range", []),
        (LONG, "IndexError: two things:", ["size 3", "is out of range"]),
        (CHAINED, "RuntimeError", []),
        ("oom", "oom", []),
        ("", "no message", []),
        (None, "no message", []),
    ],
)
def test_the_headline_is_the_line_that_says_what_happened(error, first, others):
    assert headline(error) == first
    told = details(error)
    assert len(told) == len(others)
    assert all(word in line for word, line in zip(others, told, strict=True))


def test_a_traceback_of_which_only_the_end_is_kept_still_gives_its_last_line():
    assert headline(CUT) == "IndexError: index 900 is out of range"


def test_a_value_of_a_megabyte_is_cut():
    assert max(map(len, details(DataError("x", "y" * 2**20, "z")))) <= 400


@pytest.fixture
def folder(workplace):
    (workplace / "small.yaml").write_text(SWEEP)
    return workplace


def test_run_and_status_show_each_failure_once_with_stage_got_want_and_cells(folder):
    with toy.failing_methods("shrink"):
        shown = [call("run", "small.yaml", code=1).stdout, call("status", "small.yaml").stdout]
    for text in shown:
        assert text.count("revise shrink: [stage] made to fail") == 1, "one for all three attacks"
        lines = text.splitlines()
        at = lines.index("failed cells: 3")
        assert lines[at + 1 : at + 4] == [
            "  revise shrink: [stage] made to fail",
            "    got:  'shrink'",
            "    want: another method",
        ]
        places = lines[at + 4].strip().removeprefix("in: ").split("; ")
        assert "ladder:0.2m x microworld x none x shrink, seed 0" in places


def test_cells_that_one_stage_stops_are_told_together(folder):
    with toy.failing_methods(None):
        call("run", "small.yaml", code=1)
    lines = call("status", "small.yaml").stdout.splitlines()
    assert lines.count("  task: [stage] made to fail") == 1
    assert "; and 3 more cells" in lines[-1]


def test_at_40_columns_nothing_is_cut_away(folder, monkeypatch):
    with toy.failing_methods("shrink"):
        wide = call("run", "small.yaml", code=1).stdout
        monkeypatch.setenv("COLUMNS", "40")
        for narrow in (
            call("run", "small.yaml", code=1).stdout,
            call("status", "small.yaml").stdout,
        ):
            told = narrow[narrow.index("failed cells") :].split("\ntables:")[0]
            assert max(map(len, told.splitlines())) <= 40
            for word in (
                "shrink:",
                "[stage]",
                "made",
                "'shrink'",
                "another",
                "ladder:0.2m",
                "seed",
            ):
                assert word in told.split(), told
    assert "revise shrink: [stage] made to fail" in wide
