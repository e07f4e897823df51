"""Runs one method on the user's rows: the attack poisons them, a defense filters them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftsec_ray.errors import StageError
from ftsec_ray.lifecycle import StageKind
from ftsec_ray.method import Method, RowWise
from ftsec_ray.registry import name_of

if TYPE_CHECKING:
    from ftsec_ray.lifecycle import Extra, Job

KIND = StageKind(
    name="craft",
    position=40,
    hooks={"craft_data": "rows (pa.Table of schema.ROWS) -> rows"},
    acts="each",
    takes=("rows",),
    gives="rows",
    answers="defenses",
    settings=("sweep_training",),
    needs_model=False,
    tunes=True,
    prior_s={"": (1.0, 0.0), "model": (1.0, 2.5)},  # `model`: a filter that runs a model
)


def run(job: Job) -> Extra:
    """Change all rows in memory, or block by block if there are many and the method changes each
    row independently.
    """
    from ftsec_ray.data.rows import count_rows

    (method,) = job.methods()
    file = job.session.rows_file(job.inputs["rows"])
    if isinstance(method, RowWise) and count_rows(file) > job.session.runtime.ray_above:
        notes = job.craft_in_blocks(method, file)
    else:
        notes = _craft_at_once(job, method)
    if notes["rows"] == 0:
        raise StageError(
            f"{name_of(method)} removed all training rows",
            0,
            "at least one row",
            "make its filter less strict",
        )
    return {"notes": notes}


def _craft_at_once(job: Job, method: Method) -> dict[str, Any]:
    """Run a method on all rows in memory."""
    from ftsec_ray.data.rows import CRAFTED, count_true, filter_report, write_table

    context = job.context()
    before = job.session.rows(job.inputs["rows"])
    after = method.craft_data(before, context)  # type: ignore[attr-defined]
    write_table(after, job.out / CRAFTED)
    report = filter_report(before, after) if method.KIND == "defense" else {}
    poisoned = count_true(after.column("poisoned"))
    return {
        **report,
        **context.notes,
        **context.counts,
        "rows": after.num_rows,
        "poisoned": poisoned,
    }
