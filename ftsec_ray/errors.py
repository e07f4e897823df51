"""The exceptions of this package, and the format of their messages.

    FtsecError
    ├── SpecError         the sweep file is wrong (exit code 2)
    │   ├── SpecFaults    all faults of one sweep file (exit code 2)
    │   └── BudgetError   the sweep would exceed its budget (exit code 2; in plan/cost_estimate.py)
    ├── EnvironmentFault  this machine or cluster cannot run the sweep (exit code 3)
    ├── DataError         a row, a file or a model cannot be read; the stage fails, others go on
    ├── StoreError        an artifact cannot be read or published
    ├── StageError        a stage failed, and a retry would fail again
    └── IdentityError     a value has no canonical JSON

Every message says what is wrong, the value got, what is allowed and how to fix it. Constructor
arguments are positional and equal to `args`, so that every error can be pickled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class FtsecError(Exception):
    """Base of all errors that ftsec_ray raises on purpose."""

    code = "error"
    exit_code = 1

    def __init__(self, what: str, got: object = None, want: str = "", fix: str = "") -> None:
        super().__init__(what, got, want, fix)
        self.what = what
        self.got = got
        self.want = want
        self.fix = fix

    def __str__(self) -> str:
        parts = [f"[{self.code}] {self.what}"]
        if self.got is not None:
            parts.append(f"  got:  {self.got!r}")
        if self.want:
            parts.append(f"  want: {self.want}")
        if self.fix:
            parts.append(f"  fix:  {self.fix}")
        return "\n".join(parts)


class SpecError(FtsecError):
    """An error of a sweep file or of an argument."""

    code = "spec"
    exit_code = 2


class SpecFaults(SpecError):
    """All errors of one sweep file; `faults` holds (place, SpecError) pairs."""

    def __init__(self, source: str, faults: Sequence[tuple[str, SpecError]] = ()) -> None:
        Exception.__init__(self, source, tuple(faults))
        self.what = f"{source} has {len(faults)} error(s)"
        self.got, self.want, self.fix = None, "", ""
        self.source = source
        self.faults = tuple(faults)

    def __str__(self) -> str:
        lines = [f"[{self.code}] {self.what}"]
        for place, fault in self.faults:
            lines.append(f"- {place}: {fault.what}")
            lines += [line for line in str(fault).splitlines()[1:]]
        return "\n".join(lines)


class EnvironmentFault(FtsecError):
    """The machine, the cluster or an installed package cannot run the sweep."""

    code = "environment"
    exit_code = 3


class DataError(FtsecError):
    """A model, a file or a row cannot be read."""

    code = "data"


class StoreError(FtsecError):
    """An artifact cannot be published or read back."""

    code = "store"


class StageError(FtsecError):
    """A stage failed, and a retry would fail again."""

    code = "stage"


class IdentityError(FtsecError):
    """A value has no canonical JSON, which must be the same in every process."""

    code = "identity"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an out-of-memory error, of host or GPU memory."""
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(
            sign in text
            for sign in ("can't allocate memory", "not enough memory", "cuda out of memory")
        )
    )


@contextmanager
def as_data_error() -> Iterator[None]:
    """Turn a SpecError inside a `with` block of a running stage into a DataError, since planning
    has already checked the sweep file.
    """
    try:
        yield
    except SpecError as error:
        raise DataError(*error.args) from error
