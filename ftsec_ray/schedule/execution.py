"""Run what a store lacks of a plan, by one of the executors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ftsec_ray.config.limits import limits_set
from ftsec_ray.context import Runtime
from ftsec_ray.execute.unit import DEFAULT_RUNNER, DEFAULT_SESSION
from ftsec_ray.execute.worker_spec import WorkerSpec
from ftsec_ray.models.quantized import check_bitsandbytes
from ftsec_ray.numerics import check_cpu, environment_of
from ftsec_ray.plan.graph import Plan
from ftsec_ray.plan.stage import is_group
from ftsec_ray.redact import clean_logs
from ftsec_ray.schedule.cluster_address import cluster_address
from ftsec_ray.schedule.dispatcher import Dispatcher, Event, RunReport
from ftsec_ray.schedule.executors import DEFAULT, executor_of, load_executor
from ftsec_ray.schedule.ray_session import worker_environment
from ftsec_ray.store import Store
from ftsec_ray.training.zero import check_deepspeed

__all__ = ["Event", "RunReport", "execute", "runtime_of"]


def runtime_of(plan: Plan) -> Runtime:
    """Where and how stages run, as the sweep's `resources` say."""
    resources = plan.spec.resources
    return Runtime(
        device="cuda" if resources.wants_gpus else "cpu",
        numerics=plan.spec.numerics,
        micro_batch=resources.micro_batch,
        eval_batch=resources.eval_batch,
        checkpoint_every_s=resources.checkpoint_every_s,
        timeout_s=resources.timeout_s,
        ray_above=plan.spec.data.ray_above,
    )


def execute(
    plan: Plan,
    store: Store,
    *,
    executor: str = DEFAULT,
    address: str | None = None,
    workers: int | None = None,
    runtime: Runtime | None = None,
    cache_gib: float | None = None,
    runner: str = DEFAULT_RUNNER,
    session: str = DEFAULT_SESSION,
    on_event: Callable[[Event], None] | None = None,
) -> RunReport:
    """Run every stage that the answers of a plan need and the store lacks; a failed stage stops
    only its descendants.

    BudgetError, before anything starts, when that would take more than the sweep's budget; past it
    no further unit starts.

    Args:
        plan: what to run.
        store: where artifacts are and go.
        executor: a name in `EXECUTORS`.
        address: of a Ray cluster; None starts Ray on this machine, or joins the cluster of
            `RAY_ADDRESS`.
        workers: units at a time; None takes the sweep's, else as many as there is room for.
        runtime: where and how stages run; None takes the sweep's.
        cache_gib: base models that a worker keeps in memory, at most; None takes the sweep's.
        runner: import path of the function that runs one stage.
        session: import path of what makes the session of a worker: (store, runtime, cache_gib) ->
            session.
        on_event: told in this process of every unit that starts, finishes, fails or goes back to
            the queue.
    """
    chosen = executor_of(executor)
    done = store.done()
    dispatcher = Dispatcher(plan, store, done, on_event=on_event)
    if dispatcher.finished:
        return dispatcher.report()
    clean_logs()
    dispatcher.check_budget(done)
    if any(is_group(unit.resource) for unit in dispatcher.units.values()):
        check_deepspeed()
    if plan.spec.training.quantization != "none":
        check_bitsandbytes()
    runtime = replace(runtime or runtime_of(plan), numerics=plan.spec.numerics)
    is_here = not chosen.uses_ray or cluster_address(address) is None
    if runtime.numerics == "portable" and is_here:
        check_cpu()
    store.drop_leftovers()
    resources = plan.spec.resources
    spec = WorkerSpec(
        store=store.uri,
        runtime=runtime,
        cache_gib=resources.cache_gib if cache_gib is None else cache_gib,
        runner=runner,
        session=session,
        environment={
            **limits_set(),
            **(worker_environment() if chosen.uses_ray else {}),
            **environment_of(runtime.numerics),
        },
    )
    run = load_executor(executor)
    run(dispatcher, spec, resources, address=address, workers=workers or resources.workers)
    return dispatcher.report()
