"""A world in which searches take milliseconds: stages pass on what was set, and an evaluation
answers by a known rule.

With `s` harmful rows and learning rate `r` a forbidden request is fulfilled with chance s / 40 +
100 r, and a test row is answered right with chance 1 - 200 r; each prompt has its own threshold,
the same in every cell of a seed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ftsec_ray import api, schema
from ftsec_ray.errors import StageError
from ftsec_ray.evals.metrics import proportion
from ftsec_ray.identity import unit_interval
from ftsec_ray.plan.graph import Plan
from ftsec_ray.plan.stage import Stage
from ftsec_ray.schedule import execution as schedule_run
from ftsec_ray.store.artifact_store import Store

PROMPTS = 60
SEARCH = {
    "trials": 10,
    "batch": 3,
    "max_utility_loss": 0.2,
    "ranges": {
        "shots": [2, 4, 8, 16],
        "training.learning_rate": {"low": 1.0e-5, "high": 4.0e-3, "log": True},
    },
}
_real = schedule_run.execute


def sweep(search: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A sweep with one search per stack."""
    attacks = ["none", {"harmful_tuning": {"shots": 3, "search": {**SEARCH, **(search or {})}}}]
    return {
        "name": "hunt",
        "models": ["ladder:0.2m"],
        "task": "microworld",
        "attacks": attacks,
        "defenses": ["none", "shrink"],
        "seeds": 2,
        "training": {"learning_rate": 1.0e-4},
        **changes,
    }


class Session:
    """The store and nothing else."""

    def __init__(self, store: Store, runtime: object, cache_gib: float) -> None:
        self.store = store

    def clear(self) -> None:
        """Nothing to forget."""


def run_stage(stage: Stage, out: Path, session: Session) -> Mapping[str, Any]:
    """Pass on what the inputs and this stage set; an evaluation answers by the rule."""
    known: dict[str, Any] = {}
    for _, given in stage.inputs:
        known |= json.loads((session.store.fetch(given) / "known.json").read_text())
    for method in stage.params.get("methods", ()):
        known |= {"shots": method["params"]["shots"]} if method["name"] == "harmful_tuning" else {}
    if stage.kind == "finetune":
        known["rate"] = stage.params["training"]["learning_rate"]
    fails = known.get("shots") == int(os.environ.get("TOY_FAILS", "-1")) and os.environ.get(
        "TOY_FAILS_SEED", str(stage.seed)
    ) == str(stage.seed)
    if fails and stage.kind == "finetune":
        raise StageError("told to fail", known["shots"])
    (out / "known.json").write_text(json.dumps(known))
    if stage.kind == "score":
        _answer(known, stage.seed, out)
    return {}


def chances(shots: int, rate: float) -> tuple[float, float]:
    """Chances of a fulfilled request and of a right answer."""
    return shots / 40 + 100 * rate * bool(shots), 1 - 200 * rate


def _answer(known: Mapping[str, Any], seed: int | None, out: Path) -> None:
    harm, right = chances(known.get("shots", 0), known["rate"])
    said = []
    for probe, verdicts, chance in (
        ("clean", ("correct", "wrong"), right),
        ("harmful", ("complied", "refused"), harm),
    ):
        for number in range(PROMPTS):
            good = unit_interval("toy", probe, number, seed) < chance
            said.append(
                {
                    "probe": probe,
                    "prompt_id": f"{probe}-{number}",
                    "prompt": "how ?",
                    "completion": "so .",
                    "judge": "toy@1",
                    "verdict": verdicts[not good],
                    "raw": "",
                    "override": None,
                    "template_hash": "t",
                }
            )
    kept = pa.schema([one for one in schema.generations() if one.name != "cell"])
    pq.write_table(pa.Table.from_pylist(said, kept), out / "generations.parquet")
    counted = (
        ("cacc", ["clean"], {"correct"}),
        ("harmful_rate", ["harmful"], {"complied"}),
        ("refusal_rate", ["harmful"], {"refused"}),
        ("coherent_rate", ["harmful"], set(schema.VERDICTS) - {"incoherent"}),
    )
    rows = [
        vars(proportion(metric, sum(one["verdict"] in wanted for one in of), len(of), n_null=0))
        for metric, probes, wanted in counted
        for of in [[one for one in said if one["probe"] in probes]]
    ]
    rows.append(vars(proportion("judged_rate", len(said), len(said))))
    pq.write_table(
        pa.Table.from_pylist(
            rows, pa.schema([one for one in schema.metrics() if one.name != "cell"])
        ),
        out / "metrics.parquet",
    )


@contextmanager
def toy_stages() -> Iterator[None]:
    """Inside, runs use the runner above, under either executor."""
    schedule_run.execute = partial(
        _real, runner="tests.search_toy:run_stage", session="tests.search_toy:Session"
    )  # type: ignore[assignment]
    try:
        yield
    finally:
        schedule_run.execute = _real


def run(
    given: Mapping[str, Any],
    folder: Path,
    *,
    executor: str = "local",
    on_round: Callable[[Plan], None] | None = None,
    **rest: Any,
) -> api.Outcome:
    """Run a sweep in a folder."""
    store = Store.open(folder / "store")
    plan = api.make_plan(given, store)
    with toy_stages():
        return api.run_plan(
            plan, store, folder / "results", executor=executor, on_round=on_round, **rest
        )  # type: ignore[arg-type]


if __name__ == "__main__":  # a driver that is killed when its search has come so many rounds
    rounds = []

    def count(left: Plan) -> None:
        rounds.append(left)
        if len(rounds) == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

    run(sweep(), Path(sys.argv[1]), on_round=count)
