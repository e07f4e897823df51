"""`ftsec export` and `ftsec verify`: a finished sweep in one file, and what of it would differ
here.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ftsec_ray import api
from ftsec_ray.cli.console import say, say_json
from ftsec_ray.identity import sha256
from ftsec_ray.schedule.job_paths import is_uri


def export_sweep(sweep: Path, *, store: str, results: str, out: Path | None) -> None:
    """Write the archive, and print where it is and the checksum to publish beside it."""
    target = api.export(sweep, store=store, results=results, out=out)
    say(f"{target}  {target.stat().st_size / 2**20:.2f} MiB")
    say(f"sha256: {sha256(target)}")


def verify_archive(archive: Path, *, base: Path, store: str, as_json: bool) -> int:
    """Print what would differ here and return the exit code: 0 when nothing would, 1 otherwise."""
    found = api.verify(
        archive, base=base, store=store if is_uri(store) or Path(store).is_dir() else None
    )
    if as_json:
        say_json({**asdict(found), "is_equal": found.is_equal})
        return 0 if found.is_equal else 1
    for topic, what in found.differences:
        say(f"{topic}: {what}")
    for note in found.notes:
        say(f"note: {note}", err=True)
    topics = dict.fromkeys(topic for topic, _ in found.differences)
    said = "nothing would differ here" if found.is_equal else f"differs here: {', '.join(topics)}"
    say(f"{found.sweep}: {found.cells} cells, {found.stages} stages; {said}")
    return 0 if found.is_equal else 1
