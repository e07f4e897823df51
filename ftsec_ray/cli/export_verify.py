"""`ftsec export` and `ftsec verify`: a finished sweep in one file, and how its results differ when
they are computed here.
"""

from __future__ import annotations

import sys
import textwrap
from dataclasses import asdict
from pathlib import Path

from ftsec_ray import api
from ftsec_ray.cli.console import say, say_json, shown, stdout
from ftsec_ray.identity import sha256
from ftsec_ray.results.archive_limits import within_memory
from ftsec_ray.schedule.job_paths import is_uri


def export_sweep(
    sweep: Path, *, store: str, results: str, out: Path | None, sign: Path | None
) -> None:
    """Write the archive, and print where it is and the checksum to publish beside it."""
    target = api.export(sweep, store=store, results=results, out=out, sign=sign)
    say(f"{target}  {target.stat().st_size / 2**20:.2f} MiB")
    say(f"sha256: {sha256(target)}")


def verify_archive(
    archive: Path,
    *,
    base: Path,
    store: str,
    inside: Path | None,
    signer: Path | None,
    as_json: bool,
) -> int:
    """Print what differs, what agrees and what cannot be checked, and return the exit code: 0
    when all that was checked agrees, 1 otherwise.
    """
    with within_memory():
        found = api.verify(
            archive,
            base=base,
            store=store if is_uri(store) or Path(store).is_dir() else None,
            inside=inside,
            signer=signer,
        )
    if as_json:
        say_json({**asdict(found), "is_equal": found.is_equal})
        return 0 if found.is_equal else 1
    for topic, what in found.differences:
        _say(f"{topic}: {what}")
    for what in found.checked:
        _say(f"agrees: {what}")
    for what in found.unchecked:
        _say(f"not checked: {what}")
    for note in found.notes:
        say(shown(f"note: {note}", one_line=True), err=True)
    topics = dict.fromkeys(topic for topic, _ in found.differences)
    said = (
        "no differences in what was checked"
        if found.is_equal
        else f"differences: {', '.join(topics)}"
    )
    _say(f"{found.sweep}: {found.cells} cells, {found.stages} stages; {said}")
    return 0 if found.is_equal else 1


def _say(text: str) -> None:
    """One finding: a line by itself in a file or pipe, folded between words on a terminal."""
    text = shown(text, one_line=True)
    if not sys.stdout.isatty():
        say(text)
        return
    say(textwrap.fill(text, stdout().width, subsequent_indent="  ", break_long_words=False))
