"""The private names of Ray that the executor `tune` uses: all in one module, and there in the installed
Ray.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import ray

import ftsec_ray
from ftsec_ray.errors import EnvironmentFault
from ftsec_ray.schedule import tune_internals

PACKAGE = Path(ftsec_ray.__file__).parent
NAMES = [(path, name) for path, names in tune_internals.PRIVATE.items() for name in names]


@pytest.mark.parametrize(("path", "name"), NAMES, ids=[name for _, name in NAMES])
def test_the_installed_ray_has_the_private_name(path, name):
    assert tune_internals.has_private(path, name), (
        f"Ray {ray.__version__} has no {path.partition(':')[2] or path} {name}:"
        " run with --executor actors, or install an older Ray"
    )


def test_every_private_name_that_the_module_uses_is_in_its_list():
    text = Path(tune_internals.__file__).read_text(encoding="utf-8")
    body = text.split("# Tune's controller and its trials.")[1]
    used = set(re.findall(r'"(_[a-z_]+)"', body)) | set(re.findall(r"class_cache\.([A-Z_]+)", body))
    assert len(used) > 10
    assert used <= {name for _, name in NAMES}


def test_no_other_module_reads_a_private_name_of_ray():
    names = "|".join(name for _, name in NAMES)
    for path in sorted(PACKAGE.rglob("*.py")):
        # the other names, of how Ray starts, are tried by test_own_ray.py
        if path.name not in ("tune_internals.py", "own_ray.py"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(rf"(?<!self)\.({names})\b|ray\.\w*\.?_private", text), path


def test_a_ray_that_lacks_a_name_is_refused_with_what_to_do(monkeypatch):
    path = "ray.tune.execution.tune_controller:TuneController"
    assert not tune_internals.has_private(path, "_no_such_name")
    assert not tune_internals.has_private("ray.tune.no_such_module:TuneController", "_trials")
    monkeypatch.setattr(tune_internals, "PRIVATE", {path: ("_trials", "_no_such_name")})
    with pytest.raises(
        EnvironmentFault, match=f"Ray {ray.__version__}: .*lacks _no_such_name"
    ) as caught:
        tune_internals.check_tune()
    assert "_trials" not in caught.value.what
    assert "--executor actors" in caught.value.fix


def test_an_attribute_that_is_gone_within_a_run_is_told_as_well():
    class Wrapper:
        """Of a Ray that keeps its controller elsewhere."""

    with pytest.raises(EnvironmentFault, match=r"Wrapper lacks _tune_controller") as caught:
        tune_internals.controller_of(Wrapper())
    assert "--executor actors" in caught.value.fix


def test_a_worker_that_ray_kills_for_its_memory_has_died_for_tune_as_well():
    from types import SimpleNamespace

    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.exceptions import OutOfMemoryError, RayActorError

    manager, told = RayActorManager(resource_manager=None), []
    actor = SimpleNamespace(actor_id="a", _on_error=lambda _, error: told.append(error))
    task = SimpleNamespace(_tracked_actor=actor, _on_error=lambda _, error: told.append(error))
    manager._cleanup_actor = lambda tracked_actor: None
    killed = OutOfMemoryError("killed due to the node running low on memory")
    with pytest.raises(RuntimeError, match="unexpected exception"):
        manager._actor_task_failed(tracked_actor_task=task, exception=killed)
    with tune_internals.memory_kills_are_deaths():
        manager._actor_task_failed(tracked_actor_task=task, exception=killed)
    assert [type(error) for error in told] == [RayActorError, RayActorError]
    assert "low on memory" in str(told[0])
    with pytest.raises(RuntimeError):
        manager._actor_task_failed(tracked_actor_task=task, exception=killed)
