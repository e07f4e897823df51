"""Passes errors between processes as JSON, for error classes that cannot be pickled."""

from __future__ import annotations

import traceback
from collections.abc import Mapping

from ftsec_ray import errors
from ftsec_ray.errors import FtsecError, StageError
from ftsec_ray.execute.unit import code_of
from ftsec_ray.redact import redacted


class _Verbatim(str):
    """The `got` of an error as the worker printed it; printed again without quotes."""

    __repr__ = str.__str__


def error_to_json(error: Exception) -> dict[str, str]:
    """An error as text, for `error_from_json`."""
    trace = redacted("".join(traceback.format_exception(error)))
    if not isinstance(error, FtsecError):
        code = code_of(error)
        return {
            "class": "MemoryError" if code == "oom" else code,
            "what": redacted(str(error)),
            "trace": trace,
        }
    got = {} if error.got is None else {"got": redacted(repr(error.got))}
    return {
        "class": type(error).__name__,
        "what": redacted(error.what),
        **got,
        "want": redacted(error.want),
        "fix": redacted(error.fix),
        "trace": trace,
    }


def error_from_json(plain: Mapping[str, str]) -> Exception:
    """An error with the same message as the one that was given to `error_to_json`."""
    cls = getattr(errors, plain["class"], None)
    error: Exception
    if isinstance(cls, type) and issubclass(cls, FtsecError):
        error = cls(
            plain["what"],
            _Verbatim(plain["got"]) if "got" in plain else None,
            plain["want"],
            plain["fix"],
        )
    elif plain["class"] == "MemoryError":
        error = MemoryError(plain["what"])
    else:
        error = StageError(
            f"{plain['class']}: {plain['what']}",
            None,
            "a method that crafts every block without an error",
            "fix the error; the traceback of the worker follows",
        )
    error.add_note(plain["trace"])
    return error
