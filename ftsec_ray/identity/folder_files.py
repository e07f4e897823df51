"""Lists the files of an untrusted folder: only regular files, and no links that lead out of it.

So hashing, loading or uploading such a folder never reads other files of this machine through a
link.
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
    """The files in a folder and its subfolders, sorted; SpecError for a link that leads out of it,
    and for anything that is neither a file nor a folder.

    A snapshot in the cache of the Hugging Face Hub consists of links to the `blobs` of its
    repository; these are followed.

    Args:
        folder: The folder; it may be a link itself.
        skips: Whether the file at a relative path is left out.
    """
    allowed = [folder.resolve(), *_blobs(folder)]
    files: list[Path] = []
    for path in _below(folder, skips):
        if path.is_symlink():
            _check_link(path, folder, allowed)
        elif not stat.S_ISREG(path.lstat().st_mode):
            raise SpecError(
                "the folder contains something that is neither a file nor a folder",
                str(path),
                "only regular files: no pipes, sockets or devices",
                "remove it",
            )
        files.append(path)
    return sorted(files)


def _below(top: Path, skips: Callable[[Path], bool]) -> Iterator[Path]:
    """All entries below a folder that are not folders; links to folders are not followed."""
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                listed = list(entries)
        except OSError as error:
            raise SpecError(
                "cannot read this folder",
                str(folder)[-200:],
                "a folder that this user can read, with a path that the system accepts",
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
    """The blobs of the repository, if the folder is a snapshot of the Hub or in one."""
    here = folder.resolve()
    return [
        snapshots.parent / "blobs"
        for snapshots in here.parents
        if snapshots.name == "snapshots" and _HUB_REPOSITORY.fullmatch(snapshots.parent.name)
    ]


def _check_link(link: Path, folder: Path, allowed: list[Path]) -> None:
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a cycle of links
        raise SpecError(
            "a broken link",
            f"{link} -> {link.readlink()}",
            "files, or links to files of the same folder",
            "download its target, or remove the link",
        ) from error
    if target.is_file() and any(target.is_relative_to(place) for place in allowed):
        return
    is_inside = target.is_relative_to(allowed[0])
    raise SpecError(
        "a link to a folder" if is_inside else "a link that leads out of the folder",
        f"{link.relative_to(folder)} -> {link.readlink()}, in {folder}",
        "files, or links to files of the same folder (in the cache of the Hugging Face Hub: to the"
        " blobs of its repository)",
        "check the target first: a link in a downloaded folder can point to any file of this"
        " machine. Then replace the link by a copy (`cp -rL` copies a folder this way)",
    )
