"""The shape of the package: imports only point down, light commands stay light, public names are
exported.
"""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import ftsec_ray

ROOT = Path(ftsec_ray.__file__).parent
LAYERS = [
    "version",
    "errors",
    "shown_text",
    "secret_forms",
    "redact",
    "identity",
    "durable",
    "discovery",
    "numerics",
    "schema",
    "success",
    "measured",
    "context",
    "conversation",
    "method",
    "lifecycle",
    "registry",
    "config",
    "models",
    "data",
    "training",
    "attacks",
    "defenses",
    "evals",
    "judges",
    "code_versions",
    "plan",
    "store",
    "stages",
    "execute",
    "schedule",
    "results",
    "report",
    "claims",
    "api",
    "cli",
    "__main__",
]
ALLOWED = {("attacks", "evals"), ("defenses", "evals"), ("attacks", "defenses")}
HEAVY = {"torch", "ray", "deepspeed", "transformers", "peft", "datasets"}


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def modules() -> list[Path]:
    return [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
        # `from ftsec_ray import schema` names a layer in its list, not in its module.
        return (
            [f"ftsec_ray.{alias.name}" for alias in node.names]
            if node.module == "ftsec_ray"
            else [node.module]
        )
    return []


def edges() -> list[tuple[str, str, str]]:
    found = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for name in imported(node):
                parts = name.split(".")
                if parts[0] == "ftsec_ray" and len(parts) > 1 and parts[1] in LAYERS:
                    found.append(
                        (layer_of(path), parts[1], f"{path.relative_to(ROOT)}:{node.lineno}")
                    )
    return found


def test_every_module_has_its_layer():
    assert {layer_of(path) for path in modules()} <= set(LAYERS)


def test_module_names_are_unique_but_for_the_methods_that_do_nothing():
    names = Counter(path.stem for path in modules() if path.stem not in ("__init__", "none"))
    assert [name for name, count in names.items() if count > 1] == []


def test_imports_only_point_down():
    found = edges()
    assert len(found) > 100
    upward = [
        (a, b, where)
        for a, b, where in found
        if LAYERS.index(b) > LAYERS.index(a) and (a, b) not in ALLOWED
    ]
    assert upward == []


def test_heavy_packages_are_imported_inside_functions_only():
    found = []
    for path in modules():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            found += [
                f"{path.relative_to(ROOT)}: {name}"
                for name in imported(node)
                if name.split(".")[0] in HEAVY
            ]
    # The Tune executor subclasses Ray's classes, and is itself imported only when it runs.
    assert [
        one
        for one in found
        if not one.startswith(("schedule/tune_executor.py", "schedule/trials.py"))
    ] == []


def test_importing_the_package_and_its_api_loads_neither_torch_nor_ray():
    code = (
        "import sys, ftsec_ray, ftsec_ray.api, ftsec_ray.plan, ftsec_ray.config.sweep_file,"
        " ftsec_ray.cli.app\nprint(sorted({'torch', 'ray', 'transformers', 'peft', 'pyarrow'} &"
        " set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, timeout=60
    )
    assert (result.stdout.strip(), result.returncode) == ("[]", 0), result.stderr


def test_public_names_are_sorted_and_all_there():
    assert ftsec_ray.__all__ == sorted(ftsec_ray.__all__)
    assert set(dir(ftsec_ray)) == set(ftsec_ray.__all__)
    for name in ftsec_ray.__all__:
        assert getattr(ftsec_ray, name) is not None
    homes = set(ftsec_ray._HOMES)
    assert homes == set(ftsec_ray.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match="no_such_name"):
        ftsec_ray.no_such_name  # noqa: B018


def test_names_for_type_checkers_are_those_of_the_lazy_import():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    told = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told == {name: f"ftsec_ray.{home}" for name, home in ftsec_ray._HOMES.items()}


def test_sizes_and_kinds_that_a_sweep_may_name_are_those_that_exist():
    from ftsec_ray.config.sweep import LADDER_SIZES
    from ftsec_ray.models.ladder import SIZES

    assert list(LADDER_SIZES) == list(SIZES)


def test_tasks_that_a_sweep_may_name_are_those_that_can_be_loaded():
    from ftsec_ray.config.sweep import TASK_KINDS, MicroworldOptions
    from ftsec_ray.config.task_entries import SPLITS
    from ftsec_ray.config.typed import fields_of
    from ftsec_ray.data.microworld.splits import MAX_TRAIN_ROWS, build_task
    from ftsec_ray.data.tasks import TASKS

    assert list(TASKS) == list(TASK_KINDS)
    assert {split for kind in TASKS.values() for split in (*kind.sources, *kind.required)} <= set(
        SPLITS
    )
    options = {info.name: info for info in fields_of(MicroworldOptions)}
    assert f"<= {MAX_TRAIN_ROWS}" in options["train_rows"].type
    assert (
        options["train_rows"].default
        == inspect.signature(build_task).parameters["train_rows"].default
    )
