"""One set of results whose names, parameters, questions, answers, verdicts and errors all mean
harm, through every output that is made of it: nothing acts, and no secret is in any file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from markdown_it import MarkdownIt

from ftsec_ray import schema
from ftsec_ray.cli import console
from ftsec_ray.cli.failure_text import Failure, show_failures
from ftsec_ray.report.markdown import grid_markdown
from ftsec_ray.report.page import write_report
from ftsec_ray.results.read import Results
from ftsec_ray.results.stage_warnings import lines_of, warnings_in
from ftsec_ray.results.write import write_results
from ftsec_ray.shown_text import for_html
from tests.results.toy import whole
from tests.test_shown_text import ACTS

from .hostile import CORPUS
from .test_page import Page, data_of

EVIL = " ".join(text for text in CORPUS if len(text) < 1000)
TOKEN, PLANTED = "hf_" + "aB3dE5gH1j" * 3, "planted/value+77"


@pytest.fixture
def hostile(make_results: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Results:
    """Results that were written while the environment held `PLANTED`."""
    monkeypatch.setenv("MY_API_KEY", PLANTED)
    evil = f"{EVIL} {TOKEN} {PLANTED}"
    results = Results.open(make_results())
    rows = {name: results.table(name).to_pylist() for name in ("cells", "generations", "stages")}
    for cell in rows["cells"]:
        cell["model"] += evil * (cell["model"] == "ladder:1m")
        cell["family"] += evil
        cell["attack"] += evil * (cell["attack"] == "badnets")
        cell["defenses"] = [one + evil * (one == "onion") for one in cell["defenses"]]
        cell["attack_params"] = json.dumps({"trigger": evil, TOKEN: 1})
        cell["error"] = evil if cell["status"] == "failed" else None
    for row in rows["generations"]:
        row |= dict.fromkeys(("prompt", "completion", "raw", "override", "judge"), evil)
        row["prompt_id"] += evil
    for row in rows["stages"]:
        row |= {"method": evil, "host": evil, "error": evil}
    tables = {
        **{name: pa.Table.from_pylist(own, getattr(schema, name)()) for name, own in rows.items()},
        "metrics": results.metrics,
    }
    warning = {"text": evil, "stages": 1, "cells": 2, "places": [evil]}
    meta = {
        **results.meta,
        **dict.fromkeys(("sweep", "question", "sweep_text", "plan"), evil),
        "warnings": [warning],
        "versions": {evil: evil},
    }
    return Results.open(
        write_results(results.folder, tables=whole(tables, results.meta), meta=meta)
    )


def texts_in(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from (key, *texts_in(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from texts_in(inner)


def test_no_file_of_the_results_holds_a_secret_and_everything_else_is_as_it_was(
    hostile: Results,
) -> None:
    write_report(hostile.folder)
    told = list(texts_in(hostile.meta))
    for name in ("cells", "metrics", "generations", "stages", "comparisons"):
        told += texts_in(hostile.table(name).to_pylist())
    told.append((hostile.folder / "report.html").read_text(encoding="utf-8"))
    assert not [text for text in told if TOKEN in text or PLANTED in text]
    assert hostile.meta["question"] == f"{EVIL} [redacted] [MY_API_KEY]"
    row = hostile.generations.to_pylist()[0]
    assert row["completion"] == row["raw"] == f"{EVIL} [redacted] [MY_API_KEY]"


def test_the_page_runs_nothing_hides_nothing_and_links_nowhere(hostile: Results) -> None:
    page = Page(write_report(hostile.folder).read_text(encoding="utf-8"))
    assert not ACTS.search(page.text)
    assert not [text for text in texts_in(data_of(page)) if ACTS.search(text)]
    assert len(page.named("script")) == 2
    assert {tag for tag, _ in page.elements}.isdisjoint(
        {"img", "iframe", "base", "form", "template", "object", "embed", "math", "link", "animate"}
    )
    for tag, attrs in page.elements:
        assert not any(name.startswith("on") or name in ("style", "srcdoc") for name in attrs)
        assert all(attrs.get(name, "#")[:1] == "#" for name in ("href", "src", "action")), tag
    assert page.inside("pre").count(for_html(f"{EVIL} [redacted] [MY_API_KEY]")) >= 2


def test_the_grid_in_markdown_is_one_table_and_a_list_of_texts(hostile: Results) -> None:
    text = grid_markdown(hostile)
    assert not ACTS.search(text)
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    tokens = parser.parse(text)
    assert [one.type for one in tokens].count("table_open") == 1
    assert {one.type for one in tokens}.isdisjoint({"html_block", "heading_open", "fence", "hr"})
    inside = [one for token in tokens for one in token.children or []]
    markup = {(one.type, one.content) for one in inside if one.type != "text"}
    assert markup <= {("html_inline", "<br>"), ("text_special", ""), ("softbreak", "")} | {
        (one.type, one.content) for one in inside if one.type == "text_special"
    }
    rows = text.split("\n\n")[0].splitlines()
    assert len(rows) == 2 + 3 * 6
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


def test_the_terminal_gets_lines_and_columns_that_no_text_made(
    hostile: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in lines_of(warnings_in(hostile.meta)):
        console.say(line)
    warned = capsys.readouterr().out
    assert len(warned.splitlines()) == 1
    (row,) = [row for row in hostile.cells.to_pylist() if row["status"] == "failed"]
    show_failures([Failure(cell=row["model"] + EVIL, stage=EVIL, error=row["error"])], more="")
    said = capsys.readouterr()
    assert not ACTS.search(warned + said.out + said.err)


def test_parameters_that_differ_in_a_secret_alone_still_tell_cells_apart(
    make_results: Callable[..., Path],
) -> None:
    results = Results.open(make_results())
    cells = results.cells.to_pylist()
    for cell in cells:
        other = cell["seed"] or cell["model"] == "ladder:1m"
        cell["attack_params"] = json.dumps({"trigger": TOKEN + "XY" * other})
    tables = {
        "cells": pa.Table.from_pylist(cells, schema.cells()),
        **{name: results.table(name) for name in ("metrics", "generations", "stages")},
    }
    folder = write_results(results.folder, tables=whole(tables, results.meta), meta=results.meta)
    again = Results.open(folder)
    names = {row["attack_params"] for row in again.cells.to_pylist()}
    assert names == {'{"trigger":"[redacted]"}', '{"trigger":"[redacted, 2]"}'}
    assert {row["attack_params"] for row in again.comparisons.to_pylist()} <= names
