"""Which actor gets a unit, and which make way for others: without Ray, on actors that are none."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from ftsec_ray.context import Runtime
from ftsec_ray.execute.worker_spec import WorkerSpec
from ftsec_ray.plan.stage import Unit
from ftsec_ray.schedule import actor_pool
from ftsec_ray.schedule.actor_pool import ActorPool, PooledActor

SPEC = WorkerSpec(store="file:///s", runtime=Runtime(), cache_gib=1.0, runner="r", session="s")
BUNDLES = {
    "cpu": {"CPU": 1.0},
    "gpu": {"CPU": 1.0, "GPU": 1.0},
    "group:2cpu": {"CPU": 2.0},
}


@dataclass
class Handle:
    """Stands where Ray's handle of an actor would, and keeps what it was asked to run."""

    asked: list = field(default_factory=list)

    def __post_init__(self):
        self.run = SimpleNamespace(remote=lambda *given: self.asked.append(given) or object())
        self.__ray_ready__ = SimpleNamespace(remote=object)


class Pool(ActorPool):
    """On a cluster of declared size; ended actors are noted."""

    def __init__(self, *actors, have, nodes=1, can_grow=False):
        self.have, self.count, self.ended = have, nodes, []
        super().__init__(SPEC, SimpleNamespace(bundles=BUNDLES, can_grow=can_grow))
        self.actors = list(actors)

    def measure(self):
        self._have, self._nodes = self.have, self.count

    def discard(self, actors):
        for actor in list(actors):
            self.actors.remove(actor)
            self.ended.append(actor)


def idle(resource, *, warm="", age_s=0.0):
    actor = PooledActor(resource=resource, handle=Handle(), group=None, waits_for=None, warm=warm)
    actor.is_starting, actor.since = False, time.monotonic() - age_s
    return actor


def starting(resource, *, age_s=0.0):
    actor = PooledActor(resource=resource, handle=Handle(), group=None, waits_for=object())
    actor.since = time.monotonic() - age_s
    return actor


def unit(affinity, resource="cpu"):
    return Unit("u", (SimpleNamespace(where={"model": affinity}),), (), resource)


def test_a_unit_goes_to_the_actor_that_has_its_base_model_in_memory():
    warm, other = idle("cpu", warm="base-a", age_s=9.0), idle("cpu", warm="base-b", age_s=5.0)
    pool = Pool(other, warm, idle("gpu", warm="base-c"), have={"CPU": 4.0})
    assert pool.warm == "base-c", "of the one that became idle last"
    assert pool.run(unit("base-a"), 2)
    assert warm.handle.asked
    assert warm.handle.asked[0][1:] == ("cpu", 2)
    assert not warm.is_idle
    assert pool.run(unit("base-a"), 1), "rather than wait for it"
    assert other.handle.asked
    assert not pool.run(unit("base-a"), 1), "none of its class is idle"
    pool.became_idle(other)
    assert (other.warm, other.is_idle, other.unit) == ("base-a", True, None)


def test_an_idle_actor_gets_no_unit_before_it_has_given_a_sign_of_life_that_it_was_asked_for():
    alive, dead, begins = idle("cpu", warm="base-a"), idle("cpu"), starting("cpu")
    start = begins.waits_for
    pool = Pool(alive, dead, begins, have={"CPU": 4.0})
    pool.probe_idle()
    assert begins.waits_for is start, "one that starts will say so anyway"
    assert not pool.run(unit("base-a"), 1)
    assert not alive.is_starting
    pool.became_idle(alive)
    assert alive.warm == "base-a"
    assert pool.run(unit("base-a"), 1)
    assert alive.handle.asked
    assert not dead.handle.asked


def test_idle_actors_stay_while_the_cluster_holds_them_beside_those_that_start():
    pool = Pool(idle("cpu"), starting("gpu", age_s=60.0), have={"CPU": 2.0, "GPU": 1.0})
    pool.make_way({"gpu": 1}, has_group=False)
    assert pool.ended == []


def test_the_longest_idle_actor_makes_way_for_one_of_another_class_that_lacks_its_core():
    old, young = idle("cpu", age_s=5.0), idle("cpu", age_s=1.0)
    pool = Pool(young, old, starting("gpu"), have={"CPU": 2.0, "GPU": 1.0})
    pool.make_way({"gpu": 1}, has_group=False)
    assert pool.ended == [old]


def test_an_actor_that_starts_for_no_unit_makes_way_as_an_idle_one_does():
    needless = starting("cpu", age_s=1.0)
    pool = Pool(needless, starting("gpu"), have={"CPU": 1.0, "GPU": 1.0})
    pool.make_way({"gpu": 1}, has_group=False)
    assert pool.ended == [needless]


@pytest.mark.parametrize(("age_s", "go"), [(0.0, False), (actor_pool.PATIENCE_S + 1.0, True)])
def test_on_several_nodes_idle_actors_make_way_after_a_while_though_the_sum_would_do(age_s, go):
    spare = idle("cpu")
    pool = Pool(spare, starting("gpu", age_s=age_s), have={"CPU": 9.0, "GPU": 1.0}, nodes=2)
    pool.make_way({"gpu": 1}, has_group=False)
    assert pool.ended == ([spare] if go else [])


def test_all_idle_actors_make_way_for_a_worker_group_but_its_own_driver():
    spare, driver, needed = idle("cpu"), idle("group:2cpu"), starting("cpu")
    pool = Pool(spare, driver, needed, have={"CPU": 9.0})
    pool.make_way({"cpu": 1}, has_group=True)
    assert pool.ended == [spare]


@pytest.mark.parametrize("can_grow", [False, True])
def test_only_in_a_cluster_that_may_shrink_actors_go_that_nobody_needs(can_grow):
    long, short, needless = (
        idle("cpu", age_s=actor_pool.IDLE_S + 1.0),
        idle("cpu", age_s=1.0),
        starting("gpu"),
    )
    pool = Pool(long, short, needless, have={"CPU": 9.0, "GPU": 9.0}, can_grow=can_grow)
    pool.make_way({}, has_group=False)
    assert pool.ended == ([long, needless] if can_grow else [])
