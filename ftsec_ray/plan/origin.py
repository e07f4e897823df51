"""The identity of model sources and tasks: names, revisions, and the bytes of local files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftsec_ray.config.sweep import ModelSpec, TaskSpec
from ftsec_ray.data.tasks import TASKS
from ftsec_ray.errors import SpecError
from ftsec_ray.identity import canonical
from ftsec_ray.identity.content import content_hash
from ftsec_ray.models.published_folder import check_folder
from ftsec_ray.models.weight_files import counted, weights_index


@dataclass(frozen=True, slots=True)
class Origin:
    """Identity (`params`) and location (`where`) of a stage without inputs."""

    params: Mapping[str, Any]
    where: Mapping[str, Any]
    trains: bool = False
    """Whether the stage trains a model; otherwise it only reads one."""


def local_path(source: str) -> Path | None:
    """The path of a local model source; None for an id of the Hugging Face Hub."""
    path = Path(source).expanduser()
    if source.startswith(("/", "./", "../", "~")) or source.endswith(".gguf") or path.exists():
        return path
    return None


def model_origin(model: ModelSpec, source: str) -> Origin:
    """Identity and location of a model source: a ladder model before alignment, a local file or
    folder, or a Hub id.
    """
    if source.startswith("ladder:"):
        return Origin({"source": source.removesuffix("-base")}, {}, trains=True)
    path = local_path(source)
    given: dict[str, Any] = {"trust_remote_code": True} if model.trust_remote_code else {}
    if model.chat_template is not None:
        given["chat_template"] = model.chat_template
    if model.thinking:
        given["thinking"] = True
    if model.attention != "auto":
        given["attention"] = model.attention
    if (dtype := source_dtype(model, source)) != "float32":
        given["dtype"] = dtype
    if path is not None:
        kind = "gguf" if source.endswith(".gguf") else "folder"
        if path.is_dir():
            check_folder(path, runs_code=model.trust_remote_code)
        return Origin(
            {"source": kind, "sha256": content_hash(path), **given},
            {"path": str(path.resolve())},
        )
    if source.count("/") > 1:
        raise SpecError(
            f"the source of model {model.name!r} is neither an existing path nor a Hugging Face id",
            source,
            "ladder:<size>, an existing folder or .gguf file, or owner/name",
            "check the spelling of the path",
        )
    name, _, pinned = source.partition("@")
    revision = model.revision if source == model.source else pinned or None
    return Origin({"source": "hub", "id": name, "revision": revision, **given}, {})


def source_dtype(model: ModelSpec, source: str) -> str:
    """Dtype in which a model is loaded; `auto` if only its weights, not read here, decide it."""
    if source.startswith("ladder:"):
        return "float32"
    if model.dtype != "auto":
        return model.dtype
    path = local_path(source)
    if path is None:
        return "auto"
    if source.endswith(".gguf"):
        return "float32"
    config = known_config(source)
    stated = config.get("dtype") or config.get("torch_dtype")
    return stated if isinstance(stated, str) else _dtype_of_weights(path) or "auto"


_SAFETENSORS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def weights_count(source: str) -> int | None:
    """Number of weights of a model in a local folder; None if its file headers do not give it."""
    path = local_path(source)
    index = weights_index(path) if path is not None and path.is_dir() else {}
    return counted(index.values()) or None


def _dtype_of_weights(folder: Path) -> str | None:
    dtypes = {str(entry.get("dtype")) for entry in weights_index(folder).values()}
    return _SAFETENSORS.get(dtypes.pop()) if len(dtypes) == 1 else None


def known_config(source: str) -> Mapping[str, Any]:
    """The `config.json` of a local model folder; empty if it is missing or not readable."""
    path = local_path(source)
    file = path / "config.json" if path is not None and path.is_dir() else None
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file is not None else {}
    except (OSError, ValueError, RecursionError):  # loading the model reports this error
        return {}
    return config if isinstance(config, dict) else {}


def task_origin(task: TaskSpec) -> Origin:
    """Identity and location of a task: hashes of local files replace their paths."""
    content, paths, splits = {}, {}, []
    for split, source in task.splits:
        if source.path is not None:
            path = Path(source.path).expanduser()
            content[split], paths[split] = content_hash(path), str(path.resolve())
        splits.append((split, replace(source, path=None)))
    plain = json.loads(canonical(replace(task, splits=tuple(splits))))
    for _, source in plain["splits"]:
        if not source["matching"]:
            del source["matching"]  # keeps the digests of sweeps from before this field existed
    version = TASKS[task.kind].version
    of_kind = {"kind_version": version} if version > 1 else {}
    return Origin(
        {"task": plain, "content": content, **of_kind}, {"task": task.name, "paths": paths}
    )
