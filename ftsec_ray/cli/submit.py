"""`ftsec submit`: run a sweep as a job on a Ray cluster, and print how to follow it, or wait for
it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ftsec_ray import api
from ftsec_ray.cli.console import INTERRUPTED, say, shown
from ftsec_ray.schedule.jobs import Job
from ftsec_ray.schedule.upload import Upload

_COLUMNS = 80


def submit_sweep(
    sweep: Path,
    *,
    wait: bool,
    address: str | None,
    store: str | None,
    results: str | None,
    workers: int | None,
    limit: int | None,
    submission_id: str | None,
    package: bool | None,
    shared_disk: bool,
) -> int:
    """Submit a sweep and return the exit code: that of the job when it is waited for, else 0.

    The id goes to stdout, or the job's log where it is waited for; everything else to stderr.
    """
    job = api.submit(
        sweep,
        address=address,
        store=store,
        results=results,
        workers=workers,
        limit=limit,
        submission_id=submission_id,
        package=package,
        shared_disk=shared_disk,
        before_sending=_print_files,
    )
    size = f"{job.sent_bytes / 1024:.0f} KiB uploaded" + (
        ", including this ftsec_ray" if job.has_package else ""
    )
    say(
        f"submitted to {job.head.address} (Ray {job.head.ray_version}, {len(job.head.nodes)}"
        f" node(s)), {size}",
        err=True,
    )
    say(f"store: {job.store}", err=True)
    say(f"results: {job.results}", err=True)
    if not wait:
        _print_commands(job)
        say(job.id)
        return 0
    say(f"job: {job.id}", err=True)
    try:
        return job.wait(_print_log)
    except KeyboardInterrupt:
        say(f"\nno longer waiting; the job {job.id} continues", err=True)
        _print_commands(job)
        return INTERRUPTED


def _print_files(sent: Upload) -> None:
    say("files to upload:", err=True)
    for line in sent.listed(_COLUMNS):
        say(line, err=True)


def _print_commands(job: Job) -> None:
    for what, command in job.commands().items():
        say(f"{what}: {command}", err=True)


def _print_log(text: str) -> None:
    sys.stdout.write(shown(text.replace("\r\n", "\n")))
    sys.stdout.flush()
