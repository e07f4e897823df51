"""What a worker reads out of a stage passes the checks that it passed in the sweep file."""

from __future__ import annotations

import json

import pytest

from ftsec_ray.config.sweep import AlignSpec, TrainingConfig
from ftsec_ray.errors import StageError
from ftsec_ray.identity import canonical
from ftsec_ray.plan.decode import align_of, generation_of, methods_of, training_of
from ftsec_ray.plan.stage import Stage
from ftsec_ray.registry import ATTACKS


def stage(**params: object) -> Stage:
    return Stage("0" * 32, "craft", "x", 0, (), params, {}, "cpu", 1.0)


def attack(**params: object) -> Stage:
    return stage(methods=[{"kind": "attack", "name": "badnets", "params": params}])


def test_objects_come_back_as_they_were_written():
    training = TrainingConfig(epochs=2.5, rank=4)
    plain = json.loads(canonical(training))
    assert training_of(stage(training=plain)) == training
    assert align_of(stage(align=json.loads(canonical(AlignSpec(epochs=1.0))))) == AlignSpec(
        epochs=1.0
    )
    assert align_of(stage()) is None
    method = ATTACKS.get("badnets")(rate=0.2)
    assert methods_of(attack(**json.loads(canonical(method)))) == [method]


@pytest.mark.parametrize(
    ("params", "place"),
    [
        ({"rate": "0.2"}, "badnets.rate: wrong value"),
        ({"rate": 2.0}, "badnets.rate: value out of range"),
        ({"repeat": 1.5}, "badnets.repeat: wrong value"),
        ({"rat": 0.2}, "badnets.rat: unknown key"),
    ],
)
def test_a_method_that_its_sweep_file_could_not_name_does_not_run(params, place):
    with pytest.raises(StageError) as caught:
        methods_of(attack(**params))
    assert place in caught.value.what


def test_a_config_of_another_version_does_not_run_as_if_it_were_this_one():
    with pytest.raises(StageError, match="TrainingConfig"):
        training_of(stage(training={"rank": 4, "warmup_steps": 3}))
    with pytest.raises(StageError, match="lacks the parameter 'generation'"):
        generation_of(stage())
