"""Published figures stand beside the sweep's own where they name the same model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ftsec_ray.report import published_section
from ftsec_ray.report.published_section import names_model, published_rows

from .grids import BASE
from .test_answer import Make

TEXT = "success of Llama-2-7B-Chat 0.3 % before, 16.1 % after; Qwen3-4B 0.72"


@pytest.mark.parametrize(
    ("model", "is_named"),
    [
        ("meta-llama/Llama-2-7b-chat-hf", True),
        ("Qwen/Qwen3-4B-Instruct", True),
        ("Llama-2-7B", True),
        ("meta-llama/Meta-Llama-2-7B-Chat", True),
        ("meta-llama/Llama-2-70b-hf", False),
        ("meta-llama/Llama-3-7B", False),
        ("Qwen/Qwen3-4", False),
        ("ladder:1m", False),
        ("---", False),
    ],
)
def test_a_model_is_named_by_family_version_and_size(model: str, is_named: bool) -> None:
    assert names_model(TEXT, model) is is_named


def test_a_longer_number_is_another_size() -> None:
    assert not names_model("Qwen3-4B10", "Qwen3-4B")
    assert names_model("Qwen3-4B, 10 rows", "Qwen3-4B")


def test_rows_are_points_of_one_method_with_a_figure_of_this_model(
    grid_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Registry:
        def __init__(self, *names: str) -> None:
            self._names = names

        def names(self) -> list[str]:
            return list(self._names)

        def doc(self, name: str) -> str:
            return f"Does {name}.\n\nPublished: {name} on M-1B: 0.5.\nCost: none."

    monkeypatch.setattr(published_section, "ATTACKS", Registry("poison"))
    monkeypatch.setattr(published_section, "DEFENSES", Registry("guard"))
    assert published_rows(grid_of(BASE)) == []
    grid = grid_of(BASE)
    named = replace(
        grid,
        models=tuple(replace(one, name="org/M-1B-chat") for one in grid.models),
        points={("org/M-1B-chat", *key[1:]): point for key, point in grid.points.items()},
    )
    rows = {(row["method"], row["attack"]): row for row in published_rows(named)}
    assert set(rows) == {("poison", "poison"), ("guard", "poison"), ("guard", "jailbreak")}
    assert rows["poison", "poison"]["published"] == "poison on M-1B: 0.5."
    assert rows["poison", "poison"]["undefended"] is None
    assert rows["guard", "poison"]["own"].value == 0.3
    assert rows["guard", "poison"]["undefended"].value == 0.9
