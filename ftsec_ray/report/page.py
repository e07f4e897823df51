"""One self-contained HTML page per sweep: reads the results tables, asks nothing of the network.

Jinja2 escapes every text (autoescape is on and the template marks nothing safe except charts built
with `Markup.format`), and `for_html` shows what would be hidden or turned round in the whole page
and in all texts of its script. What the script shows later lies in the page once, as JSON, and
becomes text nodes only. A Content-Security-Policy forbids all loading and allows exactly this
page's style and script, by hash, and pictures that the script makes itself (`blob:`, for PNG).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ftsec_ray import schema
from ftsec_ray.report import answer_text, charts, figures, tables
from ftsec_ray.report import contrasts as contrasts_of
from ftsec_ray.report import examples as examples_of
from ftsec_ray.report import sections as sections_of
from ftsec_ray.report.answer import Answer, answer_of
from ftsec_ray.report.answer_table import answer_table
from ftsec_ray.report.grid import SHORT, WORDS, Grid, Key, build_grid, seeds_text
from ftsec_ray.report.number_text import share, signed
from ftsec_ray.report.took_effect import RULE, text_over
from ftsec_ray.report.verdict import Summary, judge, own_utility_text
from ftsec_ray.results.points import NONE, SUCCESS
from ftsec_ray.results.read import Results
from ftsec_ray.results.stage_warnings import warnings_in
from ftsec_ray.results.write import told_when_unwritten
from ftsec_ray.shown_text import for_html

if TYPE_CHECKING:
    from jinja2 import Environment

REPORT_FILE = "report.html"
SCRIPTS = ("page.js", "cell.js", "export.js")
"""In this order one script."""


def write_report(folder: Path) -> Path:
    """Write `report.html` beside the tables of a results folder and return its path."""
    results = Results.open(folder)
    page = render(results)
    target = results.folder / REPORT_FILE
    scratch = target.with_name(f".{REPORT_FILE}.{os.getpid()}.tmp")
    with told_when_unwritten(results.folder):
        scratch.write_text(page, encoding="utf-8")
        scratch.replace(target)
    return target


def render(results: Results) -> str:
    """The whole page as text."""
    grid = build_grid(results)
    verdict, answer = judge(grid), answer_of(grid)
    heat = tables.heat(grid)
    samples = examples_of.samples(grid, results, heat.keys)
    failures = tables.failures(grid, results)
    contrasts = contrasts_of.contrasts(grid)
    size_charts, not_drawn = charts.size_charts(grid, verdict)
    style, script = _asset("page.css") + _heat_rules(), "".join(_asset(name) for name in SCRIPTS)
    page = (
        _environment()
        .get_template("page.html.j2")
        .render(
            style=Markup(style),
            script=Markup(script),
            policy=_policy(style, script),  # noqa: S704 (our own files)
            data=_script_data(_data(grid, results, heat, samples, failures)),
            meta=results.meta,
            grid=grid,
            facts=_facts(grid, results),
            answer=answer_text.sentences(grid, answer),
            answer_table=answer_table(grid, answer),
            only_controls=answer.only_controls,
            rule=RULE,
            words=WORDS,
            short=SHORT,
            **_square_key(grid),
            heat=heat,
            success=SUCCESS,
            charts=size_charts,
            not_drawn=not_drawn,
            trades=charts.trades(grid),
            tolerance=charts.COST_TOLERANCE,
            sections=sections_of.sections(grid, results),
            phases=tables.phase_table(grid, verdict),
            cost=tables.cost(results),
            failures=failures,
            warnings=warnings_in(results.meta),
            samples=samples,
            contrasts=contrasts,
            square_of={key: square for square, key in enumerate(heat.keys)},
            forest=contrasts_of.forest(grid, contrasts),
            incoherent_below=schema.INCOHERENT_BELOW,
            best_rows=_best_rows(grid, verdict, answer),
        )
    )
    return for_html(page)


def _square_key(grid: Grid) -> dict[str, str]:
    """The utility line of the sample square in the legend, in numbers and in words."""
    names = dict.fromkeys(name for task in grid.tasks for name in grid.utility_metrics[task])
    sample = dict(zip(WORDS, ("0.98", "0.97", "0.02", "1.00", "0.03"), strict=True))
    return {
        "key_numbers": " · ".join(sample[name] for name in names),
        "key_words": " · ".join(WORDS[name] for name in names),
    }


def _data(
    grid: Grid,
    results: Results,
    heat: tables.Heat,
    samples: examples_of.Samples,
    failures: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What the script knows."""
    errors: dict[Key, list[str]] = defaultdict(list)
    for one in failures:
        errors[one["model"], one["task"], one["attack"], one["defense"]].append(
            f"seed {one['seed']}: {one['error']}"
        )
    squares = []
    for number, key in enumerate(heat.keys):
        point = grid.points[key]
        squares.append(
            {
                "at": grid.facets(key),
                "task": key[1],
                "status": point.status,
                "seeds": len(point.seeds),
                "incoherent": point.is_incoherent,
                "utility": [one.number for one in grid.utilities(key)] if point.measured else [],
                "lift": grid.lifts[key].text if key in grid.lifts else "",
                "errors": errors.get(key, []),
                "sample": samples.cells.get(number),
            }
        )
    return {
        "sweep": results.meta.get("sweep", "sweep"),
        "metrics": heat.metrics,
        "values": heat.data,
        "squares": squares,
        "texts": samples.texts,
        "models": [
            {"name": m.name, "family": m.family, "size": figures.count(m.params)}
            for m in grid.models
        ],
        "attacks": [{"name": a.label, "phases": a.phases} for a in grid.attacks],
        "defenses": [{"name": d.label, "phases": d.phases} for d in grid.defenses],
        "short": {
            task: [SHORT[name] for name in names] for task, names in grid.utility_metrics.items()
        },
        "tasks": grid.tasks,
    }


