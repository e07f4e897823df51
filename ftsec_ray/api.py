"""The public Python API; all that the command line does with a sweep.

`load` reads a sweep, `make_plan` plans it, `run` runs it and returns the tables, `submit` runs it
on a cluster, `open_results` opens the tables again, and `check_claims` tests the survey's findings
on them. `export` packs a finished sweep, and `verify` checks what would differ on this machine.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftsec_ray.config.sweep import SweepSpec
from ftsec_ray.errors import DataError, EnvironmentFault, SpecError
from ftsec_ray.plan.graph import Plan
from ftsec_ray.schedule.cluster_address import check_address, cluster_address
from ftsec_ray.schedule.executors import DEFAULT as DEFAULT_EXECUTOR
from ftsec_ray.schedule.executors import executor_of
from ftsec_ray.schema import SCHEMA_VERSION

if TYPE_CHECKING:
    from ftsec_ray.claims.findings import Finding
    from ftsec_ray.plan.stage import Cell
    from ftsec_ray.results.audit import Audit
    from ftsec_ray.results.paired import Correction
    from ftsec_ray.results.read import Results
    from ftsec_ray.results.verify import Verification
    from ftsec_ray.schedule.execution import Event, RunReport
    from ftsec_ray.schedule.jobs import Head, Job
    from ftsec_ray.schedule.upload import Upload
    from ftsec_ray.store.artifact_store import Store

Sweep = str | Path | Mapping[str, Any] | SweepSpec | Plan
DEFAULT_STORE = ".ftsec/store"
DEFAULT_RESULTS = "results"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a run."""

    results: Results
    page: Path
    """The HTML report."""
    report: RunReport | None
    """The stages that ran; None if the store already had everything."""
    plan: Plan
    """The plan, including all trials of its searches."""


def load(source: str | Path | Mapping[str, Any]) -> SweepSpec:
    """The sweep in a file, a YAML text or a mapping; SpecFaults lists every fault."""
    from ftsec_ray.config.sweep_file import load_sweep

    return load_sweep(source)


def make_plan(sweep: Sweep, store: Store | str | Path | None = None) -> Plan:
    """The plan of a sweep: its cells and their unique stages.

    Args:
        sweep: A path, a YAML text, a mapping, a SweepSpec or a Plan.
        store: A store with measured trials of searches, which extend the plan; None plans only the
            first round of each search.
    """
    from ftsec_ray.plan.build import build_plan
    from ftsec_ray.store.artifact_store import Store

    if isinstance(sweep, Plan) and (store is None or not sweep.spec.searches):
        return sweep
    spec = (
        sweep.spec
        if isinstance(sweep, Plan)
        else sweep
        if isinstance(sweep, SweepSpec)
        else load(sweep)
    )
    if store is None or not spec.searches:
        return build_plan(spec)
    from ftsec_ray.results.search_results import look_at_store

    return build_plan(spec, look_at_store(store if isinstance(store, Store) else Store.open(store)))


