"""The figures that papers published, beside those of this sweep, for methods whose published text
names a model of the sweep.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ftsec_ray.config.docs import sections
from ftsec_ray.registry import ATTACKS, DEFENSES, Registry
from ftsec_ray.results.points import NONE

if TYPE_CHECKING:
    from ftsec_ray.report.grid import Grid, MethodLabel

_TUNED = frozenset({"instruct", "chat", "it", "base", "hf", "sft"})
"""Words behind a model's size that say how it was tuned."""
_VENDOR = "meta"
"""First word of names such as Meta-Llama-3-8B, which papers leave out."""
_SIZE = re.compile(r"\d+[mb]")


def names_model(text: str, model: str) -> bool:
    """Whether a text names a model of this family, version and size, tuned in whatever way; a name
    without a size is never found.
    """
    words = re.findall(r"[a-z0-9]+", model.rsplit("/", 1)[-1].lower())
    while words and words[-1] in _TUNED:
        words.pop()
    if len(words) > 1 and words[0] == _VENDOR:
        del words[0]
    if not any(map(_SIZE.fullmatch, words)):
        return False
    name = r"[\W_]*".join(words)
    return re.search(rf"(?<![a-z0-9]){name}(?![a-z0-9])", text.lower()) is not None


def published_rows(grid: Grid) -> list[dict[str, Any]]:
    """A row for every point of one method, an attack undefended or a defense that acts against an
    attack, whose method publishes a figure of the point's model.
    """
    attacks = _published(ATTACKS, grid.real_attacks)
    defenses = _published(DEFENSES, grid.acting)
    rows = []
    for key in grid.points:
        model, task, attack, stack = key
        text = attacks.get(attack) if stack == NONE else defenses.get(stack)
        own = grid.value(key)
        if attack == NONE or text is None or own is None or not names_model(text, model):
            continue
        rows.append(
            {
                "method": attack if stack == NONE else stack,
                "attack": attack,
                "model": model,
                "task": task,
                "facets": grid.facets(key),
                "published": text,
                "metric": grid.points[key].success_metric,
                "own": own,
                "undefended": None if stack == NONE else grid.value((model, task, attack, NONE)),
            }
        )
    return rows


def _published(registry: Registry, labels: Iterable[MethodLabel]) -> dict[str, str]:
    """Label -> what the method's page says of published figures, where it says anything; the name
    of a stack of several is in no registry.
    """
    known = set(registry.names())
    texts = {
        one.label: sections(registry.doc(one.name)).get("Published")
        for one in labels
        if one.name in known
    }
    return {label: text for label, text in texts.items() if text}
