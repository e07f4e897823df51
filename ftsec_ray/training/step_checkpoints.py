"""Step checkpoints of a fine-tune: written so that one always survives a power loss, and used only
if they are complete.

    <work folder>/step-<optimizer step>/state.safetensors   weights, moments, the methods' memory
    <work folder>/step-<optimizer step>/state.json          step, losses, tokens, and checksums of
                                                            both files

The two newest are kept: if the last one is damaged, training resumes from the one before it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftsec_ray.durable import FULL, is_full, make_folder, plain_bytes, settle
from ftsec_ray.identity import sha256
from ftsec_ray.training.setup import Saved, Step

if TYPE_CHECKING:
    from torch import Tensor

KEPT = 2
"""Number of checkpoints kept."""
_TENSORS, _STATE = "state.safetensors", "state.json"
_STATE_LIMIT = 256 * 2**20
"""Maximum size of a `state.json`: enough for ten million losses."""
_NAME = re.compile(r"step-(\d{8,})")
_LOG = logging.getLogger("ftsec_ray.training")


def save_checkpoint(
    workdir: Path,
    tensors: Mapping[str, Tensor],
    step: Step,
    *,
    losses: Sequence[float],
    tokens: int,
) -> None:
    """Write a step under a temporary name, sync it, rename it; then remove older checkpoints. A
    process without tensors writes nothing.
    """
    if not tensors:
        return
    tensors = {**tensors, **{f"memory/{key}": value for key, value in step.memory.items()}}
    state = {"index": step.index, "total": step.total, "losses": list(losses), "tokens": tokens}
    final = workdir / f"step-{step.index:08d}"
    _remove(final)  # an incomplete one with this name
    try:
        _write(final, tensors, state)
    except Exception as error:
        older = _steps(workdir)
        if not _is_full(error) or len(older) < KEPT:
            raise
        for path in older[1:]:  # space for the new one matters more than a second old one
            _remove(path)
        _write(final, tensors, state)
    for path in _steps(workdir)[KEPT:]:
        _remove(path)


def _is_full(error: Exception) -> bool:
    """Whether the disk was full; safetensors reports it only as text."""
    if isinstance(error, OSError) and is_full(error):
        return True
    return any(f"os error {code}" in str(error) for code in FULL)


def _write(final: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    part = final.with_name(f".{final.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        make_folder(part)
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in tensors.items()},
            part / _TENSORS,
        )
        signed = {**state, "tensors": sha256(part / _TENSORS)}
        text = json.dumps({**signed, "state": _checksum(signed)})
        (part / _STATE).write_text(text, encoding="utf-8")
        settle(part, final)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def newest_checkpoint(workdir: Path, steps: int, trainable: Mapping[str, Tensor]) -> Saved | None:
    """The last complete checkpoint, if there is one; damaged ones are removed with a warning.

    Args:
        workdir: The work folder of the stage.
        steps: Optimizer steps of the whole fine-tune.
        trainable: The full trainable weights, by name.
    """
    for path in _steps(workdir):
        try:
            return _read(path, steps, trainable)
        except (OSError, ValueError) as error:
            _LOG.warning(
                "warning: a step checkpoint is damaged and was removed: %r: %s; training resumes"
                " from the previous checkpoint, or from the start",
                str(path),
                str(error).splitlines()[0] if str(error) else type(error).__name__,
            )
            _remove(path)
    return None


def _read(path: Path, steps: int, trainable: Mapping[str, Tensor]) -> Saved:
    """A checkpoint; ValueError or OSError with what is wrong with it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.is_symlink():
        raise ValueError("it is a symbolic link")
    state = _state(path / _STATE)
    index, losses = state["index"], state["losses"]
    if state["total"] != steps or path.name != f"step-{index:08d}" or not 0 < index < steps:
        raise ValueError(f"it is step {index} of {state['total']}, and this fine-tune has {steps}")
    if len(losses) != index or not all(
        isinstance(loss, float) and math.isfinite(loss) for loss in losses
    ):
        raise ValueError(f"{_STATE} does not have a finite loss for each step")
    tensors = path / _TENSORS
    if tensors.is_symlink() or not tensors.is_file():
        raise ValueError(f"{_TENSORS} is missing, or not a regular file")
    if sha256(tensors) != state["tensors"]:
        raise ValueError(f"the bytes of {_TENSORS} have changed")
    try:
        loaded = load_file(tensors)
    except SafetensorError as error:
        raise ValueError(f"{_TENSORS}: {error}") from error
    _check_shapes(loaded, trainable)
    return Saved(state, loaded)


def _state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(plain_bytes(path, _STATE_LIMIT))
    except RecursionError as error:
        raise ValueError(f"{path.name} is nested too deeply") from error
    if not isinstance(state, dict) or state.pop("state", None) != _checksum(state):
        raise ValueError(f"the bytes of {path.name} have changed")
    types = {"index": int, "total": int, "losses": list, "tokens": int, "tensors": str}
    for name, kind in types.items():
        if type(state.get(name)) is not kind:
            raise ValueError(f"{path.name} has no valid {name!r}")
    return state


def _checksum(state: Mapping[str, Any]) -> str:
    """Checksum of a state without its own checksum."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _check_shapes(loaded: Mapping[str, Tensor], trainable: Mapping[str, Tensor]) -> None:
    for name, parameter in trainable.items():
        for part in ("weight", "m", "v"):
            held = loaded.get(f"{part}/{name}")
            if held is None or held.shape != parameter.shape:
                shape = None if held is None else tuple(held.shape)
                raise ValueError(f"{part}/{name} is {shape}, not {tuple(parameter.shape)}")
        if f"t/{name}" not in loaded:
            raise ValueError(f"t/{name} is missing")


def _steps(workdir: Path) -> list[Path]:
    """Files and folders with the name of a checkpoint, the newest first."""
    try:
        found = [path for path in workdir.iterdir() if _NAME.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(found, key=lambda path: (len(path.name), path.name), reverse=True)


def _remove(path: Path) -> None:
    """Remove a checkpoint after renaming it, so that a process that copies it sees all of it or
    nothing.
    """
    gone = path.with_name(f".{path.name}.old")
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(OSError):
        path.rename(gone)
    for left in (gone, path):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            with suppress(OSError):
                left.unlink(missing_ok=True)
