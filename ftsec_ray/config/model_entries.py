"""The model axis of a sweep: `ladder:1m`, a Hugging Face id (`owner/name` or
`owner/name@revision`), a folder, a `.gguf` file, or a mapping -> ModelSpec.

Some keys follow from the source: family, alignment and unaligned twin of a ladder model; family and
alignment of a name of the usual pattern `<family>-<size>-<instruct|base>`. The sweep file must give
the others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ftsec_ray.config.faults import Faults, name_or_none, nearest
from ftsec_ray.config.local_files import looks_local, named_path
from ftsec_ray.config.revisions import check_revision, is_commit, is_hub_id
from ftsec_ray.config.sweep import LADDER_SIZES, AlignSpec, ModelSpec
from ftsec_ray.config.template_entries import has_template, served, template_text
from ftsec_ray.config.typed import build, unknown_keys

_KEYS = (
    "path",
    "id",
    "source",
    "name",
    "family",
    "aligned",
    "align",
    "unaligned",
    "revision",
    "parameters",
    "trust_remote_code",
    "chat_template",
    "thinking",
    "dtype",
    "attention",
    "serve_template",
)
_READ_HERE = frozenset(
    {"path", "id", "source", "align", "unaligned", "name", "chat_template", "serve_template"}
)
_SIZE = re.compile(r"[-_]?\d+(\.\d+)?[kmb](?=[-_.]|$)")
_ALIGNED = re.compile(r"(^|[-_.])(instruct|chat|it|dpo|rlhf|sft)(?=[-_.]|$)")
_BASE = re.compile(r"(^|[-_.])(base|pt|pretrained)(?=[-_.]|$)")


@dataclass(frozen=True)
class _Source:
    """Where a model comes from, and the keys that follow from it."""

    text: str
    """The value of ModelSpec.source."""
    name: str
    family: str | None = None
    aligned: bool | None = None
    unaligned: str | None = None
    revision: str | None = None
    local: bool = False


def models_of(given: object, base: Path, faults: Faults) -> tuple[ModelSpec, ...]:
    """The models of a sweep; relative paths start at `base`."""
    if isinstance(given, (str, Mapping)):
        given = [given]
    if not isinstance(given, (list, tuple)) or not given:
        faults.add(
            "models",
            "no models",
            given,
            "a list such as [ladder:0.2m, ladder:1m]",
            "see `ftsec list models`",
        )
        return ()
    by_name: dict[str, ModelSpec] = {}
    for index, entry in enumerate(given):
        place = f"models[{index}]"
        for model in _models(entry, place, base, faults):
            if model.name in by_name:
                faults.add(
                    place,
                    "two models have the same name",
                    model.name,
                    "a unique name for each model",
                    "write {source: ..., name: ...}",
                )
            by_name.setdefault(model.name, model)
    return tuple(by_name.values())


def _models(given: object, place: str, base: Path, faults: Faults) -> list[ModelSpec]:
    """A model of the sweep, once for each of its serve templates."""
    model = _model(given, place, base, faults)
    if model is None:
        return []
    if not isinstance(given, Mapping) or given.get("serve_template") is None:
        return [model]
    return served(model, given["serve_template"], base, f"{place}.serve_template", faults)


def _model(given: object, place: str, base: Path, faults: Faults) -> ModelSpec | None:
    if isinstance(given, str):
        source = source_of(given, place, base, faults)
        return None if source is None else _built({}, source, place, base, faults)
    if not isinstance(given, Mapping):
        faults.add(
            place,
            "not a model",
            given,
            "a source such as ladder:1m, or a mapping with path, id or source",
        )
        return None
    unknown_keys(given, _KEYS, place, faults)
    where = [key for key in ("path", "id", "source") if key in given]
    if len(where) != 1:
        faults.add(
            place, "a model needs exactly one source", dict(given), "one of: path, id, source"
        )
        return None
    source = source_of(given[where[0]], f"{place}.{where[0]}", base, faults, kind=where[0])
    return None if source is None else _built(given, source, place, base, faults)


def _built(
    given: Mapping[str, object], source: _Source, place: str, base: Path, faults: Faults
) -> ModelSpec | None:
    before = len(faults.found)
    values = {key: value for key, value in given.items() if key not in _READ_HERE and key in _KEYS}
    fixed: dict[str, object] = {"source": source.text, "name": source.name}
    if "name" in given:
        fixed["name"] = name_or_none(given["name"], f"{place}.name", faults, also=":")
    fixed["align"] = _align(given, f"{place}.align", faults)
    fixed["unaligned"] = _twin(given, source, f"{place}.unaligned", base, faults)
    if given.get("chat_template") is not None:
        fixed["chat_template"] = template_text(
            given["chat_template"], base, f"{place}.chat_template", faults
        )
    check_revision(given.get("revision"), f"{place}.revision", faults)
    if source.text.startswith("ladder:"):
        _check_ladder(given, place, faults)
    if source.local and given.get("revision") is not None:
        faults.add(
            f"{place}.revision",
            "a revision of a local model",
            given["revision"],
            "no revision",
            "only Hugging Face ids have revisions",
        )
    if (
        source.revision is not None
        and values.setdefault("revision", source.revision) != source.revision
    ):
        faults.add(
            f"{place}.revision",
            "two different revisions of one model",
            values["revision"],
            repr(source.revision),
            "give the revision once",
        )
    _derive(values, source, fixed, place, faults)
    _check_template(values, source, fixed, place, faults)
    model = build(ModelSpec, values, place, faults, **fixed)
    return model if len(faults.found) == before else None


_FIXED: Mapping[str, tuple[str, tuple[object, ...], str, str]] = {
    "chat_template": (
        "the chat template of a ladder model is fixed",
        (None,),
        "no chat_template",
        "to evaluate the finished model under another template, use serve_template",
    ),
    "dtype": (
        "the dtype of a ladder model is fixed",
        ("auto", "float32"),
        "float32, or no dtype",
        "on a CPU, half precision is slower than float32 for these small models",
    ),
    "attention": (
        "the attention of a ladder model is fixed",
        ("auto",),
        "auto, or no attention",
        "",
    ),
}
"""Keys that are fixed for a ladder model -> (what, allowed values, want, fix)."""


def _check_ladder(given: Mapping[str, object], place: str, faults: Faults) -> None:
    for key, (what, allowed, want, hint) in _FIXED.items():
        if key in given and given[key] not in allowed:
            faults.add(f"{place}.{key}", what, given[key], want, hint)


def _derive(
    values: dict[str, object],
    source: _Source,
    fixed: Mapping[str, object],
    place: str,
    faults: Faults,
) -> None:
    """Fill in `family` and `aligned` where they follow from the source; contradictions are
    faults.
    """
    if "family" not in values and source.family is not None:
        values["family"] = source.family
    if source.text.startswith("ladder:"):
        for key, derived in (("family", source.family), ("aligned", source.aligned)):
            if (
                key in values
                and values[key] != derived
                and not (key == "aligned" and fixed["align"] is not None)
            ):
                faults.add(
                    f"{place}.{key}",
                    f"{key} of a ladder model is fixed",
                    values.pop(key),
                    repr(derived),
                    f"leave out {key}",
                )
    if fixed["align"] is not None:
        if values.get("aligned") is False:
            faults.add(
                f"{place}.aligned",
                "aligned: false contradicts align",
                values["aligned"],
                "true, or no align",
                "a model with an align stage is aligned",
            )
        values["aligned"] = True
    elif "aligned" not in values and source.aligned is not None:
        values["aligned"] = source.aligned


def _check_template(
    values: Mapping[str, object],
    source: _Source,
    fixed: Mapping[str, object],
    place: str,
    faults: Faults,
) -> None:
    """A fault for an aligned local model without a chat template."""
    folder = Path(source.text)
    if (
        source.local
        and folder.is_dir()
        and values.get("aligned") is True
        and fixed["align"] is None
        and fixed.get("chat_template") is None
        and not has_template(folder)
    ):
        faults.add(
            f"{place}.chat_template",
            "an aligned model without a chat template",
            source.name,
            "the chat template that was used to align the model",
            "add `chat_template: FILE`, or `aligned: false` for a base model",
        )


def _align(given: Mapping[str, object], place: str, faults: Faults) -> AlignSpec | None:
    align = given.get("align")
    if align is None or align is False:
        return None
    return build(AlignSpec, {} if align is True else align, place, faults)


def _twin(
    given: Mapping[str, object], source: _Source, place: str, base: Path, faults: Faults
) -> str | None:
    if given.get("unaligned") is None:
        return None if given.get("align") else source.unaligned
    if given.get("align"):
        faults.add(
            place,
            "align and unaligned together",
            given["unaligned"],
            "one of them",
            "with align, the unaligned twin is the loaded model itself",
        )
    twin = source_of(given["unaligned"], place, base, faults)
    if twin is None:
        return None
    return twin.text if twin.revision is None else f"{twin.text}@{twin.revision}"


def source_of(
    given: object, place: str, base: Path, faults: Faults, *, kind: str = "source"
) -> _Source | None:
    """A model source, or None with a fault; a local source must exist and gets an absolute path.

    Args:
        given: The value in the sweep file.
        place: Its place in the file.
        base: Folder at which relative paths start.
        faults: Collects the faults.
        kind: Key that the value was given under: `source`, `path` or `id`.
    """
    if not isinstance(given, str) or not given.strip():
        faults.add(
            place,
            "not a model source",
            given,
            "ladder:<size>, a Hugging Face id, a folder or a .gguf file",
        )
        return None
    if given.startswith("ladder:") and kind != "path":
        return _ladder(given, place, faults)
    path = named_path(given, base, place, faults)
    if path is None:
        return None
    if kind == "path" or (kind == "source" and (looks_local(given) or path.exists())):
        return _local(given, path, place, faults)
    hub, at, revision = given.partition("@")
    if is_hub_id(hub) and (not at or is_commit(revision)):
        return _named(_Source(hub, _slug(hub.rsplit("/", 1)[-1]), revision=revision or None))
    faults.add(
        place,
        "not a local file, a ladder model or a Hugging Face id",
        given,
        "ladder:<size> | owner/name | owner/name@<commit> | ./folder | file.gguf",
        nearest(
            given,
            [f"ladder:{size}" for size in LADDER_SIZES],
            f"there is no {path.name!r} in the folder of the sweep",
        ),
    )
    return None


def _ladder(given: str, place: str, faults: Faults) -> _Source | None:
    size = given.removeprefix("ladder:").removesuffix("-base")
    if size not in LADDER_SIZES:
        faults.add(
            place,
            "unknown ladder size",
            given,
            " | ".join(f"ladder:{s} | ladder:{s}-base" for s in LADDER_SIZES),
            nearest(given, [f"ladder:{s}{end}" for s in LADDER_SIZES for end in ("", "-base")]),
        )
        return None
    aligned = not given.endswith("-base")
    return _Source(given, given, "ladder", aligned, f"ladder:{size}-base" if aligned else None)


def _local(given: str, path: Path, place: str, faults: Faults) -> _Source | None:
    if not path.exists():
        faults.add(
            place,
            "no such model",
            given,
            "an existing folder or .gguf file",
            f"searched for {path.resolve().name!r} in {path.resolve().parent}",
        )
    elif path.is_file() and path.suffix != ".gguf":
        faults.add(
            place,
            "a file that is not a model",
            given,
            "a .gguf file, or the folder that holds config.json",
        )
    elif path.is_dir() and not (path / "config.json").is_file():
        faults.add(
            place,
            "a folder that is not a model",
            given,
            "a folder with config.json",
            "give a folder written by save_pretrained",
        )
    else:
        stem = path.stem if path.is_file() else path.resolve().name
        return replace(_named(_Source(str(path.resolve()), _slug(stem))), local=True)
    return None


def _named(source: _Source) -> _Source:
    """The source with family and alignment from a name of the usual pattern: the family before the
    size, aligned or base after it.
    """
    size = _SIZE.search(source.name)
    family = source.name[: size.start()] if size and size.start() else None
    aligned = True if _ALIGNED.search(source.name) else False if _BASE.search(source.name) else None
    return replace(source, family=family, aligned=aligned)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9_.-]+", "-", text.lower()).strip("-._") or "model"
