"""The files that are uploaded with a job: the sweep file, the files that it names by relative path,
and on request this package.

They are packed into one zip without time stamps: equal content gives equal bytes, which Ray uploads
only once. The files keep their relative locations, and the sweep file is unchanged. Files that a
sweep names by absolute path are not uploaded: such a path must exist on the nodes.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ftsec_ray.config.faults import Faults
from ftsec_ray.config.sweep import SweepSpec
from ftsec_ray.config.yaml_text import read_yaml
from ftsec_ray.errors import EnvironmentFault, SpecError
from ftsec_ray.identity.folder_files import plain_files
from ftsec_ray.plan.judge_origin import local_judges
from ftsec_ray.schedule.key_files import refuse_keys

LIMIT_BYTES = 100 * 2**20
"""Ray's limit for the size of an upload."""
PACKAGE = Path(__file__).resolve().parents[1]
_NO_DATE = (1980, 1, 1, 0, 0, 0)
_SHOWN = 3
_LISTED = 100


@dataclass(frozen=True, kw_only=True)
class Upload:
    """The files of a job, by their path in its working directory."""

    sweep: str
    """Path of the sweep file in the working directory."""
    files: Mapping[str, Path]
    left_out: tuple[str, ...]
    """Local models and rows that are not uploaded: the sweep names them by absolute path."""
    has_package: bool

    @property
    def bytes(self) -> int:
        """Total size of the files in bytes, uncompressed."""
        return sum(path.stat().st_size for path in self.files.values())

    def listed(self, columns: int) -> list[str]:
        """One line per file with its size and path, at most `columns` wide; one line for the
        package, and one for all files after the first 100.
        """
        ours = f"{PACKAGE.name}/"
        sizes = {name: path.stat().st_size for name, path in sorted(self.files.items())}
        packaged = [name for name in sizes if self.has_package and name.startswith(ours)]
        own = [name for name in sizes if not (self.has_package and name.startswith(ours))]
        lines = [_line(sizes[name], name, columns) for name in own[:_LISTED]]
        groups = [("more files", own[_LISTED:])]
        groups.append((f"files of {ours}", packaged))
        for what, names in groups:
            if names:
                size = sum(sizes[name] for name in names)
                lines.append(_line(size, f"{len(names)} {what}", columns))
        return lines

    def write(self, target: Path) -> Path:
        """Pack the files into a zip that depends only on their content; EnvironmentFault if they
        are too large.
        """
        if self.bytes > LIMIT_BYTES:
            largest = sorted(self.files.items(), key=lambda item: -item[1].stat().st_size)[:_SHOWN]
            raise EnvironmentFault(
                "the sweep and its files are too large to upload",
                f"{self.bytes / 2**20:.0f} MiB, the largest files are"
                f" {', '.join(name for name, _ in largest)}",
                f"at most {LIMIT_BYTES / 2**20:.0f} MiB",
                "give large models by Hugging Face id, or by an absolute path that all nodes mount"
                " (--shared-disk)",
            )
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, path in sorted(self.files.items()):
                entry = zipfile.ZipInfo(name, _NO_DATE)
                entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
                with path.open("rb") as source, archive.open(entry, "w") as sink:
                    shutil.copyfileobj(source, sink)
        return target


def is_checkout(package: Path = PACKAGE) -> bool:
    """Whether this package runs from a checkout or an editable install, so that nodes cannot get
    the same code by `pip install`.
    """
    return not any(
        package.is_relative_to(Path(sysconfig.get_path(name)).resolve())
        for name in ("purelib", "platlib")
    )


def upload_of(sweep: Path, spec: SweepSpec, *, package: bool) -> Upload:
    """The files to upload for a sweep.

    Args:
        sweep: The sweep file.
        spec: The sweep.
        package: Whether to add this machine's ftsec_ray.
    """
    base = sweep.parent.resolve()
    local = local_paths(spec)
    texts = texts_in(read_yaml(sweep.read_text(encoding="utf-8"), Faults(str(sweep))))
    # A link inside the folder keeps its own path, which the sweep file names.
    relative = sorted({path for path in _relative(texts, base) if path.resolve() in local})
    root = Path(os.path.commonpath([base, *(path.parent for path in relative)]))
    files = {_name(sweep.name, base, root): base / sweep.name}
    for path in relative:
        _check_place(path, root)
        files.update({_name(file, path.parent, root): file for file in _files_of(path)})
    refuse_keys(files)
    if package:
        files.update(
            {
                f"{PACKAGE.name}/{path.relative_to(PACKAGE).as_posix()}": path
                for path in _files_of(PACKAGE)
            }
        )
    left_out = (
        *sorted(str(path) for path in local.difference(path.resolve() for path in relative)),
    )
    return Upload(
        sweep=_name(sweep.name, base, root), files=files, left_out=left_out, has_package=package
    )


def local_paths(spec: SweepSpec) -> set[Path]:
    """The local files and folders of a sweep's models, tasks and judges."""
    sources = [
        source for model in spec.models for source in (model.source, model.unaligned) if source
    ]
    paths = [source.path for task in spec.tasks for _, source in task.splits if source.path]
    judges = [str(path) for _, path in local_judges(spec)]
    return {
        Path(local).expanduser().resolve()
        for local in (*sources, *paths, *judges)
        if Path(local).expanduser().is_absolute()
    }


def texts_in(value: object) -> Iterator[str]:
    """All strings in the values of a sweep file."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from texts_in(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from texts_in(item)


def _relative(texts: Iterator[str], base: Path) -> Iterator[Path]:
    """The texts read as paths relative to `base`; most of them are not paths."""
    for text in texts:
        if text and "\n" not in text and "\0" not in text and not text.startswith(("/", "~")):
            yield Path(os.path.normpath(base / text))
            _, colon, source = text.partition(":")
            if colon and source and not source.startswith(("/", "~")):  # a judge `name:<model>`
                yield Path(os.path.normpath(base / source))


def _check_place(path: Path, root: Path) -> None:
    """Raise SpecError if a link on the path leads out of the uploaded folder."""
    target = path.resolve()
    if not target.is_relative_to(root.resolve()):
        raise SpecError(
            "a link leads out of the folder that would be uploaded",
            f"{path} -> {target}",
            f"files below {root}",
            "check the target first: a link in a downloaded folder can point to any file of this"
            " machine. Then replace the link by a copy, or give the absolute path (--shared-disk)",
        )


def _files_of(path: Path) -> list[Path]:
    """A file, or the files of a folder without hidden files and caches; SpecError if a link leads
    out of the folder.
    """
    return [path] if path.is_file() else plain_files(path, skips=_is_left)


def _is_left(relative: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in relative.parts)


def _line(size: int, name: str, columns: int) -> str:
    """A size in KiB and a name, shortened in the middle if it is too long."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
    size_text = f"{size / 1024:>10,.1f} KiB  "
    room = max(columns - len(size_text), 8)
    if len(shown) > room:
        shown = f"{shown[: room // 2 - 2]}...{shown[len(shown) - (room - room // 2) + 1 :]}"
    return size_text + shown


def _name(path: str | Path, base: Path, root: Path) -> str:
    return (base / path).relative_to(root).as_posix()
