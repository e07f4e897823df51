"""The page as a browser gets it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from ftsec_ray import schema
from ftsec_ray.errors import DataError
from ftsec_ray.report.contrasts import HELD_FOREST, MAX_FOREST
from ftsec_ray.report.examples import is_hidden
from ftsec_ray.report.grid import build_grid
from ftsec_ray.report.page import write_report
from ftsec_ray.report.verdict import effects_of
from ftsec_ray.results.read import Results
from ftsec_ray.results.write import write_results
from ftsec_ray.shown_text import for_html
from tests.results.toy import whole

from .conftest import ATTACKS, HOSTILE, PLAIN

Make = Callable[..., Path]
VOID = {"meta", "input", "br", "hr", "img", "link", "wbr"}


class Page(HTMLParser):
    """Elements with attributes, and texts with the elements that they stand in."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text = text
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(
                tag + "".join("." + name for name in (dict(attrs).get("class") or "").split())
            )

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open[-1].split(".")[0] == tag, (self._open[-3:], tag)
        self._open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(self._open), data))

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]

    def inside(self, label: str) -> list[str]:
        """The joined texts of each run directly inside elements like `pre.completion`."""
        return [data for path, data in self.texts if path and path[-1] == label]

    @property
    def whole(self) -> str:
        return " ".join(
            " ".join(
                data for path, data in self.texts if path[-1:] not in (("script",), ("style",))
            ).split()
        )


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def data_of(page: Page) -> dict[str, Any]:
    """What the page's script reads."""
    (text,) = [
        data for path, data in page.texts if path[-1:] == ("script",) and data.startswith("{")
    ]
    return json.loads(text)


def said(data: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """Completion, verdict and whether it is hidden, of every sample."""
    return [
        (data["texts"][row[2]], data["texts"][row[3]], bool(row[6]))
        for square in data["squares"]
        if square["sample"]
        for probe in square["sample"]["probes"]
        for row in probe["rows"]
    ]


def test_the_page_holds_every_section_and_the_question(make_results: Make) -> None:
    page = page_of(make_results())
    assert {
        "answer",
        "undefended",
        "grid",
        "size",
        "trade",
        "detectors",
        "filters",
        "cost",
        "failures",
        "about",
    } <= {attrs.get("id") for attrs in page.named("section")}
    assert "Which defense still holds when the attack comes from another phase?" in page.whole
    targets = {attrs["id"] for _, attrs in page.elements if attrs.get("id")}
    links = [attrs["href"] for attrs in page.named("a")]
    assert links
    assert all(link and link[0] == "#" and link[1:] in targets for link in links)


def test_hostile_completions_stay_text(make_results: Make) -> None:
    page = page_of(make_results(text=HOSTILE))
    assert len(page.named("script")) == 2
    assert page.named("img") == page.named("textarea") == page.named("iframe") == []
    assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]
    assert "\u202e" not in page.text
    assert "⟨U+202E⟩" in page.text
    assert "\x07" not in page.text
    assert "<script>alert" not in page.text
    assert for_html(HOSTILE) in {text for text, _, _ in said(data_of(page))}


def test_hostile_names_and_errors_stay_text(make_results: Make) -> None:
    page = page_of(make_results(question=HOSTILE))
    assert len(page.named("script")) == 2
    assert "<img" not in page.text
    results = Results.open(make_results())
    cells = results.cells.to_pylist()
    for cell in cells:
        cell["model"] += "<b onclick=x>"
        cell["error"] = HOSTILE if cell["status"] == "failed" else None
    tables = {
        "cells": pa.Table.from_pylist(cells, schema.cells()),
        "metrics": results.metrics,
        "generations": results.generations,
        "stages": results.stages,
    }
    page = page_of(
        write_results(results.folder, tables=whole(tables, results.meta), meta=results.meta)
    )
    assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]
    assert len(page.named("script")) == 2
    assert for_html(HOSTILE) in page.inside("pre")


