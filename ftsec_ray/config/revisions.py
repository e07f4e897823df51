"""Ids and revisions of models and data sets on the Hugging Face Hub. A revision must be a commit:
branches and tags can change.
"""

from __future__ import annotations

import re

from ftsec_ray.config.faults import Faults

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def is_hub_id(text: str) -> bool:
    """Whether a text is a valid `owner/name` of the Hub."""
    return _HUB_ID.fullmatch(text) is not None and "--" not in text and ".." not in text


def is_commit(revision: object) -> bool:
    """Whether a revision is a full commit hash (40 hex digits)."""
    return isinstance(revision, str) and _COMMIT.fullmatch(revision) is not None


def check_revision(revision: object, place: str, faults: Faults) -> None:
    """A fault for a revision that is given but is not a commit."""
    if revision is not None and not is_commit(revision):
        faults.add(
            place,
            "not a commit",
            revision,
            "40 lower-case hex digits",
            "a branch or tag can change; copy the commit hash from the model's or data set's page",
        )
