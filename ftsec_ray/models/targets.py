"""Which linear layers get an adapter, by name: used when a sweep is planned, without torch, and
again on the loaded model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

ALL_LINEAR = "all-linear"
Targets = str | tuple[str, ...]
"""`all-linear`, a pattern that matches full paths, or names: the last parts of paths."""


class TargetFault(NamedTuple):
    """Why no adapter can be attached to the layers that a sweep names."""

    what: str
    got: object
    want: str


def layer_of(path: str) -> int | None:
    """Index of the transformer block of a layer; None outside the blocks."""
    match = re.search(r"\.(\d+)\.", path)
    return int(match.group(1)) if match else None


def targeted(
    paths: Iterable[str], targets: Targets, layers: Sequence[int] | None = None
) -> list[str]:
    """The paths of the linear layers that get an adapter, in their order."""
    return [
        path
        for path in paths
        if _is_named(path, targets) and (layers is None or layer_of(path) in layers)
    ]


def target_fault(
    paths: Sequence[str], targets: Targets, layers: Sequence[int] | None = None
) -> TargetFault | None:
    """What matches no linear layer of a model; None if everything matches."""
    names = " | ".join(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))
    unmatched: tuple[str, ...] = targets if isinstance(targets, tuple) else (targets,)
    for target in unmatched:
        single = targets if isinstance(targets, str) else (target,)
        if not targeted(paths, single):
            return TargetFault("training.targets matches no linear layer", target, names)
    blocks = {layer for path in paths if (layer := layer_of(path)) is not None}
    outside = [layer for layer in layers or () if layer not in blocks]
    if outside:
        want = f"{min(blocks)} to {max(blocks)}" if blocks else "no `layers`: it has no blocks"
        return TargetFault(
            "training.layers names blocks that the model does not have", outside, want
        )
    if not targeted(paths, targets, layers):
        return TargetFault(
            "no linear layer of training.targets is in the blocks of training.layers",
            targets if isinstance(targets, str) else list(targets),
            names,
        )
    return None


def _is_named(path: str, targets: Targets) -> bool:
    if targets == ALL_LINEAR:
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in targets)
