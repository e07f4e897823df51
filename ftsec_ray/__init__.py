"""Sweeps over attack x defense x model size for the security of LLM fine-tuning.

`load` reads a sweep file, `make_plan` shows what it takes, `run` runs it, `open_results` opens the
tables of a run:

>>> results = ftsec_ray.run("sweeps/quickstart.yaml", executor="local")  # doctest: +SKIP
>>> results.to_pandas("metrics")  # doctest: +SKIP

Names are imported when first used, so that `import ftsec_ray` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ftsec_ray.version import __version__ as __version__

if TYPE_CHECKING:
    from ftsec_ray.api import (
        check_claims,
        export,
        judge_audit,
        load,
        make_plan,
        open_results,
        run,
        submit,
        sweep_schema,
        verify,
    )
    from ftsec_ray.config.sweep import SweepSpec
    from ftsec_ray.errors import EnvironmentFault, FtsecError, SpecError, SpecFaults
    from ftsec_ray.plan.graph import Plan
    from ftsec_ray.results.read import Results

__all__ = [
    "EnvironmentFault",
    "FtsecError",
    "Plan",
    "Results",
    "SpecError",
    "SpecFaults",
    "SweepSpec",
    "__version__",
    "check_claims",
    "export",
    "judge_audit",
    "load",
    "make_plan",
    "open_results",
    "run",
    "submit",
    "sweep_schema",
    "verify",
]
_HOMES = {
    "EnvironmentFault": "errors",
    "FtsecError": "errors",
    "SpecError": "errors",
    "SpecFaults": "errors",
    "Plan": "plan.graph",
    "Results": "results.read",
    "SweepSpec": "config.sweep",
    "check_claims": "api",
    "load": "api",
    "open_results": "api",
    "make_plan": "api",
    "run": "api",
    "submit": "api",
    "sweep_schema": "api",
    "export": "api",
    "verify": "api",
    "judge_audit": "api",
}


def __getattr__(name: str) -> object:
    """A public name, imported on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
