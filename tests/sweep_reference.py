"""The generated tables of the documents in `sweeps/`: `python -m tests.sweep_reference` writes them
anew from the code, each between `<!-- generated: NAME -->` and `<!-- end -->`.

Types, defaults and meanings are those of the JSON schema of a sweep file, which is made from the
config classes and their docstrings. Only units, and defaults that are not constants, stand here.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ftsec_ray import api
from ftsec_ray.cli.catalogue import KINDS
from ftsec_ray.config import open_limits
from ftsec_ray.config.json_schema import sweep_schema
from ftsec_ray.config.limits import LIMITS, Limit
from ftsec_ray.config.typed import fields_of, words
from ftsec_ray.registry import ATTACKS, DEFENSES, Registry
from tests.shipped_sweeps import FILES, FOLDER, beside_its_inputs, inputs_of

DOCUMENTS = (FOLDER / "README.md", FOLDER / "READING_RESULTS.md")
BLOCK = re.compile(r"(<!-- generated: ([\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
Schema = Mapping[str, Any]

PLACES = {
    "sweep": "",
    "models": "models",
    "align": "models.align",
    "task": "task",
    "source": "task.splits.train",
    "options": "task.options",
    "search": "attacks.harmful_tuning.search",
    "exclude": "exclude",
    "training": "training",
    "deepspeed": "training.deepspeed",
    "evaluation": "evaluation",
    "judge": "evaluation.judge",
    "resources": "resources",
    "data": "data",
    "prices": "prices.*",
    "budget": "budget",
}
"""Name of a table -> the mapping of the sweep file whose keys it lists."""
TYPES = {
    "sweep.models": "model or list of models",
    "sweep.task": "task or list of tasks",
    "sweep.attacks": "`all`, attack, or list of attacks",
    "sweep.defenses": "`all`, defense, or list of defenses and stacks",
    "sweep.exclude": "list of mappings",
    "sweep.measure": "`before`, `after`, or both in a list",
    "models.serve_template": "text, list of texts, or mapping of names to texts",
    "sweep.prices": "mapping of machines",
    "search.metric": "text",
    "task.splits": "mapping",
    "task.source": "text or mapping",
}
"""Types that say more in words than the schema does."""
DEFAULTS = {
    "sweep.name": "name of the file",
    "sweep.question": "empty",
    "sweep.exclude": "no rules",
    "sweep.prices": "no prices",
    "sweep.budget": "no budget",
    "models.name": "from the source",
    "models.family": "from the source's name",
    "models.aligned": "from the source's name",
    "models.path": "one of `path`, `id`, `source`",
    "models.id": "one of `path`, `id`, `source`",
    "models.source": "one of `path`, `id`, `source`",
    "models.align": "`false`",
    "models.serve_template": "the template of the training",
    "task.name": "its kind",
    "task.kind": "`rows` with sources, else `microworld`",
    "task.splits": "those of the kind",
    "task.source": "those of the kind",
    "task.columns": "none",
    "task.options": "their defaults",
    "source.where": "all rows",
    "source.matching": "all rows",
    "search.metric": "the attack's success",
    **{f"exclude.{key}": "all" for key in ("model", "task", "attack", "defense", "seed")},
    "prices.gpus": "`0`",
}
"""Defaults that are no constants."""
UNITS = {
    "sweep.seeds": "seeds",
    "models.parameters": "weights",
    "align.epochs": "passes",
    "align.learning_rate": "-",
    "align.batch_size": "rows",
    "align.safety_rows": "rows",
    "align.benign_rows": "rows",
    "align.max_length": "tokens",
    "source.rows": "rows",
    "source.skip": "rows",
    "options.train_rows": "rows",
    "options.second_language_rows": "rows",
    "options.borderline_rows": "rows",
    "search.trials": "trials",
    "search.batch": "trials",
    "search.max_utility_loss": "fraction 0..1",
    "search.seed": "-",
    "exclude.seed": "-",
    "training.rank": "dimensions",
    "training.alpha": "-",
    "training.dropout": "fraction 0..1",
    "training.layers": "index of a block",
    "training.epochs": "passes",
    "training.batch_size": "rows",
    "training.learning_rate": "-",
    "training.warmup_frac": "fraction 0..1",
    "training.weight_decay": "-",
    "training.max_grad_norm": "L2 norm",
    "training.max_length": "tokens",
    "training.deepspeed_above": "weights",
    "deepspeed.zero_stage": "-",
    "deepspeed.workers": "processes",
    "deepspeed.micro_batch": "rows",
    "evaluation.prompts": "prompts per probe",
    "evaluation.max_new_tokens": "tokens",
    "evaluation.temperature": "-",
    "evaluation.samples": "answers per prompt",
    "evaluation.perplexity_rows": "rows",
    "evaluation.benchmark_limit": "documents",
    "evaluation.answer_lengths": "tokens",
    "judge.max_new_tokens": "tokens",
    "judge.parameters": "weights",
    "judge.timeout_s": "seconds",
    "judge.retries": "calls",
    "judge.usd_per_million_input": "USD per 1e6 tokens",
    "judge.usd_per_million_output": "USD per 1e6 tokens",
    "resources.workers": "stages",
    "resources.cpus_per_stage": "cores",
    "resources.gpus_per_stage": "GPUs",
    "resources.gpu_memory_gib": "GiB",
    "resources.micro_batch": "rows",
    "resources.eval_batch": "prompts",
    "resources.checkpoint_every_s": "seconds",
    "resources.timeout_s": "seconds",
    "resources.cache_gib": "GiB",
    "data.ray_above": "rows",
    "data.workers": "processes",
    "prices.gpus": "GPUs",
    "prices.cpus": "cores",
    "prices.gpu_memory_gib": "GiB",
    "prices.usd_per_hour": "USD per hour",
    "budget.usd": "USD",
    "budget.gpu_hours": "GPU-hours",
    "budget.hours": "hours",
}
"""Unit of every key that takes a number; `-` for a pure number."""


@cache
def whole_schema() -> dict[str, Any]:
    """The JSON schema of a sweep file."""
    return sweep_schema()


def mappings_in(node: Any) -> Iterable[Schema]:
    """Every mapping with named keys that may stand at a place, references followed."""
    if "$ref" in node:
        yield from mappings_in(whole_schema()["$defs"][node["$ref"].rsplit("/", 1)[-1]])
    elif "properties" in node or isinstance(node.get("additionalProperties"), dict):
        yield node
    for choice in node.get("anyOf", ()):
        yield from mappings_in(choice)
    if "items" in node:
        yield from mappings_in(node["items"])


def mapping_at(place: str) -> Schema:
    """The mapping at a place of the sweep file such as `training.deepspeed`."""
    node: Any = whole_schema()
    for name in place.split(".") if place else ():
        node = next(
            inner.get("properties", {}).get(name) or inner["additionalProperties"]
            for inner in mappings_in(node)
            if name == "*" or name in inner.get("properties", {})
        )
    return next(iter(mappings_in(node)))


def rows_table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )


def key_table(name: str) -> str:
    """The keys of one mapping of a sweep file."""
    mapping = mapping_at(PLACES[name])
    required = mapping.get("required", ())
    rows = [
        (
            f"`{key}`",
            TYPES.get(f"{name}.{key}") or words(schema),
            "required" if key in required else default_of(f"{name}.{key}", schema),
            unit_of(f"{name}.{key}", schema),
            re.sub(r"\bNone\b", "`null`", schema["description"]) if "description" in schema else "",
        )
        for key, schema in mapping["properties"].items()
    ]
    return rows_table(("key", "type", "default", "unit", "meaning"), rows)


def default_of(place: str, schema: Schema) -> str:
    """The default of a key in words; KeyError for one that nothing gives."""
    if place in DEFAULTS:
        return DEFAULTS[place]
    if "default" in schema:
        default = schema["default"]
        return f"`{default if isinstance(default, str) else json.dumps(default)}`"
    if any(True for _ in mappings_in(schema)):
        return "their defaults"
    raise KeyError(f"give the default of {place} in DEFAULTS")


def unit_of(place: str, schema: Schema) -> str:
    """The unit of a key; KeyError for a number without any."""
    if place in UNITS:
        return UNITS[place]
    if takes_number(schema):
        raise KeyError(f"give the unit of {place} in UNITS")
    return ""


def takes_number(schema: Schema) -> bool:
    """Whether a key takes a number, alone or in a list."""
    inner = [*schema.get("anyOf", ()), *([schema["items"]] if "items" in schema else ())]
    return schema.get("type") in ("integer", "number") or any(map(takes_number, inner))


def method_table(registry: Registry, kind: str) -> str:
    """The methods of a registry with their parameters."""
    rows = [
        (f"`{row['name']}`", row["phase"], row["summary"], parameters_of(registry, row["name"]))
        for row in KINDS[kind]()
    ]
    return rows_table(("name", "phase", "what it does", "parameters and defaults"), rows)


def parameters_of(registry: Registry, name: str) -> str:
    """`rate` 0.1, `trigger` "tq", ..."""
    infos = fields_of(registry.get(name))
    return ", ".join(
        f"`{info.name}` "
        + ("required" if info.required else json.dumps(info.default, default=list))
        for info in infos
    )


def catalogue_table(kind: str, *columns: str) -> str:
    """Columns of one catalogue of `ftsec list`."""
    rows = [[f"`{row[columns[0]]}`", *(row[c] for c in columns[1:])] for row in KINDS[kind]()]
    return rows_table(columns, rows)


def limit_table() -> str:
    """The limits of a sweep file and of the files that it names."""
    of_files = [one for one in vars(open_limits).values() if isinstance(one, Limit)]
    rows = [(f"`{one.variable}`", f"{one.default:,}", one.counts) for one in (*LIMITS, *of_files)]
    return rows_table(("variable", "default", "what is counted"), rows)


@cache
def sweeps_table() -> str:
    """The sweep files of the repository."""
    rows = []
    for path in FILES:
        with tempfile.TemporaryDirectory() as folder:
            plan = api.make_plan(beside_its_inputs(path, Path(folder)))
        spec = plan.spec
        planned = sum(cell.searched is None for cell in plan.cells)
        places = len(spec.models) * len(spec.tasks) * len(spec.defenses)
        trials = sum(one.search.trials for one in spec.searches) * places
        cells = f"{planned:,}" + (f", and up to {trials} trials" if trials else "")
        rows.append((f"[{path.name}]({path.name})", spec.question, cells, needs_of(spec, path)))
    return rows_table(("file", "question", "cells", "needs"), rows)


def needs_of(spec: Any, path: Path) -> str:
    """What a sweep needs beside this package."""
    needs = []
    if files := inputs_of(path):
        needs.append(f"{len(files)} local files and folders under `inputs/`")
    if ids := [one.source for one in spec.models if re.fullmatch(r"[\w.-]+/[\w.-]+", one.source)]:
        needs.append(f"{len(set(ids))} models and the data sets of its tasks from Hugging Face")
    if spec.resources.wants_gpus:
        needs.append("GPUs")
    if spec.evaluation.benchmarks:
        needs.append('`pip install "ftsec-ray[benchmarks]"`')
    return "; ".join(needs) or "nothing"


TABLES: Mapping[str, Callable[[], str]] = {
    **{name: (lambda name=name: key_table(name)) for name in PLACES},
    "attacks": lambda: method_table(ATTACKS, "attacks"),
    "defenses": lambda: method_table(DEFENSES, "defenses"),
    "kinds": lambda: catalogue_table("tasks", "kind", "summary"),
    "judges": lambda: catalogue_table("judges", "name", "summary"),
    "metrics": lambda: catalogue_table("metrics", "name", "unit", "better", "meaning"),
    "limits": limit_table,
    "shipped-sweeps": sweeps_table,
}


def written(text: str) -> str:
    """A document with its generated tables made anew."""
    return BLOCK.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


def main() -> None:
    """Write the documents of `sweeps/` anew."""
    for path in DOCUMENTS:
        path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
