"""`ftsec list` and `ftsec show`: what the registry, the schema and the docstrings say, without
torch or ray.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from typing import Any

from ftsec_ray import schema
from ftsec_ray.cli.console import say, say_json, table
from ftsec_ray.cli.method_costs import costs_of
from ftsec_ray.cli.method_effects import effects_of
from ftsec_ray.config.attack_search import is_searchable
from ftsec_ray.config.docs import sections, summary
from ftsec_ray.config.faults import nearest
from ftsec_ray.config.sweep import LADDER_SIZES, TASK_KINDS, TASK_OPTIONS
from ftsec_ray.config.typed import FieldInfo, fields_of
from ftsec_ray.discovery import modules_in
from ftsec_ray.errors import SpecError
from ftsec_ray.evals.judging import PACKAGE as JUDGES
from ftsec_ray.evals.judging import judge_class
from ftsec_ray.lifecycle import hooks, hooks_of, kinds
from ftsec_ray.method import ZERO_STAGES
from ftsec_ray.registry import ATTACKS, DEFENSES, Registry
from ftsec_ray.success import success_metric


def _models() -> list[dict[str, Any]]:
    from ftsec_ray.models.ladder import parameters

    rows: list[dict[str, Any]] = []
    for size in LADDER_SIZES:
        count = parameters(size)
        rows.append(
            {"source": f"ladder:{size}", "family": "ladder", "aligned": True, "parameters": count}
        )
        rows.append(
            {
                "source": f"ladder:{size}-base",
                "family": "ladder",
                "aligned": False,
                "parameters": count,
            }
        )
    return rows


def _methods(registry: Registry) -> list[dict[str, Any]]:
    rows = []
    for name in registry.names():
        cls = registry.get(name)
        rows.append(
            {
                "name": name,
                "phase": cls.PHASE,
                "hooks": list(hooks_of(cls)),
                "summary": summary(sections(registry.doc(name))[""]),
            }
        )
    return rows


def _tasks() -> list[dict[str, Any]]:
    return [
        {
            "kind": kind,
            "options": (
                [i.name for i in fields_of(TASK_OPTIONS[kind])] if kind in TASK_OPTIONS else []
            ),
            "summary": text,
        }
        for kind, text in TASK_KINDS.items()
    ]


def _metrics() -> list[dict[str, Any]]:
    return [{f.name: getattr(m, f.name) for f in fields(m)} for m in schema.METRICS.values()]


def _judges() -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "version": judge_class(name).VERSION,
            "metrics": [m.name for m in schema.METRICS.values() if m.judge == name],
            "summary": _first_line(judge_class(name).__doc__),
        }
        for name in sorted(modules_in(JUDGES))
    ]


def _stages() -> list[dict[str, Any]]:
    return [
        {
            "kind": kind.name,
            "version": kind.version,
            "takes": list(kind.takes),
            "gives": kind.gives or kind.provides or "",
            "hooks": [f"{hook}: {text}" for hook, text in kind.hooks.items()],
        }
        for kind in kinds().values()
    ]


def _columns() -> list[dict[str, Any]]:
    from ftsec_ray.results.write import TABLES, table_schema

    rows = []
    for name in TABLES:
        whole = table_schema(name)
        for field in whole:
            since = max(
                schema.told_of(whole, "since", "1"), schema.told_of(field, "since", "1"), key=int
            )
            rows.append(
                {
                    "table": name,
                    "column": field.name,
                    "type": str(field.type),
                    "null": field.nullable,
                    "better": schema.told_of(field, "better", "none"),
                    "since": since,
                    "unit": schema.told_of(field, "unit"),
                }
            )
    return rows


KINDS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "attacks": lambda: _methods(ATTACKS),
    "defenses": lambda: _methods(DEFENSES),
    "models": _models,
    "tasks": _tasks,
    "metrics": _metrics,
    "judges": _judges,
    "stages": _stages,
    "columns": _columns,
}


def list_kind(kind: str, *, as_json: bool) -> None:
    """Print one catalogue."""
    if kind not in KINDS:
        raise SpecError("unknown catalogue", kind, " | ".join(KINDS), nearest(kind, KINDS))
    rows = KINDS[kind]()
    if as_json:
        say_json(rows)
        return
    columns = list(rows[0]) if rows else []
    if kind == "metrics":
        columns = ["name", "unit", "better", "meaning"]
    table(
        kind,
        columns,
        ([_cell(row[column]) for column in columns] for row in rows),
        right=("parameters",),
    )
    if kind == "columns":
        say(
            f"\nschema version {schema.SCHEMA_VERSION}; `since` is the version that added a column;"
            " results of older versions have null there"
        )
    if kind == "models":
        say(
            "\nalso: a Hugging Face id (owner/name), a model folder, or a .gguf file.\n"
            "family and aligned are read from names like <family>-<size>-<instruct|base>;\n"
            "for other names write {path: FILE, family: NAME, aligned: true}"
        )


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return (
        ", ".join(map(str, value)) or "-"
        if isinstance(value, Sequence) and not isinstance(value, str)
        else str(value) or "-"
    )


def show(name: str, *, as_json: bool) -> None:
    """Print the page of one method; a name that is both an attack and a defense gives both
    pages.
    """
    found = [registry for registry in (ATTACKS, DEFENSES) if name in registry.names()]
    if not found:
        known = sorted({*ATTACKS.names(), *DEFENSES.names()})
        raise SpecError(
            "unknown method",
            name,
            " | ".join(known),
            nearest(name, known, "see `ftsec list attacks` and `ftsec list defenses`"),
        )
    if as_json:
        say_json([page(registry, name) for registry in found])
        return
    for index, registry in enumerate(found):
        if index:
            say()
        _print_page(page(registry, name))


def page(registry: Registry, name: str) -> dict[str, Any]:
    """The page of a method, as JSON values."""
    cls = registry.get(name)
    parts = sections(registry.doc(name))
    hooks = {hook: _first_line(getattr(cls, hook).__doc__) for hook in hooks_of(cls)}
    parameters = [
        {"name": i.name, "type": i.type, "default": _default(i), "doc": i.doc}
        for i in fields_of(cls)
    ]
    success = {"success": success_metric(cls)} if cls.KIND == "attack" else {}
    return {
        "name": name,
        "kind": registry.kind,
        "phase": cls.PHASE,
        **success,
        "version": cls.VERSION,
        "needs": sorted(cls.NEEDS),
        "zero_stages": sorted(cls.ZERO_STAGES),
        "text": parts.pop(""),
        "sections": parts,
        "measured": [asdict(effect) for effect in effects_of(registry.kind, name)],
        "measured_cost": [asdict(cost) for cost in costs_of(registry.kind, name)],
        "hooks": hooks,
        "parameters": parameters,
        **({"control": dict(cls.CONTROL)} if cls.CONTROL else {}),
        **({"search": {"metric": success_metric(cls)}} if is_searchable(cls) else {}),
    }


def _default(info: FieldInfo) -> object:
    if info.required:
        return "required"
    return list(info.default) if isinstance(info.default, (tuple, frozenset)) else info.default


def _first_line(doc: str | None) -> str:
    return summary(doc or "")


def _print_page(shown: dict[str, Any]) -> None:
    success = f", success: {shown['success']}" if shown.get("success") else ""
    say(
        f"{shown['name']}  ({shown['kind']}, phase: {shown['phase']}{success}, version"
        f" {shown['version']})",
        style="bold",
    )
    say(f"\n{shown['text']}\n")
    for name, text in shown["sections"].items():
        say(f"{name}: {text}")
    for effect in effects_of(shown["kind"], shown["name"]):
        say(f"Measured: {effect.text}")
    for cost in costs_of(shown["kind"], shown["name"]):
        say(f"Measured cost: {cost.text}")
    if shown["needs"]:
        say(f"Inputs: {', '.join(shown['needs'])}")
    if shown["zero_stages"] != sorted(ZERO_STAGES):
        stages = ", ".join(map(str, shown["zero_stages"]))
        say(f"DeepSpeed: ZeRO stages {stages} only" if stages else "DeepSpeed: no; one process")
    if "control" in shown:
        off = ", ".join(f"{key}: {json.dumps(value)}" for key, value in shown["control"].items())
        say(
            f"Control: {{{shown['name']}: {{{off}}}}} is the same defense without its mechanism;"
            " with both in a sweep, `comparisons` tests one against the other"
        )
    if "search" in shown:
        say(
            "Search: `search:` beside its parameters finds the strongest setting of them and of the"
            f" fine-tune; it maximises {shown['search']['metric']}"
        )
    say("\nHooks", style="bold")
    if shown["hooks"]:
        table(
            "",
            ("hook", "what it does"),
            ((hook, shown["hooks"][hook]) for hook in hooks() if hook in shown["hooks"]),
        )
    else:
        say("none: the method adds no stage")
    say("\nParameters", style="bold")
    if not shown["parameters"]:
        say("none")
        return
    rows = [
        (
            p["name"],
            p["type"],
            p["default"] if isinstance(p["default"], str) else json.dumps(p["default"]),
            p["doc"],
        )
        for p in shown["parameters"]
    ]
    table("", ("parameter", "type", "default", "meaning"), rows)
