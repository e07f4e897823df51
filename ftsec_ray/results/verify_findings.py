"""Collects the findings of a verification."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyarrow as pa
from jinja2 import TemplateError

from ftsec_ray.errors import EnvironmentFault, FtsecError, StoreError
from ftsec_ray.results.archive_limits import ArchiveError

HOSTILE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    FtsecError,
    LookupError,
    OSError,
    RecursionError,
    TemplateError,
    TypeError,
    ValueError,
    pa.ArrowException,
)
"""Exceptions that values not written by ftsec cause in code that reads its tables."""
NOT_OF_THE_ARCHIVE = (ArchiveError, EnvironmentFault, StoreError)
"""Exceptions that end a verification: the archive may not be read, or this machine cannot."""


@dataclass
class Findings:
    """The findings about an archive so far."""

    differences: list[tuple[str, str]] = field(default_factory=list)
    """(topic, what differs)."""
    checked: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def add(self, topic: str, words: Iterable[str]) -> None:
        """Record differences of one topic."""
        self.differences += [(topic, text) for text in words]

    def add_each(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Record differences of several topics."""
        self.differences += pairs

    @contextmanager
    def hostile(self, topic: str, what: str) -> Iterator[None]:
        """Turns exceptions caused by forged values into a difference; not those about limits or
        about this machine.
        """
        try:
            yield
        except NOT_OF_THE_ARCHIVE:
            raise
        except HOSTILE as fault:
            reason = str(getattr(fault, "what", fault))[:100]
            self.add(topic, [f"{what} cannot be checked: {type(fault).__name__}: {reason}"])
