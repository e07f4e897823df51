"""pyproject.toml declares what the package imports, and nothing else."""

from __future__ import annotations

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ftsec_ray

PACKAGE = Path(ftsec_ray.__file__).parent
PROJECT = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NOT_IMPORTED = {
    "gguf": "transformers reads .gguf files with it and does not require it",
}
"""Declared and imported nowhere -> why it is needed all the same."""
BY_EXTRA = {
    "bitsandbytes": "quantization",
    "libgguf": "quantization",
    "cryptography": "sign",
    "deepspeed": "deepspeed",
    "lm-eval": "benchmarks",
}
"""Imported inside functions that ask for an extra first -> the extra that declares it."""


def imported():
    """Distribution -> the modules that import it."""
    distributions = packages_distributions()
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            else:
                continue
            for top in {name.split(".")[0] for name in names}:
                if top not in sys.stdlib_module_names and top != "ftsec_ray":
                    for one in distributions.get(top, [top]):
                        found.setdefault(canonicalize_name(one), set()).add(path.name)
    return found


def declared(texts):
    return {canonicalize_name(Requirement(text).name) for text in texts}


def test_every_import_is_declared():
    required = declared(PROJECT["dependencies"])
    undeclared = {name: where for name, where in imported().items() if name not in required}
    assert undeclared.keys() == BY_EXTRA.keys(), undeclared
    for name, extra in BY_EXTRA.items():
        assert name in declared(PROJECT["optional-dependencies"][extra])


def test_everything_declared_is_imported_or_has_a_reason():
    assert declared(PROJECT["dependencies"]) - imported().keys() == NOT_IMPORTED.keys()


def test_nothing_is_declared_twice():
    for texts in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        assert len(declared(texts)) == len(texts)


@pytest.mark.parametrize("name", ["ray", "torch"])
def test_what_may_break_with_the_next_release_has_an_upper_bound_wherever_it_is_named(name):
    texts = [
        *PROJECT["dependencies"],
        *(text for extra in PROJECT["optional-dependencies"].values() for text in extra),
    ]
    named = [one for one in map(Requirement, texts) if one.name == name]
    assert named
    for one in named:
        assert any(bound.operator == "<" for bound in one.specifier), str(one)
    assert len({str(one.specifier) for one in named}) == 1
