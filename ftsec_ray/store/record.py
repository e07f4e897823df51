"""The `record.json` of every artifact, and the checks of a record and its files before they are
read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ftsec_ray.errors import StoreError
from ftsec_ray.identity import DIGEST_CHARS, sha256
from ftsec_ray.success import WITHOUT_ATTACK

RECORD = "record.json"
_PICKLES = re.compile(
    r"\.(pkl|pickle|pt|pth|ckpt|joblib|dill)$|(^|/)(pytorch_model[^/]*|adapter_model|training_args)\.bin$",
    re.IGNORECASE,
)
"""File names that libraries use for pickled objects, and would unpickle."""
RECORD_LIMIT = 32 * 2**20
"""Bytes of a record or of a recorded failure, at most; enough for 100,000 files."""
_WHOLE = ("attempt", "tokens", "peak_bytes", "gpu_peak_bytes")
_COUNTS = ("wall_s", "cpu_s", "gpu_s", "cost_s", "started", "flops", *_WHOLE)
"""Fields that are numbers >= 0; those of `_WHOLE` are integers."""
_RATES = (
    *("filter_tpr", "filter_fpr", "n_poisoned", "n_clean", WITHOUT_ATTACK),
    *("target_nll_before", "target_nll_after", "prompts"),
)
_HASHES = ("train_template_hash", "serve_template_hash")
"""Notes of a stage that tables and warnings use: numbers (`_RATES`), and texts (`_HASHES`)."""
_TEXTS = ("kind", "method", "resource", "host", "code", "error", "error_code")
_MAPS = ("where", "params", "notes", "versions", "files")
_MAX_DIGITS = 40
"""Digits of an integer, at most; a seed has at most 20."""
_DIGEST = re.compile(rf"[0-9a-f]{{{DIGEST_CHARS}}}")


class DamagedArtifact(StoreError):  # noqa: N818 - the name describes the problem
    """An artifact is missing or does not match its record; `got` is its digest. Running its stage
    again repairs it.
    """

    code = "store.damaged"


def checked_digest(digest: str) -> str:
    """The digest itself; StoreError if it is not valid, so that no path leaves the store."""
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise StoreError(
            "not the digest of an artifact",
            digest,
            f"{DIGEST_CHARS} lower-case hex digits",
        )
    return digest


def is_digest(text: str) -> bool:
    """Whether a text has the form of a digest."""
    return _DIGEST.fullmatch(text) is not None


def files_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Relative path -> size and SHA-256 of every file of an artifact's folder, without its record;
    StoreError if a file is not allowed in an artifact.
    """
    listing = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise StoreError(
                "an artifact may contain only regular files and folders",
                str(path),
                "no links, pipes or sockets",
            )
        if member_fault(name) is not None:
            raise StoreError(
                f"this file is not allowed in an artifact: {member_fault(name)}",
                name,
                "tensors as safetensors, tables as Parquet, the rest as JSON",
            )
        if path.is_file() and name != RECORD:
            listing[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return listing


def dumped(record: Mapping[str, Any]) -> str:
    """The JSON text of a record: sorted keys, one value per line."""
    return json.dumps(record, sort_keys=True, indent=1, allow_nan=False) + "\n"


def member_fault(name: str) -> str | None:
    """What is wrong with the name of a file of an artifact: it leads out of the artifact, or it is
    the name of a pickle. None if nothing is wrong.
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
    """What is wrong with the list of files in a record; None if nothing is."""
    files = record.get("files")
    if not isinstance(files, dict):
        return "its record lists no files"
    for name, expected in files.items():
        if not isinstance(expected, dict) or not {"bytes", "sha256"} <= expected.keys():
            return f"its record lacks the size or the checksum of {name}"
        fault = member_fault(name)
        if fault is not None:
            return fault
    return None


def fault_of(folder: Path, record: Mapping[str, Any]) -> str | None:
    """The first difference between a folder and its record; None if all files match."""
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
            return f"the content of {name} has changed"
    return None


def record_of(text: bytes | str, digest: str) -> dict[str, Any]:
    """The record of a digest in a JSON text, with checked types; ValueError says why it is not
    valid.
    """
    record = _parsed(text)
    if not isinstance(record, dict) or record.get("digest") != digest:
        raise ValueError("its record is not the record of this artifact")
    fault = next(filter(None, (_field_fault(name, value) for name, value in record.items())), None)
    fault = fault or _notes_fault(record.get("notes") or {})
    if fault is not None:
        raise ValueError(f"its record has an invalid value of {fault}")
    return record


def verdict_of(text: bytes | str) -> dict[str, Any] | None:
    """The recorded failure in a JSON text, without fields of a wrong type; None if it is not valid,
    so that a damaged file does not stop the collection of results.
    """
    try:
        verdict = _parsed(text)
    except ValueError:
        return None
    if not isinstance(verdict, dict):
        return None
    valid = {name: value for name, value in verdict.items() if _field_fault(name, value) is None}
    return {"error_code": None, "error": None, **valid}


def _parsed(text: bytes | str) -> Any:
    """JSON without NaN and infinities; ValueError if it is not valid or nested too deeply."""
    try:
        return json.loads(text, parse_constant=_number, parse_float=_number, parse_int=_whole)
    except (ValueError, RecursionError, MemoryError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise ValueError(f"its record cannot be read: {why}") from error


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:_MAX_DIGITS]} is not a finite number")
    return number


def _whole(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _field_fault(name: str, value: Any) -> str | None:
    """What is wrong with a field of a record or a recorded failure; None if nothing is."""
    if value is None and name not in _MAPS:
        return None
    if name in _WHOLE:
        good, want = _is_count(value) and isinstance(value, int), "an integer >= 0"
    elif name in _COUNTS:
        good, want = _is_count(value), "a number >= 0"
    elif name in _TEXTS:
        good, want = isinstance(value, str), "a text"
    elif name in _MAPS:
        good, want = isinstance(value, dict), "a mapping"
    else:
        return None
    return None if good else f"{name}: {value!r:.60}, which is not {want}"


def _notes_fault(notes: Mapping[str, Any]) -> str | None:
    info, warnings = notes.get("info") or {}, notes.get("warnings") or []
    if not isinstance(info, dict) or not _is_count(info.get("parameters", 0)):
        return f"notes.info: {info!r:.60}, which has no valid number of parameters"
    if not isinstance(warnings, list):
        return f"notes.warnings: {warnings!r:.60}, which is not a list"
    odd = [name for name in _RATES if not (notes.get(name) is None or _is_count(notes[name]))]
    odd += [name for name in _HASHES if not isinstance(notes.get(name) or "", str)]
    return f"notes.{odd[0]}: {notes[odd[0]]!r:.60}, which has the wrong type" if odd else None


def _is_count(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 <= value < (2**63 if isinstance(value, int) else math.inf)


def damaged(digest: str, fault: str) -> DamagedArtifact:
    """The error for an artifact that must be made again."""
    return DamagedArtifact(
        f"artifact {digest} cannot be used: {fault}",
        digest,
        "files that match their record",
        "nothing to do: its stage runs again automatically",
    )