def run(
    sweep: Sweep,
    *,
    store: str | Path = DEFAULT_STORE,
    results: str | Path = DEFAULT_RESULTS,
    executor: str = DEFAULT_EXECUTOR,
    address: str | None = None,
    workers: int | None = None,
    limit: int | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Results:
    """Run the stages of a sweep that the store lacks, write its tables and its report, and return
    the tables.

    Args:
        sweep: A path, a YAML text, a mapping, a SweepSpec or a Plan.
        store: Folder or URI of the artifacts.
        results: Folder or URI prefix; tables and report go into a subfolder with the sweep's name.
        executor: `tune` (Ray Tune), or another name in `ftsec_ray.schedule.executors.EXECUTORS`.
        address: Address of a running Ray cluster; None: `RAY_ADDRESS`, else Ray on this machine.
        workers: Stages to run at once; None: the sweep's `resources.workers`, else as many as fit.
        limit: Run only the first `limit` cells; the others stay `pending`.
        on_event: Called when a unit starts, finishes, fails or is retried.
    """
    from ftsec_ray.results.remote_results import local_results, send_results
    from ftsec_ray.schedule.job_paths import is_uri
    from ftsec_ray.store.artifact_store import Store

    kept = Store.open(store)
    whole = make_plan(sweep, kept)
    folder = results_folder(local_results(results), whole.spec.name)
    outcome = run_plan(
        whole,
        kept,
        folder,
        executor=executor,
        address=address,
        workers=workers,
        limit=limit,
        on_event=on_event,
        sweep_text=text_of(sweep),
    )
    if is_uri(str(results)):
        send_results(folder, results)
    return outcome.results


def submit(
    sweep: str | Path,
    *,
    address: str | None = None,
    store: str | None = None,
    results: str | None = None,
    workers: int | None = None,
    limit: int | None = None,
    submission_id: str | None = None,
    package: bool | None = None,
    shared_disk: bool = False,
    before_sending: Callable[[Upload], None] | None = None,
) -> Job:
    """Submit a sweep file as a job to a running Ray cluster, and return the job; nothing is
    uploaded if the file has errors.

    Args:
        sweep: A sweep file. Files that it names by relative path are uploaded too.
        address: URL of the cluster's dashboard; None: http://127.0.0.1:8265.
        store: As for `run`; a URI unless all nodes are this machine.
        results: As for `run`; None: `results` if all nodes are this machine, else `results` in the
            store.
        workers: Stages to run at once.
        limit: Run only the first `limit` cells.
        submission_id: Id of the job; None makes one.
        package: Whether to upload this machine's ftsec_ray; None: only if it is a checkout or an
            editable install.
        shared_disk: Whether all nodes mount this machine's absolute paths at the same place.
        before_sending: Called with the files that will be uploaded.
    """
    from ftsec_ray.schedule import job_paths, jobs, upload

    path = Path(sweep)
    whole = limited(make_plan(path), limit)
    job_id = _job_id(submission_id, whole.spec.name)
    sent = upload.upload_of(
        path, whole.spec, package=upload.is_checkout() if package is None else package
    )
    head = jobs.connect(address)
    here = job_paths.is_this_machine(head.nodes)
    job_paths.checked_files(sent.left_out, here=here, shared_disk=shared_disk)
    store = job_paths.checked_place(
        store or DEFAULT_STORE, "store", here=here, shared_disk=shared_disk
    )
    results = job_paths.checked_place(
        results or (DEFAULT_RESULTS if here else job_paths.below(store, DEFAULT_RESULTS)),
        "results",
        here=here,
        shared_disk=shared_disk,
    )
    command = ["python", "-m", "ftsec_ray"] if sent.has_package else ["ftsec"]
    command += ["run", sent.sweep, "--store", store, "--results", results]
    command += [
        part
        for name, count in (("--workers", workers), ("--limit", limit))
        if count is not None
        for part in (name, str(count))
    ]
    if before_sending is not None:
        before_sending(sent)
    return _sent(
        head, command, sent, job_id=job_id, name=whole.spec.name, store=store, results=results
    )


def _sent(
    head: Head,
    command: list[str],
    sent: Upload,
    *,
    job_id: str,
    name: str,
    store: str,
    results: str,
) -> Job:
    """Pack the files of a job, submit it and return it."""
    from ftsec_ray.schedule.jobs import Job, hand_over

    with tempfile.TemporaryDirectory(prefix="ftsec-job-") as scratch:
        archive = sent.write(Path(scratch) / "sweep.zip")
        hand_over(head, command, archive, submission_id=job_id, name=name)
        return Job(
            id=job_id,
            head=head,
            store=store,
            results=results,
            sent_bytes=archive.stat().st_size,
            has_package=sent.has_package,
        )


def _job_id(given: str | None, name: str) -> str:
    """The id of a job: the given one, or one with the name of the sweep and the time."""
    if given is None:
        plain = re.sub("[^A-Za-z0-9_-]+", "-", name)
        now = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        return f"ftsec-{plain}-{now}-{os.urandom(2).hex()}"
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", given):
        raise SpecError(
            "not a valid job id",
            given,
            "letters, digits and - _ ., not starting with - or .",
            "the id is used in file names; choose another --submission-id",
        )
    return given


def run_plan(
    whole: Plan,
    store: Store,
    folder: Path,
    *,
    executor: str = DEFAULT_EXECUTOR,
    address: str | None = None,
    workers: int | None = None,
    limit: int | None = None,
    on_event: Callable[[Event], None] | None = None,
    sweep_text: str | None = None,
    on_round: Callable[[Plan], None] | None = None,
) -> Outcome:
    """Run a plan, and write its tables and its report; complete results are kept unchanged.

    `on_round` is called with the remaining plan each time that it grows by new trials of a search.
    The other arguments are those of `run`.
    """
    from ftsec_ray.report.page import REPORT_FILE, write_report
    from ftsec_ray.store.disk import check_folder

    uses_ray = executor_of(executor).uses_ray
    whole = make_plan(whole, store)
    part = limited(whole, limit)
    report = None
    needed = part.needed(store.sound(part.kinds)[0])
    if not needed:
        held = whole_results(whole, folder)
        if held is not None and (folder / REPORT_FILE).is_file():
            return Outcome(results=held, page=folder / REPORT_FILE, report=None, plan=whole)
    else:
        store.check_writable({stage.digest for stage in needed})
        check_folder(folder, "results", "--results")
        if cluster_address(address) is None:
            check_gpus(whole.spec)
        elif uses_ray:
            check_address(address)
        whole, report = _run_rounds(
            whole,
            store,
            limit,
            on_round,
            executor=executor,
            address=address,
            workers=workers,
            on_event=on_event,
        )
    collect_plan(whole, store, report, folder, sweep_text=sweep_text)
    return Outcome(
        results=open_results(folder), page=write_report(folder), report=report, plan=whole
    )


def _run_rounds(
    whole: Plan,
    store: Store,
    limit: int | None,
    on_round: Callable[[Plan], None] | None,
    **how: Any,
) -> tuple[Plan, RunReport]:
    """Execute a plan, and again each time that it grows by new trials of its searches."""
    from ftsec_ray.plan.cost_estimate import BudgetError
    from ftsec_ray.schedule.execution import execute

    report = execute(limited(whole, limit), store, **how)
    while whole.searches:
        before, whole = whole.digest, make_plan(whole, store)
        if whole.digest == before:
            break
        # Stages that failed are retried in the next run, not in every round.
        left = plan_of_cells(
            whole,
            [
                cell
                for cell in limited(whole, limit).cells
                if not report.failed.keys() & set(cell.stages)
            ],
        )
        if on_round is not None:
            on_round(left)
        try:
            report = report.then(execute(left, store, **how))
        except BudgetError as fault:
            report = report.stopped(
                fault.what, (stage.digest for stage in left.needed(store.done()))
            )
            break
    return whole, report


def collect_plan(
    whole: Plan,
    store: Store,
    report: RunReport | None,
    folder: Path,
    *,
    sweep_text: str | None = None,
    correction: Correction = "bh",
) -> Path:
    """Write the tables of a plan from its artifacts in the store, with one row per cell, whether it
    is done, failed or pending.
    """
    from ftsec_ray.results.collect import collect

    return collect(whole, store, report, folder, sweep_text=sweep_text, correction=correction)


def text_of(sweep: Sweep) -> str | None:
    """The text of the sweep file; None if the sweep is not a file."""
    path = Path(sweep) if isinstance(sweep, (str, Path)) and "\n" not in str(sweep) else None
    return path.read_text(encoding="utf-8") if path is not None and path.is_file() else None


def open_results(folder: str | Path) -> Results:
    """The tables of a run: `.cells`, `.metrics`, `.generations`, `.stages`, `.comparisons`,
    `.searches`, `.aggregated`, `.to_polars(name)`.
    """
    from ftsec_ray.results.read import Results

    return Results.open(Path(folder))


def export(
    sweep: Sweep,
    *,
    store: str | Path = DEFAULT_STORE,
    results: str | Path = DEFAULT_RESULTS,
    out: str | Path | None = None,
    sign: str | Path | None = None,
) -> Path:
    """Pack a sweep, its plan, its versions, its tables and its report into one zip file, and return
    the path of the file.

    Args:
        sweep: A path, a YAML text or a mapping.
        store: Its store; the archive contains the checksums of the artifacts, not the artifacts.
        results: As for `run`; the existing tables are packed unchanged, and the report is made from
            them.
        out: Path of the archive; None: `<sweep name>-<first digits of the plan>.zip` in the working
            directory.
        sign: Private key (Ed25519, OpenSSH format) of the publisher; None: no signature.
    """
    from ftsec_ray.report.page import render
    from ftsec_ray.results.pack import pack, sweep_file
    from ftsec_ray.results.remote_results import local_results
    from ftsec_ray.store.artifact_store import Store

    kept, file = Store.open(store), sweep_file(sweep)
    whole = make_plan(sweep, kept)
    folder = results_folder(local_results(results), whole.spec.name)
    held = open_results(folder)
    if held.meta.get("plan") != whole.digest:
        raise DataError(
            f"the results in {folder} belong to another plan",
            held.meta.get("plan"),
            whole.digest,
            "the sweep, the code or an input has changed; `ftsec run SWEEP` runs the missing stages"
            " and updates the results",
        )
    target = Path(out) if out is not None else Path(f"{whole.spec.name}-{whole.digest[:8]}.zip")
    target.parent.mkdir(parents=True, exist_ok=True)
    return pack(
        whole,
        held,
        render(held),
        file,
        kept.sound(whole.kinds)[1],
        target,
        sign=None if sign is None else Path(sign),
    )


def verify(
    archive: str | Path,
    *,
    base: str | Path = ".",
    store: str | Path | None = None,
    inside: str | Path | None = None,
    signer: str | Path | None = None,
) -> Verification:
    """Check what of an archive differs on this machine: plans its sweep again, computes metrics,
    comparisons and report again, and compares code, packages, inputs, checksums and signature.

    Args:
        archive: An archive of `export`.
        base: Folder at which relative paths of its sweep start.
        store: A store with artifacts of the same stages, to compare their bytes; None: no
            comparison.
        inside: Files that the archive names are opened only inside this folder; None: `base`.
        signer: File with the public keys of accepted signers, one per line as in `id_ed25519.pub`;
            None: no signature is required.
    """
    from ftsec_ray.report.page import render
    from ftsec_ray.results.verify import verify_archive
    from ftsec_ray.store.artifact_store import Store

    return verify_archive(
        Path(archive),
        base=Path(base),
        store=None if store is None else Store.open(store),
        render=render,
        inside=None if inside is None else Path(inside),
        signer=None if signer is None else Path(signer),
    )


def judge_audit(
    results: str | Path | Results,
    *,
    labels: str | Path | None = None,
    exact: bool = False,
    judges: Sequence[str] = (),
) -> Audit:
    """Error rates of the judges of finished results, rates corrected for these errors, and the
    agreement of each pair of judges.

    Args:
        results: A results folder, or the tables of `open_results`.
        labels: A table (.csv, .tsv, .jsonl, .json or .parquet) with `truth` and `prompt_id` or
            `completion_sha256`, optionally restricted by `cell` and `probe`.
        exact: Use the verdicts of the microworld's exact judge as the truth instead.
        judges: Further judges to run on the answers to requests, such as `refusal_phrases`, which
            are audited and compared too.
    """
    from ftsec_ray.results.audit import audit_judges

    held = open_results(results) if isinstance(results, (str, Path)) else results
    return audit_judges(
        held, labels=None if labels is None else Path(labels), exact=exact, judges=judges
    )


def check_claims(results: str | Path | Results) -> list[Finding]:
    """Test the survey's five findings on results, in the survey's order; `ftsec claims --explain`
    prints the rules.
    """
    from ftsec_ray.claims.evidence import Evidence
    from ftsec_ray.claims.findings import CLAIMS, judge
    from ftsec_ray.results.read import Results

    evidence = Evidence(results if isinstance(results, Results) else open_results(results))
    return [judge(claim, evidence) for claim in CLAIMS]


def sweep_schema() -> dict[str, Any]:
    """The JSON schema of a sweep file."""
    from ftsec_ray.config.json_schema import sweep_schema as schema_of

    return schema_of()


def limited(whole: Plan, limit: int | None) -> Plan:
    """The plan of the first `limit` cells."""
    if limit is None or limit >= len(whole.cells):
        return whole
    if limit < 1:
        raise SpecError("the limit leaves no cell", limit, f"integer from 1 to {len(whole.cells)}")
    return plan_of_cells(whole, whole.cells[:limit])


def plan_of_cells(whole: Plan, cells: list[Cell]) -> Plan:
    """The part of a plan for some of its cells."""
    wanted = {stage for cell in cells for stage in cell.stages}
    return Plan(
        whole.spec,
        cells,
        {digest: stage for digest, stage in whole.stages.items() if digest in wanted},
    )


def results_folder(results: str | Path, name: str) -> Path:
    """The folder of a sweep's tables and report; SpecError if the name is not safe as the name of a
    folder.
    """
    from ftsec_ray.config.faults import is_name

    if not is_name(name):
        raise SpecError(
            "the name of the sweep is not valid as a folder name",
            name,
            "lower-case letters, digits and _ . -, starting with a letter or digit",
        )
    return Path(results) / name


def whole_results(whole: Plan, folder: Path) -> Results | None:
    """The results in a folder, if they are complete for this plan: every cell done and every search
    finished; None otherwise.
    """
    try:
        held = open_results(folder)
    except DataError:  # missing, incomplete, or of another version: written again
        return None
    same = (held.meta.get("plan"), held.meta["schema"]) == (whole.digest, SCHEMA_VERSION)
    is_whole = (
        same
        and set(held.cells["status"].to_pylist()) == {"done"}
        and "open" not in held.searches["status"].to_pylist()
    )
    return held if is_whole else None


def check_gpus(spec: SweepSpec) -> None:
    """Raise EnvironmentFault if stages request GPUs that this machine does not have."""
    wanted = spec.resources.gpus_per_stage
    if not spec.resources.wants_gpus:
        return
    import torch

    if not torch.cuda.is_available():
        raise EnvironmentFault(
            "the sweep requests GPUs, and torch finds none on this machine",
            wanted,
            "resources.gpus_per_stage: 0, or a GPU",
            "leave out gpus_per_stage, or use a cluster with GPUs by --address; see `ftsec doctor`",
        )
