"""A method that works with some kinds of task only is refused at planning with the others."""

from __future__ import annotations

import pytest

from ftsec_ray.attacks.agent_backdoor import AgentBackdoor
from ftsec_ray.attacks.none import NoAttack
from ftsec_ray.config.sweep import AttackEntry, ExcludeRule, TaskSpec
from ftsec_ray.errors import SpecFaults
from ftsec_ray.plan import build_plan
from tests.plan.test_build_plan import sweep
