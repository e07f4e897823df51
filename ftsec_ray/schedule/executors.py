"""The list of executors, used by the command line, the Python API and the tests.

A new executor needs a module with a function of the same arguments, and an entry here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ftsec_ray.errors import EnvironmentFault, SpecError


@dataclass(frozen=True, kw_only=True)
class Executor:
    """One way to run the units of a plan."""

    function: str
    """Import path of a function (dispatcher, worker spec, resources, *, address, workers)."""
    about: str
    """Short description."""
    uses_ray: bool
    """Whether it starts Ray or connects to a Ray cluster."""


DEFAULT = "tune"
EXECUTORS: Mapping[str, Executor] = {
    "tune": Executor(
        function="ftsec_ray.schedule.tune_executor:run_tune",
        about="as trials of Ray Tune",
        uses_ray=True,
    ),
    "actors": Executor(
        function="ftsec_ray.schedule.actors_executor:run_actors",
        about="on plain Ray actors, without Ray Tune",
        uses_ray=True,
    ),
    "local": Executor(
        function="ftsec_ray.schedule.local_executor:run_local",
        about="in this process, one stage at a time",
        uses_ray=False,
    ),
}


def executor_of(name: str) -> Executor:
    """The executor of a name; SpecError if there is none."""
    if name not in EXECUTORS:
        raise SpecError("no such executor", name, " | ".join(EXECUTORS), help_text())
    return EXECUTORS[name]


def load_executor(name: str) -> Callable[..., None]:
    """The function of an executor; EnvironmentFault if it cannot be imported."""
    module, _, function = executor_of(name).function.partition(":")
    try:
        run: Callable[..., None] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise EnvironmentFault(
            f"the executor {name!r} cannot be imported: {error}",
            name,
            "an installed version of Ray that it supports",
            "run with --executor " + " or ".join(other for other in EXECUTORS if other != name),
        ) from error
    return run


def help_text() -> str:
    """The names and descriptions of all executors in one line."""
    return "; ".join(f"{name}: {executor.about}" for name, executor in EXECUTORS.items())
