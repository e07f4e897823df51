"""One self-contained HTML page per sweep: reads the results tables, asks nothing of the network.

Jinja2 escapes every text (autoescape is on and the template marks nothing safe except charts built with
`Markup.format`). A Content-Security-Policy forbids all loading and allows exactly this page's style and script, by hash.
"""

from __future__ import annotations

import base64
import hashlib
import os
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ftsec_ray import schema
from ftsec_ray.report import contrasts as contrasts_of
from ftsec_ray.report import examples as examples_of
from ftsec_ray.report import figures, tables
from ftsec_ray.report.grid import SUCCESS, Grid, build_grid
from ftsec_ray.report.searched import searches_section
from ftsec_ray.report.verdict import Verdict, judge
from ftsec_ray.results.read import Results

if TYPE_CHECKING:
    from jinja2 import Environment

REPORT_FILE = "report.html"
_LADDER = "ladder"


def write_report(folder: Path) -> Path:
    """Write `report.html` beside the tables of a results folder and return its path."""
    results = Results.open(folder)
    page = render(results)
    target = results.folder / REPORT_FILE
    scratch = target.with_name(f".{REPORT_FILE}.{os.getpid()}.tmp")
    scratch.write_text(page, encoding="utf-8")
    scratch.replace(target)
    return target


def render(results: Results) -> str:
    """The whole page as text."""
    grid = build_grid(results)
    verdict = judge(grid)
    shown, left_out = examples_of.examples(grid, results)
    anchors = {(e.model, e.task, e.attack, e.defense): e.anchor for e in shown}
    heat = tables.heat(grid, anchors)
    contrasts = contrasts_of.contrasts(grid)
    legend, charts, not_drawn = tables.size_charts(grid, verdict)
    style, script = _asset("page.css") + _heat_rules(), _asset("page.js")
    return _environment().get_template("page.html.j2").render(
        style=Markup(style), script=Markup(script), policy=_policy(style, script),  # noqa: S704 (our own files)
        meta=results.meta, grid=grid, facts=_facts(grid, results), verdict=verdict, heat=heat, success=SUCCESS, legend=legend,
        charts=charts, not_drawn=not_drawn, trades=tables.trades(grid), detections=tables.detections(grid), filters=tables.filters(grid),
        phases=tables.phase_table(grid, verdict), cost=tables.cost(results), failures=tables.failures(grid, results),
        examples=shown, examples_left_out=left_out, contrasts=contrasts,
        forest=contrasts_of.forest(contrasts, has_tasks=len(grid.tasks) > 1), incoherent_below=schema.INCOHERENT_BELOW,
        best_rows=_best_rows(grid, verdict), searched=searches_section(results))


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("ftsec_ray.report", ""), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": True}
    environment.filters.update(duration=tables.duration, metric_title=tables.metric_title, visible=examples_of.visible,
                               weights=figures.count, share=_share, signed=_signed, pvalue=_pvalue)
    return environment


def _asset(name: str) -> str:
    return files("ftsec_ray.report").joinpath(name).read_text(encoding="utf-8")


def _heat_rules() -> str:
    return "".join(f".h{i}{{background:{back};color:{figures.HEAT_TEXT}}}" for i, back in enumerate(figures.heat_colours()))


def _policy(style: str, script: str) -> str:
    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    return (f"default-src 'none'; style-src {source(style)}; script-src {source(script)}; "
            "base-uri 'none'; form-action 'none'; frame-src 'none'; object-src 'none'")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _signed(value: float) -> str:
    return "0.00" if abs(value) < 0.005 else f"{value:+.2f}".replace("-", "−")


def _pvalue(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _facts(grid: Grid, results: Results) -> dict[str, Any]:
    statuses = results.cells["status"].to_pylist()
    single = [p for p in grid.points.values() if len(p.cells) == 1]
    return {"cells": len(statuses), **{name: statuses.count(name) for name in ("done", "failed", "pending")},
            "ladder": [m.name for m in grid.models if m.family == _LADDER or m.name.startswith(f"{_LADDER}:")],
            "only_ladder": all(m.family == _LADDER or m.name.startswith(f"{_LADDER}:") for m in grid.models),
            "single": len(single), "points": len(grid.points)}


def _best_rows(grid: Grid, verdict: Verdict) -> list[dict[str, Any]]:
    """Per real attack: how it does undefended, and the defense that lowers it most."""
    rows = []
    for attack, best in verdict.best:
        undefended = [e for m, t in grid.slices() if (e := grid.value((m.name, t, attack.label, "none"))) is not None]
        rows.append({"attack": attack, "best": best, "works": attack.label in verdict.working,
                     "undefended": sum(e.value for e in undefended) / len(undefended) if undefended else None,
                     "tried": sum(e.attack == attack.label for e in verdict.effects)})
    return rows
