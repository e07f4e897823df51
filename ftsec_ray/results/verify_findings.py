"""What a look at an archive finds, put down as it goes on."""

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
"""What values that ftsec never wrote raise in code that reads its own tables."""
NOT_OF_THE_ARCHIVE = (ArchiveError, EnvironmentFault, StoreError)
"""What ends a look all the same: the archive may not be read, or this machine cannot."""


@dataclass
class Findings:
    """What was found of an archive so far, in words."""

    differences: list[tuple[str, str]] = field(default_factory=list)
    """(topic, what differs)."""
    checked: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def add(self, topic: str, words: Iterable[str]) -> None:
        """Put down differences of one topic."""
        self.differences += [(topic, one) for one in words]

    def add_each(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Put down differences of several topics."""
        self.differences += pairs

    @contextmanager
    def hostile(self, topic: str, what: str) -> Iterator[None]:
        """Makes a difference of what the values of a forger raise; not of what exceeds a limit or
        what this machine lacks.
        """
        try:
            yield
        except NOT_OF_THE_ARCHIVE:
            raise
        except HOSTILE as fault:
            told = str(getattr(fault, "what", fault))[:100]
            self.add(topic, [f"{what} cannot be checked: {type(fault).__name__}: {told}"])
