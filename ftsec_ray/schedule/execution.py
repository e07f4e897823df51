"""Runs the stages of a plan that a store lacks, with one of the executors."""

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
    """The runtime settings of stages, by the sweep's `resources` and `data`."""
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
    """Run every stage that the results of a plan need and the store lacks; a failed stage stops
    only its descendants.

    Raises BudgetError before anything starts if the expected cost exceeds the sweep's budget.
    During the run, no unit starts that would exceed it.

    Args:
        plan: The plan to run.
        store: The store of artifacts.
        executor: A name in `EXECUTORS`.
        address: Address of a Ray cluster; None uses `RAY_ADDRESS`, else starts Ray on this machine.
        workers: Units to run at once; None: the sweep's `workers`, else as many as fit.
        runtime: Runtime settings of stages; None: the sweep's.
        cache_gib: Memory of a worker for cached base models, in GiB; None: the sweep's.
        runner: Import path of the function that runs one stage.
        session: Import path of the function that makes a worker's session: (store, runtime,
            cache_gib) -> session.
        on_event: Called in this process when a unit starts, finishes, fails or is retried.
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
