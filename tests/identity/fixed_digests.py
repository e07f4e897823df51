"""Prints the digests of fixed values as JSON; needs the standard library and the package only."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from ftsec_ray.identity import canonical, digest, digests, unit_interval


@dataclass(frozen=True)
class Settings:
    """Parameters of a method as a dataclass."""

    rate: float = 0.1
    word: str = "caf\u00e9 \U0001f600"
    layers: tuple[int, ...] = (1, 2)
    is_on: bool = True
    limit: float | None = None


def fixed() -> dict[str, object]:
    """Name -> digest or number."""
    attack = digests.of_method("attack", "badnets", Settings(), version=1)
    plugin = digests.of_method("defense", "mine", {"n": 1e-7}, version=3, file="ab" * 16)
    task = digests.of_stage(digests.of_head("task", 1, [], {"task": "t"}, form=2), (), None)
    params = {"training": {"rank": 8, "learning_rate": 1e-4}, "methods": [{"name": "badnets"}]}
    head = digests.of_head("craft", 2, [attack, plugin], params, form=2)
    stage = digests.of_stage(head, (("rows", task), ("task", task)), 7)
    recipe = digests.of_recipe([attack, plugin])
    cell = digests.of_cell(recipe, model="m", task="t", seed=7, answers=[stage])
    trial = digests.of_cell(
        recipe, model="m", task="t", seed=7, answers=[stage], search="s", trial=0
    )
    return {
        "canonical": canonical(Settings()),
        "digest": digest({"b": [1, 2.5, None], "a": "\u2028"}),
        "attack": attack,
        "plugin": plugin,
        "task": task,
        "head": head,
        "stage": stage,
        "recipe": recipe,
        "cell": cell,
        "trial": trial,
        "chance": unit_interval(3, "row", "salt"),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(fixed(), indent=1, sort_keys=True) + "\n")
