"""Values of a sweep file that name local files."""

from __future__ import annotations

from pathlib import Path

from ftsec_ray.config.faults import Faults


def looks_local(text: str) -> bool:
    """Whether a text is a path by its form, even if it does not exist: it starts with `.`, `/` or
    `~`, or ends with `.gguf`.
    """
    return text.startswith((".", "/", "~")) or text.endswith(".gguf")


def named_path(given: str, base: Path, place: str, faults: Faults) -> Path | None:
    """The path that a text names, whether or not it exists; None and a fault if the operating
    system rejects it.

    Args:
        given: The text; `~` is expanded.
        base: Folder at which a relative path starts.
        place: Place of the text in the sweep file.
        faults: Collects the faults.
    """
    try:
        path = Path(given).expanduser()
        path = path if path.is_absolute() else base / path
        path.resolve()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        faults.add(place, "not a valid path", given, "the path of a local file", why)
        return None
    return path
