"""The measured effects of methods: from a grid into a file, and onto the page of the method."""

from __future__ import annotations

import pytest

from ftsec_ray.cli import method_effects
from ftsec_ray.cli.method_effects import MeasuredEffect, effects_of, text_of_effects
from ftsec_ray.registry import ATTACKS, DEFENSES
from tests.benchmarks.bench_method_effect import attacks, defenses

from .grids import BASE
from .test_answer import PLACEBO, Make, compared


def test_an_attack_stands_beside_its_base_rate(grid_of: Make) -> None:
    found = {one.method: one for one in attacks(grid_of(BASE), "s")}
    assert set(found) == {"poison", "jailbreak"}
    assert (found["jailbreak"].value, found["jailbreak"].beside) == (0.8, {"base rate": 0.02})
    assert found["jailbreak"].text == (
        "harmful_rate 0.80 (0.74 to 0.85), base rate 0.02: took effect (m, 1 seed, s)"
    )


def test_a_defense_stands_beside_no_defense_and_its_control(grid_of: Make) -> None:
    grid = compared(
        grid_of({**BASE, **PLACEBO}),
        {("poison", "guard"): "better", ("jailbreak", "guard"): "no difference shown"},
    )
    found = {(one.method, one.attack): one for one in defenses(grid, "s")}
    assert not {"none", "placebo"} & {method for method, _ in found}
    guard = found["guard", "poison"]
    assert guard.beside == {"no defense": 0.9, "control": 0.9}
    assert guard.text == (
        "poison asr 0.30 (0.24 to 0.37), no defense 0.90, control 0.90: better (m, 1 seed, s)"
    )
    assert found["weak", "poison"].conclusion == "it has no control here"


def test_figures_come_back_from_the_file_and_stand_on_the_page(
    grid_of: Make, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from ftsec_ray.cli.catalogue import page

    rows = [replace(one, method="badnets") for one in attacks(grid_of(BASE), "s")]
    monkeypatch.setattr(method_effects, "FILE", tmp_path / "effects.json")
    method_effects.FILE.write_text(text_of_effects(rows))
    assert [one.text for one in effects_of("attack", "badnets")] == [one.text for one in rows]
    assert effects_of("defense", "badnets") == []
    assert [one["beside"] for one in page(ATTACKS, "badnets")["measured"]] == [
        one.beside for one in rows
    ]


def test_the_shipped_figures_are_of_methods_that_exist() -> None:
    registries = {"attack": ATTACKS, "defense": DEFENSES}
    assert {one.kind for one in effects_of()} == set(registries)
    for one in effects_of():
        assert isinstance(one, MeasuredEffect)
        assert one.method in registries[one.kind].names()
        assert 0.0 <= one.value <= 1.0
