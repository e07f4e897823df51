"""Ids and revisions of models and data sets on the Hugging Face hub: revisions are commits, and
nothing that moves.
"""

from __future__ import annotations

import re

from ftsec_ray.config.faults import Faults

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def is_hub_id(text: str) -> bool:
    """Whether a text is `owner/name`, as the hub takes it."""
    return _HUB_ID.fullmatch(text) is not None and "--" not in text and ".." not in text


def is_commit(revision: object) -> bool:
    """Whether a revision is the hash of a commit."""
    return isinstance(revision, str) and _COMMIT.fullmatch(revision) is not None


def check_revision(revision: object, place: str, faults: Faults) -> None:
    """A fault where a revision is given and is no commit."""
    if revision is not None and not is_commit(revision):
        faults.add(
            place,
            "not a commit",
            revision,
            "40 hex digits, lower case",
            "a branch or tag moves; the files page of the model or data set names its commit",
        )
