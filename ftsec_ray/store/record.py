"""The `record.json` beside every artifact, and what is checked before anybody reads the files that
it names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ftsec_ray.errors import StoreError
from ftsec_ray.identity import DIGEST_CHARS, sha256

RECORD = "record.json"
_PICKLES = re.compile(
    r"\.(pkl|pickle|pt|pth|ckpt|joblib|dill)$|(^|/)(pytorch_model[^/]*|adapter_model|training_args)\.bin$",
    re.IGNORECASE,
)
"""Names under which libraries keep, and would load, pickled objects."""
_VERDICT: dict[str, type | tuple[type, ...]] = {
    "error_code": str,
    "error": str,
    "host": str,
    "attempt": int,
    "wall_s": (int, float),
}
"""What the columns of a table take of a verdict; a value of another type counts as absent."""
_DIGEST = re.compile(rf"[0-9a-f]{{{DIGEST_CHARS}}}")


class DamagedArtifact(StoreError):  # noqa: N818 - it says what is the matter
    """An artifact that is gone or does not match its record; `got` is its digest, and running its
    stage again repairs it.
    """

    code = "store.damaged"


def checked_digest(digest: str) -> str:
    """The digest itself; StoreError unless it is one, so that no path leaves the store."""
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise StoreError(
            "not the digest of an artifact",
            digest,
            f"{DIGEST_CHARS} hexadecimal digits in lower case",
        )
    return digest


def is_digest(text: str) -> bool:
    """Whether a text is the digest of an artifact."""
    return _DIGEST.fullmatch(text) is not None


def files_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of an artifact's folder, by relative path; the record itself
    is left out.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise StoreError(
                "an artifact may hold plain files and folders only",
                str(path),
                "no links, no sockets",
            )
        if member_fault(name) is not None:
            raise StoreError(
                f"a file that no artifact may hold: {member_fault(name)}",
                name,
                "tensors as safetensors, tables as Parquet, the rest as JSON",
            )
        if path.is_file() and name != RECORD:
            found[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return found


def dumped(record: Mapping[str, Any]) -> str:
    """The text of a record: sorted keys, one value per line, so that people can read and compare
    it.
    """
    return json.dumps(record, sort_keys=True, indent=1, allow_nan=False) + "\n"


def member_fault(name: str) -> str | None:
    """What is wrong with the name of a file of an artifact; None when it stays inside and nobody
    would unpickle it.
    """
    path = PurePosixPath(name)
    if (
        not name
        or path.is_absolute()
        or ".." in path.parts
        or path.as_posix() != name
        or not name.isprintable()
        or "\\" in name
    ):
        return f"its record names a path outside of it: {name}"
    return f"{name} is the name of a pickle" if _PICKLES.search(name) else None


def listing_fault(record: Mapping[str, Any]) -> str | None:
    """What is wrong with the list of files in a record; None when every entry can be used
    as it is.
    """
    files = record.get("files")
    if not isinstance(files, dict):
        return "its record lists no files"
    for name, expected in files.items():
        if not isinstance(expected, dict) or not {"bytes", "sha256"} <= expected.keys():
            return f"its record does not say what {name} holds"
        fault = member_fault(name)
        if fault is not None:
            return fault
    return None


def fault_of(folder: Path, record: Mapping[str, Any]) -> str | None:
    """What of a folder does not match its record; None when every file does and there is no
    other.
    """
    fault = listing_fault(record)
    if fault is not None:
        return fault
    files = record["files"]
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            return f"{name} is a link"
        if (
            name not in files
            and name != RECORD
            and not path.name.startswith(".")
            and not path.is_dir()
        ):
            return f"{name} is not in its record"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if sha256(path) != expected["sha256"]:
            return f"the bytes of {name} have changed"
    return None


def verdict_of(text: str) -> dict[str, Any] | None:
    """The verdict in a text; None where it is not one, so that a damaged verdict hides no cell."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    held = {
        name: value
        for name, value in found.items()
        if isinstance(value, _VERDICT.get(name, object)) and not isinstance(value, bool)
    }
    return {"error_code": None, "error": None, **held}


def damaged(digest: str, fault: str) -> DamagedArtifact:
    """The error for an artifact that must be made again."""
    return DamagedArtifact(
        f"artifact {digest} cannot be used: {fault}",
        digest,
        "files that match their record",
        "nothing by hand: its stage runs again",
    )
