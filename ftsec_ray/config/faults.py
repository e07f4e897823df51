"""Collects the faults of a sweep file, so that its author sees all of them at once.

A place is written as in the file: `attacks[1].badnets.rate`. A sweep that was read from text adds
the line number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from ftsec_ray.errors import SpecError, SpecFaults

NAME_PATTERN = r"[a-z0-9][a-z0-9_.-]*"
"""Names of sweeps, models and tasks: they become folder names, so they must not lead out of the
results folder.
"""


@dataclass
class Faults:
    """All faults of one sweep."""

    source: str
    """Name of the file, shown in the message."""
    lines: Mapping[str, int] = field(default_factory=dict)
    """Place -> line number in the file."""
    found: list[tuple[str, SpecError]] = field(default_factory=list)

    def add(self, place: str, what: str, got: object = None, want: str = "", fix: str = "") -> None:
        """Record one fault."""
        line = self._line(place)
        self.found.append(
            (place, SpecError(f"{what} (line {line})" if line else what, got, want, fix))
        )

    def add_error(self, place: str, error: SpecError) -> None:
        """Record a fault that another module raised."""
        if isinstance(error, SpecFaults):
            self.found += [(f"{place}: {inner}", fault) for inner, fault in error.faults]
        else:
            self.add(place, error.what, error.got, error.want, error.fix)

    def check(self) -> None:
        """Raise SpecFaults if there is any fault."""
        if self.found:
            self.found.sort(key=lambda item: self._line(item[0]) or 0)
            raise SpecFaults(self.source, self.found)

    def _line(self, place: str) -> int | None:
        while place and place not in self.lines:
            place = place[: max(place.rfind("."), place.rfind("["), 0)]
        return self.lines.get(place)


def nearest(name: object, known: Iterable[str], otherwise: str = "") -> str:
    """A did-you-mean for a misspelt name; `otherwise` if no known name is similar."""
    near = get_close_matches(str(name), list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise


def is_name(value: object, *, also: str = "") -> bool:
    """Whether a value is safe as the name of a folder."""
    return (
        isinstance(value, str)
        and re.fullmatch(NAME_PATTERN.replace("_.-", f"_.{also}-"), value) is not None
        and ".." not in value
    )


def name_or_none(value: object, place: str, faults: Faults, *, also: str = "") -> str | None:
    """The value if it is safe as the name of a folder, else None and a fault; `also` lists extra
    characters that are allowed.
    """
    if is_name(value, also=also):
        return str(value)
    faults.add(
        place,
        "not a name",
        value,
        f"lower-case letters, digits and _ . {also} -, starting with a letter or digit".replace(
            "  ", " "
        ),
        "the name is used as a folder name in the results",
    )
    return None
