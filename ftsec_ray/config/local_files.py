"""Texts of a sweep that name files of this machine."""

from __future__ import annotations

from pathlib import Path

from ftsec_ray.config.faults import Faults


def looks_local(text: str) -> bool:
    """Whether a text can only be a path, there or not: it begins as one, or ends with `.gguf`."""
    return text.startswith((".", "/", "~")) or text.endswith(".gguf")


def named_path(given: str, base: Path, place: str, faults: Faults) -> Path | None:
    """The path that a text names, there or not; None with a fault where no system call takes it.

    Args:
        given: The text; `~` is a home folder.
        base: Folder at which a relative path starts.
        place: Of the text in the sweep.
        faults: Takes what is wrong.
    """
    try:
        path = Path(given).expanduser()
        path = path if path.is_absolute() else base / path
        path.resolve()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        faults.add(place, "a path that cannot be opened", given, "the path of a file here", why)
        return None
    return path