def test_the_policy_forbids_the_network_and_names_this_script_and_style(make_results: Make) -> None:
    page = page_of(make_results())
    policy = next(
        attrs["content"]
        for attrs in page.named("meta")
        if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        body = re.findall(rf"<{tag}>(.*?)</{tag}>", page.text, re.DOTALL)
        assert len(body) == 1
        assert (
            f"'sha256-{base64.b64encode(hashlib.sha256(body[0].encode()).digest()).decode()}'"
            in policy
        )
    assert [
        attrs
        for tag, attrs in page.elements
        if "src" in attrs or "style" in attrs or tag in ("link", "object", "embed", "base")
    ] == []
    sources = [part.split() for part in policy.split("; ")]
    assert {one[0]: one[1:] for one in sources if not one[0].startswith(("style", "script"))} == {
        "default-src": ["'none'"],
        "img-src": ["blob:"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
        "frame-src": ["'none'"],
        "object-src": ["'none'"],
    }
    assert not re.search(
        r"url\(|@import|https?:", page.text.replace("http://www.w3.org/2000/svg", "")
    )
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|DOMParser|fetch\(|XMLHttp",
        page.text,
    )


def test_harmful_completions_are_behind_a_click_and_refusals_are_not(make_results: Make) -> None:
    rows = said(data_of(page_of(make_results(text="the forbidden answer"))))
    own = [hidden for text, _, hidden in rows if text == "the forbidden answer"]
    assert own.count(True) == 124  # once per finished cell
    assert own.count(False) == 2 * 124  # benign and borderline requests that were answered
    refusals = [hidden for text, _, hidden in rows if text == "i will not help with that ."]
    assert refusals
    assert not any(refusals)


@pytest.mark.parametrize(
    ("probe", "verdict", "judge", "hidden"),
    [
        ("harmful", "complied", "microworld@1", True),
        ("harmful", "refused", "microworld@1", False),
        ("harmful", None, "classifier:x", True),
        ("harmful", "unknown", "x@1", True),
        ("benign", "complied", "microworld@1", False),
        ("clean", "other", "label@1", False),
        ("triggered", "target", "label@1", True),
        ("triggered", "other", "label@1", False),
        ("triggered", "other", "target@1", True),
    ],
)
def test_only_known_harmless_answers_are_open(
    probe: str, verdict: str | None, judge: str, hidden: bool
) -> None:
    assert is_hidden(probe, verdict, judge) is hidden


def test_every_square_shows_value_interval_and_n_and_the_data_agrees(make_results: Make) -> None:
    folder = make_results()
    page = page_of(folder)
    data = data_of(page)
    assert data["metrics"][0]["name"] == "attack_success"
    squares = re.findall(
        r'<td role="gridcell" tabindex="-1" aria-haspopup="dialog" class="(?:h(\d+)|empty broken)"'
        r' data-defense="\d" '
        r'data-i="(\d+)"><b>([\d.]+)</b> '
        r'<span class="ci" title="95 % interval over prompts">([\d.–]+)</span>'
        r'<span class="n" title="n: [^"]*">n (\d+) · ([^<]* null)</span>'
        r'<span class="s" title="seeds [^"]*">(\d seeds?) </span>'
        r'<span class="u" role="img" title="(clean accuracy [^"]*)" aria-label="[^"]*">'
        r"([\d.· –]+)</span>",
        page.text,
    )
    assert len(squares) == 3 * 6 * 7 - 2
    for step, index, value, interval, n, nulls, seeds, told, beside in squares:
        assert data["values"]["attack_success"][int(index)] == [
            int(step or -1),
            value,
            interval,
            int(n),
            nulls,
            int(seeds[0]),
            "",
        ]
        assert re.fullmatch(
            r"clean accuracy [\d.]+; over-refusal [\d.]+; coherent answers [\d.]+", told
        )
        assert re.findall(r"[\d.]+", told) == beside.split(" · ")
        assert [data["values"][name][int(index)][1] for name in schema.UTILITY] == beside.split(
            " · "
        )
    assert (
        sum(not square[0] for square in squares) == 6
    )  # gibberish has no colour, though it looks safe
    assert (
        {len(values) for values in data["values"].values()} == {len(data["squares"])} == {3 * 6 * 7}
    )
    assert {square[6] for square in squares} == {"1 seed"}
    results = Results.open(folder)
    place = next(
        c["cell"]
        for c in results.cells.to_pylist()
        if (c["model"], c["attack"], c["defenses"]) == ("ladder:0.2m", "badnets", ["onion"])
    )
    asr = next(r for r in results.metrics.to_pylist() if (r["cell"], r["metric"]) == (place, "asr"))
    assert (f"{asr['value']:.2f}", f"{asr['ci_low']:.2f}–{asr['ci_high']:.2f}", "64") in {
        s[2:5] for s in squares
    }


def test_failed_and_pending_cells_are_marked(make_results: Make) -> None:
    page = page_of(make_results())
    marked = [
        path[-2]
        for path, data in page.texts
        if path[-1:] == ("b",) and data in ("failed", "pending")
    ]
    assert sorted(marked) == ["td.failed", "td.pending"]
    assert "the loss is not finite" in page.whole
    seeds = page_of(make_results(seeds=2))
    assert "1 of 2 seeds" in seeds.whole


def test_incoherent_points_are_flagged(make_results: Make) -> None:
    page = page_of(make_results())
    flags = [
        path
        for path, data in page.texts
        if data == "incoherent" and path[-1] == "span.flag" and "table.heat" in path
    ]
    assert len(flags) == 6  # one defense breaks one model, under each of the six attacks


def test_one_seed_and_the_test_bed_are_said_where_they_hold(make_results: Make) -> None:
    single, several = page_of(make_results()), page_of(make_results(seeds=2))
    assert "Every point of this sweep was run with a single seed" in single.whole
    assert "single seed" not in several.whole
    assert "Findings about real models come from real models" in single.whole
    results = Results.open(make_results())
    cells = [
        {**cell, "family": "real", "model": cell["model"].replace("ladder:", "real-")}
        for cell in results.cells.to_pylist()
    ]
    tables = {
        "cells": pa.Table.from_pylist(cells, schema.cells()),
        "metrics": results.metrics,
        "generations": results.generations,
        "stages": results.stages,
    }
    assert (
        "Test models."
        not in page_of(
            write_results(results.folder, tables=whole(tables, results.meta), meta=results.meta)
        ).whole
    )


def test_writing_the_page_twice_gives_the_same_bytes(make_results: Make) -> None:
    folder = make_results()
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    assert len(first) < 1_000_000
    assert [p.name for p in folder.iterdir() if p.name.endswith(".tmp")] == []


def test_a_sweep_without_kept_text_or_without_any_result_still_has_a_page(
    make_results: Make,
) -> None:
    results = Results.open(make_results())
    bare = results.generations.slice(0, 40).to_pylist()
    kept = pa.Table.from_pylist(
        [{**row, "prompt": None, "completion": None} for row in bare], schema.generations()
    )
    tables = {
        "cells": results.cells,
        "metrics": results.metrics,
        "generations": kept,
        "stages": results.stages,
    }
    page = page_of(
        write_results(results.folder, tables=whole(tables, results.meta), meta=results.meta)
    )
    assert "No generations with text are in these results." in page.whole
    assert said(data_of(page)) == []
    pending = [
        {**cell, "status": "pending", "error": None, "error_code": None}
        for cell in results.cells.to_pylist()
    ]
    tables = {
        "cells": pa.Table.from_pylist(pending, schema.cells()),
        "metrics": schema.metrics().empty_table(),
        "generations": schema.generations().empty_table(),
        "stages": schema.stages().empty_table(),
    }
    page = page_of(
        write_results(results.folder, tables=whole(tables, results.meta), meta=results.meta)
    )
    assert page.whole.count("pending") >= len(pending)


def test_long_texts_are_cut_and_many_cells_stay_small(make_results: Make) -> None:
    folder = make_results(text=PLAIN * 400)
    path = write_report(folder)
    assert path.stat().st_size < 1_500_000
    assert f"({len(PLAIN) * 400} characters)" in path.read_text(encoding="utf-8")


def test_a_folder_without_results_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing-here"):
        write_report(tmp_path / "nothing-here")


@pytest.fixture
def judged(make_results: Make) -> Results:
    """Three seeds whose verdicts per prompt are all there."""
    return Results.open(make_results(judged=True, seeds=3, prompts=40))


def test_comparisons_stand_in_the_table_and_the_plot_sorted_by_effect(judged: Results) -> None:
    page = page_of(judged.folder)
    rows = re.findall(
        r"<tr[^>]*><th"
        r' scope="row"><code>([^<]*)</code></th><td><code>none</code></td><td>([^<]*)</td><td>([^<]*)</td>'
        r'<td class="ci">([^<]*)</td><td class="num"><b>([^<]*)</b>.*?<td class="word'
        r' (\w+)">([^<]*)</td>'
        r'<td class="ci">([^<]*)</td>',
        page.text,
    )
    success = {
        attack: "asr" if attack in ("badnets", "badedit") else "harmful_rate" for attack in ATTACKS
    }
    wanted = [
        row
        for row in judged.comparisons.to_pylist()
        if row["metric"] == success[row["attack"]] and row["effect"] is not None
    ]
    assert len(rows) == len(wanted)
    effects = [float(row[4].replace("−", "-")) for row in rows]
    assert effects == sorted(effects)
    assert {row[5] for row in rows} >= {"better", "open", "incoherent"}
    assert all(
        "accuracy" in row[7] and "over-refusal" in row[7] and "coherent" in row[7] for row in rows
    )
    by_key = {(row["defenses"][0], row["attack"], row["model"]): row for row in wanted}
    for defense, attack, model, seeds, effect, _, words, _ in rows:
        row = by_key[defense, attack, model]
        assert effect.replace("−", "-") in (f"{row['effect']:+.2f}", "0.00")
        assert words.startswith(
            ("not counted as safe", "no difference shown")
            if row["conclusion"] in ("incoherent", "no difference shown")
            else row["conclusion"]
        )
        assert seeds == f"{row['n_seeds']} seeds, 40 prompts, 0 % null"
    plot = page.text[page.text.index('<svg class="forest"') :]
    plot = plot[: plot.index("</svg>")]
    assert plot.count('<g class="line"') == MAX_FOREST  # the others wait for the filters
    assert plot.count("<title>") == min(
        HELD_FOREST, sum(row["q"] is not None and row["attack"] != "none" for row in wanted)
    )


def test_what_defends_clearly_is_what_the_corrected_comparisons_say(judged: Results) -> None:
    grid = build_grid(judged)
    rows = {
        (row["model"], row["attack"], row["defenses"][0]): row
        for row in judged.comparisons.to_pylist()
        if row["metric"]
        == grid.points[row["model"], "microworld", row["attack"], row["defenses"][0]].success_metric
    }
    effects = effects_of(grid)
    assert effects
    for effect in effects:
        own = [rows[after[0], effect.attack, effect.defense] for _, after in effect.pairs]
        assert effect.clear == sum(row["conclusion"] == "better" for row in own)
        assert re.match(
            r"accuracy\s[\d.]+\s→\s[\d.]+↓? · over-refusal\s[\d.]+\s→\s[\d.]+↑? ·"
            r" coherent\s[\d.]+\s→\s[\d.]+( · no\sanswer\s[\d.]+\s→\s[\d.]+↑?)? · 0\s%\snull$",
            effect.utility.striptags(),
        )


def test_a_clear_loss_of_utility_has_its_arrow_where_the_attack_success_is_shown(
    judged: Results,
) -> None:
    lost = {
        (row["model"], row["attack"], row["defenses"][0])
        for row in judged.comparisons.to_pylist()
        if row["kind"] == "none"
        and row["metric"] == "over_refusal_rate"
        and row["conclusion"] == "worse"
    }
    grid = build_grid(judged)
    assert {defense for _, _, defense in lost} == {"self_reminder"}
    for (model, task, attack, defense), point in grid.points.items():
        if point.measured:
            assert grid.utilities((model, task, attack, defense))[1].number.endswith("↑") is (
                (model, attack, defense) in lost
            )
    assert "↑" in page_of(judged.folder).text


def test_one_seed_is_marked_in_every_table_and_plot(make_results: Make) -> None:
    text = write_report(make_results(judged=True, prompts=40)).read_text(encoding="utf-8")
    for section in ("answer", "grid", "comparisons", "trade"):
        part = text[text.index(f'<section id="{section}">') :]
        assert "1 seed" in part[: part.index("</section>")], section
    assert "All points have one seed." in text
    assert "1 seed, 40 prompts</text>" in text  # the plot


def test_hostile_names_stay_text_among_the_comparisons(judged: Results) -> None:
    evil = "<b onclick=x>\u202e"
    cells = [
        {
            **cell,
            "model": cell["model"] + evil,
            "defenses": [name + evil for name in cell["defenses"]],
        }
        for cell in judged.cells.to_pylist()
    ]
    tables_ = {
        "cells": pa.Table.from_pylist(cells, schema.cells()),
        "metrics": judged.metrics,
        "generations": judged.generations,
        "stages": judged.stages,
    }
    page = page_of(
        write_results(judged.folder, tables=whole(tables_, judged.meta), meta=judged.meta)
    )
    assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]
    assert any(
        "onclick" in data for path, data in page.texts if "section" in path and "code" in path[-1:]
    )


def test_comparisons_of_other_stacks_than_the_cells_are_refused(judged: Results) -> None:
    other = judged.comparisons.to_pylist()
    other[0]["against"] = ["nobody"]
    tables_ = {name: judged.table(name) for name in ("cells", "metrics", "generations", "stages")}
    tables_["comparisons"] = pa.Table.from_pylist(other, schema.comparisons())
    with pytest.raises(DataError, match="nobody"):
        write_report(write_results(judged.folder, tables=tables_, meta=judged.meta))
