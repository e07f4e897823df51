"""The files of a folder that came from somewhere else: plain ones, and none that a link brings in
from outside of it.

Whoever hashes, loads or sends such a folder reads what its author meant it to hold, and never a
file of this machine that a link in it names.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from ftsec_ray.errors import SpecError

_HUB_REPOSITORY = re.compile("(models|datasets|spaces)--.+")


def plain_files(folder: Path, *, skips: Callable[[Path], bool]) -> list[Path]:
    """The files below a folder, sorted; SpecError for a link that leads out of it, and for what is
    neither a file nor a folder.

    A snapshot in the cache of the Hugging Face hub is links into the `blobs` of its repository:
    these are followed.

    Args:
        folder: The folder; it may be named by a link itself.
        skips: Whether the file at a relative path is left out.
    """
    allowed = [folder.resolve(), *_blobs(folder)]
    found: list[Path] = []
    for path in _below(folder, skips):
        if path.is_symlink():
            _check_link(path, folder, allowed)
        elif not stat.S_ISREG(path.lstat().st_mode):
            raise SpecError(
                "neither a file nor a folder in a folder that is read",
                str(path),
                "plain files alone: no pipes, sockets or devices",
                "remove it",
            )
        found.append(path)
    return sorted(found)


def _below(top: Path, skips: Callable[[Path], bool]) -> Iterator[Path]:
    """Whatever is no folder below one; links to folders too, which are not followed."""
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                listed = list(entries)
        except OSError as error:
            raise SpecError(
                "a folder that cannot be read",
                str(folder)[-200:],
                "folders that you may open, with names that the system takes",
                str(error.strerror or error),
            ) from error
        for entry in listed:
            path = Path(entry.path)
            relative = path.relative_to(top)
            if entry.is_dir(follow_symlinks=False):
                if not skips(relative / "file"):
                    waiting.append(path)
            elif not skips(relative):
                yield path


def _blobs(folder: Path) -> list[Path]:
    """Where the files of a snapshot lie, if the folder is one, or in one."""
    here = folder.resolve()
    return [
        snapshots.parent / "blobs"
        for snapshots in here.parents
        if snapshots.name == "snapshots" and _HUB_REPOSITORY.fullmatch(snapshots.parent.name)
    ]


def _check_link(link: Path, folder: Path, allowed: list[Path]) -> None:
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # the second: links in a circle
        raise SpecError(
            "a link that leads nowhere",
            f"{link} -> {link.readlink()}",
            "files, or links to files of the same folder",
            "fetch the file that it stands for, or remove the link",
        ) from error
    if target.is_file() and any(target.is_relative_to(place) for place in allowed):
        return
    is_inside = target.is_relative_to(allowed[0])
    raise SpecError(
        "a link to a folder" if is_inside else "a link that leads out of the folder",
        f"{link.relative_to(folder)} -> {link.readlink()}, in {folder}",
        "files, and links to files of the same folder or, in a cache of the Hugging Face hub, of"
        " its repository's blobs",
        "put a copy of what it leads to in its place (`cp -rL` copies a folder so), after a look at"
        " what that is: a link in a downloaded folder can name any file of this machine",
    )
