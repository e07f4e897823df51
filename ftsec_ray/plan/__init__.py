"""The plan of a sweep: stages, cells and units. Planning imports neither torch nor Ray."""

from ftsec_ray.plan.build import build_plan
from ftsec_ray.plan.graph import Plan
from ftsec_ray.plan.stage import Cell, Stage, Unit

__all__ = ["Cell", "Plan", "Stage", "Unit", "build_plan"]
