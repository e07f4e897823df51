"""YAML -> SweepSpec; one error lists all faults of the file.

    models: [ladder:0.2m, ladder:1m]
    task: microworld
    attacks: [none, {harmful_tuning: {shots: {grid: [10, 100]}}}]
    defenses: [none, {safe_lora: {rank: 4}}, [onion, safe_lora]]

Relative paths start at the sweep file's folder. Grids are expanded here: a SweepSpec holds the
expanded axes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, get_args

from ftsec_ray.config.benchmark_entries import with_paths
from ftsec_ray.config.faults import Faults, name_or_none, nearest
from ftsec_ray.config.judge_entries import with_judges
from ftsec_ray.config.limits import CELLS, FILE_BYTES, RULES
from ftsec_ray.config.method_entries import NONE, attacks_of, defenses_of, is_excluded
from ftsec_ray.config.model_entries import models_of
from ftsec_ray.config.pricing import budget_of, prices_of
from ftsec_ray.config.stack_entries import Stack, arranged
from ftsec_ray.config.strategy import split_training
from ftsec_ray.config.sweep import (
    BEFORE,
    DataSpec,
    EvaluationConfig,
    ExcludeRule,
    ModelSpec,
    Moment,
    ResourceSpec,
    SweepSpec,
    TrainingConfig,
)
from ftsec_ray.config.task_entries import tasks_of
from ftsec_ray.config.typed import build, unknown_keys
from ftsec_ray.config.yaml_text import read_yaml
from ftsec_ray.errors import SpecFaults
from ftsec_ray.registry import name_of

KEYS = (
    "name",
    "question",
    "models",
    "task",
    "attacks",
    "defenses",
    "order",
    "controls",
    "seeds",
    "exclude",
    "measure",
    "training",
    "evaluation",
    "resources",
    "data",
    "prices",
    "budget",
)
MAX_SEEDS = 10_000


def load_sweep(source: str | Path | Mapping[str, Any], *, base: Path | None = None) -> SweepSpec:
    """The sweep in a file, a YAML text or a mapping; raises SpecFaults with all faults.

    Args:
        source: A path, a YAML text, or a mapping with the keys of a sweep file.
        base: Folder at which relative paths start. None: the folder of the sweep file, else the
            working directory.
    """
    if isinstance(source, Mapping):
        return _spec(source, (base or Path.cwd()).resolve(), Faults("the sweep"))
    if isinstance(source, str) and ("\n" in source or ": " in source):
        faults = Faults("the sweep")
        return _spec(read_yaml(source, faults), (base or Path.cwd()).resolve(), faults)
    path = Path(source)
    faults = Faults(str(path))
    if not path.is_file():
        near = (
            nearest(path.name, (p.name for p in path.parent.glob("*.y*ml")))
            if path.parent.is_dir()
            else ""
        )
        faults.add(
            "file",
            "no such sweep file",
            str(path),
            "a YAML file",
            near or "give the path of a sweep file, such as sweeps/quickstart.yaml",
        )
        faults.check()
    if fault := FILE_BYTES.exceeded_by(path.stat().st_size):
        faults.add_error("file", fault)
        faults.check()
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        faults.add("file", "not UTF-8 text", str(error), "a YAML file in UTF-8")
        faults.check()
    return _spec(
        read_yaml(text, faults), (base or path.parent).resolve(), faults, default_name=path.stem
    )


def _spec(
    given: object, base: Path, faults: Faults, *, default_name: str | None = None
) -> SweepSpec:
    if not isinstance(given, Mapping):
        if not faults.found:
            faults.add("file", "not a mapping", given, "keys: " + ", ".join(KEYS))
        raise SpecFaults(faults.source, faults.found)
    unknown_keys(given, KEYS, "", faults)
    missing = [key for key in ("models", "task", "attacks", "defenses") if key not in given]
    for key in missing:
        faults.add(key, "missing", None, f"the key {key}; see the examples in sweeps/")
    name = name_or_none(given.get("name", default_name), "name", faults)
    question = given.get("question", "")
    if not isinstance(question, str):
        faults.add("question", "not a text", question, "the question that the sweep answers")
    values: dict[str, Any] = {
        "models": () if "models" in missing else models_of(given["models"], base, faults),
        "tasks": () if "task" in missing else tasks_of(given["task"], base, faults),
        "defenses": () if "defenses" in missing else _stacks(given, faults),
        "seeds": _seeds(given.get("seeds", 1), faults),
    }
    values["attacks"], values["searches"] = (
        ((), ()) if "attacks" in missing else attacks_of(given["attacks"], faults)
    )
    values["models"] = _measured(given.get("measure", "after"), values["models"], faults)
    training, values["strategy"] = split_training(
        _without_grids(given.get("training"), "training", faults), TrainingConfig, faults
    )
    values["training"] = build(TrainingConfig, training, "training", faults)
    evaluation = _without_grids(given.get("evaluation"), "evaluation", faults)
    evaluation = with_judges(with_paths(evaluation, base, faults), base, faults)
    values["evaluation"] = build(EvaluationConfig, evaluation, "evaluation", faults)
    for key, cls in (("resources", ResourceSpec), ("data", DataSpec)):
        values[key] = build(cls, _without_grids(given.get(key), key, faults), key, faults)
    values["prices"] = prices_of(given.get("prices"), faults)
    values["budget"] = budget_of(
        given.get("budget"),
        values["resources"],
        has_prices=bool(given.get("prices")),
        faults=faults,
    )
    values["exclude"] = _exclude(given.get("exclude"), values, faults)
    faults.check()
    spec = SweepSpec(name=str(name), question=str(question), **values)
    if fault := CELLS.exceeded_by(_most_cells(spec)):
        faults.add_error("file", fault)
        faults.check()
    _some_cell(spec, faults)
    faults.check()
    return spec


def _stacks(given: Mapping[str, Any], faults: Faults) -> tuple[Stack, ...]:
    """The stacks of defenses in the order in which they run, with added controls."""
    return tuple(arranged(given, defenses_of(given["defenses"], faults), faults))


def _measured(
    given: object, models: tuple[ModelSpec, ...], faults: Faults
) -> tuple[ModelSpec, ...]:
    """The models, each once for every value of `measure`."""
    moments = list(given) if isinstance(given, (list, tuple)) else [given]
    known = get_args(Moment)
    wrong = [moment for moment in moments if moment not in known or moments.count(moment) > 1]
    if wrong or not moments:
        faults.add(
            "measure", "not a time to measure at", given, "before, after, or [before, after]"
        )
        return models
    before = [
        replace(
            model, name=f"{model.name}{BEFORE}", family=f"{model.family}{BEFORE}", measured="before"
        )
        for model in models
        if "before" in moments
    ]
    # The plain name comes first: stages that both share are shown under it.
    return (*(models if "after" in moments else ()), *before)


def _without_grids(given: object, place: str, faults: Faults) -> object:
    if isinstance(given, Mapping):
        for key, value in given.items():
            if isinstance(value, Mapping) and "grid" in value:
                faults.add(
                    f"{place}.{key}",
                    f"no grid is allowed in {place}",
                    value,
                    "one value",
                    f"{place} is the same for all cells of a sweep; write one sweep file per"
                    " setting",
                )
                given = {k: v for k, v in given.items() if k != key}
    return given


def _seeds(given: object, faults: Faults) -> tuple[int, ...]:
    want = f"a count from 1 to {MAX_SEEDS}, or a list of different integers >= 0"
    if isinstance(given, int) and not isinstance(given, bool):
        if 1 <= given <= MAX_SEEDS:
            return tuple(range(given))
        faults.add("seeds", "invalid number of seeds", given, want)
        return ()
    if not isinstance(given, (list, tuple)) or not given:
        faults.add("seeds", "no seeds", given, want)
        return ()
    for index, seed in enumerate(given):
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            faults.add(f"seeds[{index}]", "not a seed", seed, "integer >= 0")
        elif seed in given[:index]:
            faults.add(f"seeds[{index}]", "a duplicate seed", seed, "each seed once")
    return tuple(given)


def _exclude(given: object, axes: Mapping[str, Any], faults: Faults) -> tuple[ExcludeRule, ...]:
    if given is None:
        return ()
    if not isinstance(given, (list, tuple)):
        faults.add(
            "exclude",
            "not a list",
            given,
            "a list of rules such as {attack: badnets, defense: lisa}",
        )
        return ()
    known = _names(axes)
    rules: list[ExcludeRule] = []
    for index, entry in enumerate(given):
        place = f"exclude[{index}]"
        if not isinstance(entry, Mapping) or not entry:
            faults.add(
                place,
                "not a rule",
                entry,
                "a mapping of " + ", ".join(known),
                "an empty rule would exclude every cell",
            )
            continue
        unknown_keys(entry, known, place, faults)
        choices: list[list[tuple[str, Any]]] = [
            [(key, name) for name in dict.fromkeys(_values(value, key, place, known[key], faults))]
            for key, value in entry.items()
            if key in known
        ]
        if fault := RULES.exceeded_by(len(rules) + prod(map(len, choices))):
            faults.add_error(place, fault)
            return ()
        rules += [ExcludeRule(**dict(choice)) for choice in product(*choices)]
    return tuple(dict.fromkeys(rules))


def _names(axes: Mapping[str, Any]) -> dict[str, dict[object, object]]:
    """Field of a rule -> each accepted spelling of a value -> the value."""
    stacks = axes["defenses"]
    defenses = [name_of(defense) for stack in stacks for defense in stack] + (
        [NONE] if () in stacks else []
    )
    # A rule may name a model by its source too.
    models = {model.source: model.name for model in axes["models"]} | {
        model.name: model.name for model in axes["models"]
    }
    return {
        "model": dict(models),
        "task": _same(task.name for task in axes["tasks"]),
        "attack": _same(map(name_of, axes["attacks"])),
        "defense": _same(defenses),
        "seed": _same(axes["seeds"]),
    }


def _same(values: Iterable[object]) -> dict[object, object]:
    return {value: value for value in values if isinstance(value, (str, int))}


def _values(
    given: object, key: str, place: str, known: Mapping[object, object], faults: Faults
) -> list[object]:
    """The values of one field of a rule; each value of a list gives a rule of its own."""
    values = list(given) if isinstance(given, (list, tuple)) else [given]
    resolved = []
    for value in values:
        plain = isinstance(value, (str, int)) and not isinstance(value, bool)
        if plain and value in known:
            resolved.append(known[value])
        elif known:  # nothing is known if the axis itself has faults
            faults.add(
                f"{place}.{key}",
                f"the sweep has no such {key}",
                value,
                " | ".join(sorted(map(str, known))),
                nearest(value, map(str, known), "remove the rule, or add the value to the axis"),
            )
    return resolved


def _most_cells(spec: SweepSpec) -> int:
    """Number of cells before `exclude`; a search counts with its first batch of trials."""
    targets = len(spec.models) * len(spec.tasks) * len(spec.defenses)
    first_trials = sum(min(s.search.trials, s.search.batch) for s in spec.searches)
    return targets * (len(spec.attacks) * len(spec.seeds) + first_trials)


def _some_cell(spec: SweepSpec, faults: Faults) -> None:
    """A fault if the rules exclude every cell."""
    if not spec.exclude:
        return
    for model, task in product(spec.models, spec.tasks):
        rules = [rule for rule in spec.exclude if rule.concerns(model.name, task.name)]
        for attack, stack, seed in product(spec.attacks, spec.defenses, spec.seeds):
            if not is_excluded(rules, attack, stack, seed):
                return
    faults.add(
        "exclude",
        "the rules exclude every cell",
        len(spec.exclude),
        "at least one cell",
        "remove a rule",
    )
