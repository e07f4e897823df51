"""The identity of a benchmark: the release of lm-eval, and for a user's task file the bytes of all
files that it names.

lm-eval is not imported, since that would load torch: names are read from the text of its task
files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from ftsec_ray.config.benchmark_entries import data_files, is_path
from ftsec_ray.config.faults import nearest
from ftsec_ray.errors import SpecError
from ftsec_ray.identity.content import content_hash
from ftsec_ray.plan.origin import Origin
from ftsec_ray.version import version_of

EXTRA = 'pip install "ftsec-ray[benchmarks]"'
_NAME = re.compile(r"[\w.+-]+")
"""A task name; it becomes part of the name of a metric."""
_NAMED = re.compile(
    r"^(?:task|group|tag):[ \t]*[\"']?([\w.+-]+)[\"']?[ \t]*(?:#.*)?$", re.MULTILINE
)
_TAGS = re.compile(r"^tag:[ \t]*\n((?:[ \t]*-[ \t]*\S+[ \t]*\n)+)", re.MULTILINE)


class _Function(str):
    """A `!function` value of a task file: the name of a module next to it and of a function."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that keeps functions as text."""


_Loader.add_constructor("!function", lambda loader, node: _Function(str(node.value)))


def benchmark_faults(benchmarks: Iterable[str]) -> list[tuple[str, SpecError]]:
    """A fault for every benchmark that lm-eval cannot run, and for every duplicate name of a
    benchmark.
    """
    faults: list[tuple[str, SpecError]] = []
    names: dict[str, str] = {}
    for benchmark in benchmarks:
        try:
            name = str(benchmark_origin(benchmark).params["benchmark"])
            if name in names:
                raise SpecError(
                    f"two benchmarks have the same name {name!r}",
                    [names[name], benchmark],
                    "a unique name for each",
                    "change `task:` in the task file",
                )
            names[name] = benchmark
        except SpecError as fault:
            faults.append(("evaluation.benchmarks", fault))
    return faults


@cache
def benchmark_origin(benchmark: str) -> Origin:
    """Identity and location of a benchmark; SpecError if lm-eval has no such task, or if a file
    that a task file names is missing.

    Args:
        benchmark: Name of a task or group of lm-eval, or the absolute path of a task file.
    """
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise SpecError(
            "benchmarks need the package lm-eval, which is not installed",
            benchmark,
            "lm-eval",
            EXTRA,
        )
    version = version_of("lm-eval") or version_of("lm_eval")
    if is_path(benchmark):
        return _local(Path(benchmark), version)
    folder = Path(next(iter(spec.submodule_search_locations))) / "tasks"
    if not _is_known(benchmark, folder):
        known = {name for text in _texts(folder) for name in _names_in(text)}
        raise SpecError(
            f"lm-eval {version} has no task, group or tag of this name",
            benchmark,
            "a name from `lm-eval ls tasks`, or the path of a task file that ends with .yaml",
            nearest(benchmark, known),
        )
    return Origin({"benchmark": benchmark, "lm_eval": version}, {})


def _is_known(name: str, folder: Path) -> bool:
    """Whether lm-eval has a task of this name; since there are thousands of files, folders with the
    same beginning are read first.
    """
    first = re.split(r"[_-]", name)[0]
    likely = sorted(path for path in folder.glob(f"{first}*") if path.is_dir())
    return bool(_NAME.fullmatch(name)) and any(
        name in _names_in(text) for place in (*likely, folder) for text in _texts(place)
    )


def _texts(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.yaml")):
        yield path.read_text(encoding="utf-8", errors="replace")


def _names_in(text: str) -> set[str]:
    """Names of the tasks, groups and tags of a file."""
    lists = "".join(_TAGS.findall(text + "\n"))
    return {
        *_NAMED.findall(text),
        *(tag.strip("\"' ") for tag in re.findall(r"-[ \t]*(\S+)", lists)),
    }


def _local(path: Path, version: str) -> Origin:
    """The task of a user's task file."""
    config, files = _read(path)
    name = config.get("task")
    if not isinstance(name, str) or not _NAME.fullmatch(name) or "group" in config:
        raise SpecError(
            "the task file does not define exactly one task",
            {key: config[key] for key in ("task", "group") if key in config},
            "`task: NAME`, with a name of letters, digits and _ . + -",
            "write one file per task of a group",
        )
    files += [path.parent / _module_of(function, path) for function in _functions(config)]
    files += [Path(file) for file in _flat(data_files(config, path.parent))]
    content = {
        _shown(file, path.parent): content_hash(file) for file in dict.fromkeys([path, *files])
    }
    return Origin(
        {"benchmark": name, "lm_eval": version, "content": content},
        {"benchmark_path": str(path.resolve())},
    )


def _shown(file: Path, folder: Path) -> str:
    """A file's name in the identity, which does not depend on the location of the task's folder."""
    return str(file.relative_to(folder)) if file.is_relative_to(folder) else file.name


def _read(path: Path, before: Sequence[Path] = ()) -> tuple[dict[str, Any], list[Path]]:
    """The configuration of a task file, and the files that it includes; its own keys override
    theirs.
    """
    try:
        config = _Loader(path.read_text(encoding="utf-8")).get_single_data()
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpecError(
            "cannot read this task file", str(path), "a task of lm-eval as YAML", str(error)
        ) from error
    if not isinstance(config, dict) or path in before:
        raise SpecError(
            "the task file is not a mapping, or it includes itself",
            str(path),
            "a mapping with `task`, `dataset_path`, `doc_to_text`, ...",
        )
    given = config.pop("include", None) or []
    merged: dict[str, Any] = {}
    files: list[Path] = []
    for entry in given if isinstance(given, list) else [given]:
        included = path.parent / str(entry)
        own, more = _read(included, (*before, path))
        merged |= own
        files += [included, *more]
    return merged | config, files


def _functions(value: object) -> Iterator[_Function]:
    if isinstance(value, _Function):
        yield value
    children = value.values() if isinstance(value, dict) else value
    if isinstance(children, Iterable) and not isinstance(children, str):
        for child in children:
            yield from _functions(child)


def _module_of(function: _Function, path: Path) -> str:
    """The Python file next to a task file that defines a function; SpecError if it is missing."""
    file = function.rpartition(".")[0].replace(".", "/") + ".py"
    if not (path.parent / file).is_file():
        raise SpecError(
            f"{path.name} names a function whose module is missing",
            str(function),
            f"{file} in {path.parent}",
            "add the file, or remove the function",
        )
    return file


def _flat(files: Any) -> Iterator[str]:
    if isinstance(files, Mapping):
        files = list(files.values())
    if isinstance(files, list):
        for file in files:
            yield from _flat(file)
    elif files is not None:
        yield files
