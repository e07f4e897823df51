"""Revisions of models and data sets on the Hugging Face hub: commits, and nothing that moves."""

from __future__ import annotations

import re

from ftsec_ray.config.faults import Faults

_COMMIT = re.compile(r"[0-9a-f]{40}")


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