def _script_data(data: Mapping[str, Any]) -> Markup:
    """JSON that cannot end its script element."""
    return Markup(
        examples_of.script_text(json.dumps(_shown(data), ensure_ascii=False, separators=(",", ":")))
    )  # noqa: S704 (escaped right here)


def _shown(value: Any) -> Any:
    """A value of JSON whose texts a page can show, those of its keys too."""
    if isinstance(value, str):
        return for_html(value)
    if isinstance(value, Mapping):
        return {for_html(str(key)): _shown(inner) for key, inner in value.items()}
    return [_shown(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("ftsec_ray.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        duration=tables.duration,
        metric_title=tables.metric_title,
        weights=figures.count,
        share=share,
        signed=signed,
        pvalue=_pvalue,
        seeds=seeds_text,
        hours=charts.hours_text,
        breakable=_breakable,
    )
    return environment


def _breakable(name: str) -> Markup:
    """A name that may break after an underscore."""
    return Markup("_<wbr>").join(name.split("_"))


def _asset(name: str) -> str:
    return files("ftsec_ray.report").joinpath(name).read_text(encoding="utf-8")


def _heat_rules() -> str:
    return "".join(
        f".h{i}{{background:{back};color:{figures.HEAT_TEXT}}}"
        for i, back in enumerate(figures.heat_colours())
    )


def _policy(style: str, script: str) -> str:
    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; style-src {source(style)}; script-src {source(script)}; "
        "img-src blob:; base-uri 'none'; form-action 'none'; frame-src 'none'; object-src 'none'"
    )


def _pvalue(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _facts(grid: Grid, results: Results) -> dict[str, Any]:
    statuses = results.cells["status"].to_pylist()
    single = [p for p in grid.points.values() if len(p.seeds) == 1]
    return {
        "cells": len(statuses),
        **{name: statuses.count(name) for name in ("done", "failed", "pending")},
        "ladder": answer_text.ladder_models(grid),
        "only_ladder": len(answer_text.ladder_models(grid)) == len(grid.models),
        "single": len(single),
        "points": len(grid.points),
    }


def _best_rows(grid: Grid, verdict: Summary, answer: Answer) -> list[dict[str, Any]]:
    """Per real attack: how it does without a defense, and the defense that lowers it most."""
    rows = []
    for (attack, best), own in zip(verdict.best, answer.attacks, strict=True):
        keys = [(model, task, attack.label, NONE) for model, task, _ in own.on]
        rows.append(
            {
                "attack": attack,
                "best": best,
                "state": own.state,
                "undefended": text_over(own.effects),
                "utility": own_utility_text(grid, keys) if keys else "",
                "seeds": min((e.success.seeds for e in own.effects), default=None),
                "tried": sum(e.attack == attack.label for e in verdict.effects),
            }
        )
    return rows
