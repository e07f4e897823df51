"""Checks an untrusted model folder before anything in it is loaded: every file that it names is in
the folder and part of its hash, nothing has to be unpickled, and its sizes are those of its
weights.

Reads only JSON and the headers of safetensors, so that it can run when a sweep is planned.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from ftsec_ray.config.limits import is_deeper
from ftsec_ray.config.open_limits import MODEL_JSON_BYTES, TOKENIZER_BYTES, raised_by
from ftsec_ray.errors import SpecError
from ftsec_ray.identity.content import is_aside
from ftsec_ray.identity.folder_files import plain_files
from ftsec_ray.models.config_sizes import check_sizes
from ftsec_ray.models.weight_files import Weights, weights_of

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
_READ = ("config.json", "tokenizer_config.json", "generation_config.json")
_OF_TOKENIZERS = (
    *("tokenizer", "tekken", "vocab", "merges", "added_tokens", "spiece", "sentencepiece"),
)
_NOT_LOADED = ("trainer_state.json",)
"""Files of any size: they are not read when a model is loaded."""
_OWN_FILES = re.compile(r"tokenizer\.json|vocab\.(json|txt)|merges\.txt|[\w.-]+\.model")
"""Files in a folder that transformers prefers to the paths in its tokenizer_config.json."""
_OWN_KEYS = ("tokenizer_file", "vocab_file", "merges_file")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
_NOT_READ = "special_tokens_map_file"
"""A key that older versions of transformers wrote, and that no version reads."""
_MAX_DEPTH = 64
"""Maximum nesting depth of a configuration; published ones have less than ten levels."""
_CODE = re.compile(r"[A-Za-z_]\w*\.[A-Za-z_]\w*")


def check_folder(folder: Path, *, runs_code: bool = False) -> Weights | None:
    """Number of weights and tensors in a model folder, None if not known; SpecError for a folder
    that would load files from outside, has to be unpickled, or has sizes that its weights do not
    have.

    Args:
        folder: A folder with a `config.json`.
        runs_code: Whether code that comes with the model runs (`trust_remote_code`).
    """
    files = plain_files(folder, skips=is_aside)
    names = {path.relative_to(folder).as_posix() for path in files}
    for path in files:
        _check_size(path, path.relative_to(folder).as_posix())
    known = {name: _mapping(folder / name) for name in _READ if name in names}
    if "adapter_config.json" in names:
        raise SpecError(
            "the model folder contains an adapter",
            str(folder / "adapter_config.json"),
            "full weights: an adapter names a base model, which is not part of this folder",
            "merge the adapter into its base (`merge_and_unload` of peft) and save the result, or"
            " remove adapter_config.json",
        )
    _check_names(folder, names, known, runs_code=runs_code)
    weights = weights_of(_weight_files(folder, names, known.get("config.json", {})))
    check_sizes(known.get("config.json", {}), weights, str(folder / "config.json"))
    return weights


def _check_size(path: Path, name: str) -> None:
    # checkpoints are in subfolders, from which a model is not loaded
    if name in _NOT_LOADED or ("/" in name and not name.endswith((".jinja", ".index.json"))):
        return
    _check_size_as(path, name)


def _check_size_as(path: Path, name: str) -> None:
    """SpecError for a file that is too large for its purpose."""
    is_tokenizer = name.startswith(_OF_TOKENIZERS) and name != "tokenizer_config.json"
    if not is_tokenizer and path.suffix not in (".json", ".jinja"):
        return
    limit = TOKENIZER_BYTES if is_tokenizer or name.endswith(".index.json") else MODEL_JSON_BYTES
    if fault := limit.exceeded_by(path.stat().st_size, where=str(path), fix=raised_by(limit)):
        raise fault


def _mapping(path: Path) -> Mapping[str, Any]:
    """The content of a configuration; SpecError if it is not an object, or nested too deeply."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
        is_deep = is_deeper(value, _MAX_DEPTH)
    except (OSError, ValueError) as error:
        raise SpecError(
            "a file of the model is not JSON", str(path), "a JSON object", str(error)
        ) from error
    except RecursionError:
        value, is_deep = {}, True
    if is_deep:
        raise SpecError(
            "a file of the model is nested too deeply",
            str(path),
            f"at most {_MAX_DEPTH} levels of lists and objects",
            "no published model needs more: treat the file as hostile",
        )
    if not isinstance(value, dict):
        raise SpecError("a file of the model is not an object", str(path), "a JSON object")
    return value


def _check_names(
    folder: Path, names: set[str], known: Mapping[str, Mapping[str, Any]], *, runs_code: bool
) -> None:
    """SpecError if a configuration names a file that is not in the folder."""
    for name, config in known.items():
        for key, named in _named_files(config, names):
            if named not in names:
                _outside(folder / name, key, named)
            _check_size_as(folder / named, PurePosixPath(named).name)
        if not runs_code:
            continue
        for key, code in _code(config.get("auto_map")):
            module = str(code).partition(".")[0]
            if not _CODE.fullmatch(str(code)) or f"{module}.py" not in names:
                raise SpecError(
                    "the model names code that is not in its folder",
                    f"{key}: {code!r} in {folder / name}",
                    "module.Class, with module.py in the folder: then it is part of the model's"
                    " hash",
                    "read the code, then copy it next to the weights and name it that way",
                )


def _code(auto_map: object) -> Iterator[tuple[str, object]]:
    """The keys and names of code in an `auto_map`: texts, or lists of texts and None."""
    given = auto_map if isinstance(auto_map, dict) else {"AutoTokenizer": auto_map}
    for key, value in given.items():
        for code in value if isinstance(value, list) else [value]:
            if code is not None:
                yield f"auto_map.{key}", code


def _named_files(config: Mapping[str, Any], names: set[str]) -> Iterator[tuple[str, str]]:
    """The keys of a configuration that name a file for transformers to load, and their values, in
    a folder with these file names.
    """
    weights = config.get("transformers_weights")
    if weights is not None:
        yield "transformers_weights", str(weights)
    fast = config.get("fast_tokenizer_files")
    for file in fast if isinstance(fast, list) else []:
        yield "fast_tokenizer_files", str(file)
    for key, value in config.items():
        # paths of the author's machine are often left here: only one that exists matters
        is_path = key.endswith("_file") and key != _NOT_READ and isinstance(value, str) and value
        if not is_path or _is_own(key, value, names):
            continue
        if ("/" in value or "\\" in value) and _is_there(value):
            yield key, value


def _is_own(key: str, value: str, names: set[str]) -> bool:
    """Whether the folder has a file that is loaded instead of the one that a key names."""
    own = "tokenizer.json" if key == "tokenizer_file" else PurePosixPath(value).name
    return key in _OWN_KEYS and own in names and _OWN_FILES.fullmatch(own) is not None


def _is_there(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def _outside(file: Path, key: str, named: str) -> NoReturn:
    raise SpecError(
        "the model names a file outside its folder",
        f"{key}: {named[:200]!r} in {file}",
        "files in the folder, which are part of its hash; not hidden files or .md files",
        "put the file into the folder and give its name without a path, or download the model from"
        " its publisher",
    )


def _weight_files(folder: Path, names: set[str], config: Mapping[str, Any]) -> list[Path]:
    """The files that the weights are loaded from, all in the folder; SpecError if they would have
    to be unpickled.
    """
    given = config.get("transformers_weights")
    first = str(given) if given else WEIGHTS if WEIGHTS in names else INDEX
    if first not in names:
        pickles = sorted(name for name in names if name.endswith((*_PICKLES, ".bin.index.json")))
        if pickles:
            _unpickled(folder, pickles[0])
        return []  # loading the model reports what is missing
    listed = [first]
    if first.endswith(".index.json"):
        listed = _listed(folder / first)
        for name in listed:
            if name not in names:
                _outside(folder / first, "weight_map", name)
    for name in listed:
        if not name.endswith(".safetensors"):
            _unpickled(folder, name)
    return [folder / name for name in listed]


def _listed(index: Path) -> list[str]:
    weight_map = _mapping(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise SpecError(
            "the index of the weights has no valid weight_map",
            str(index),
            "an object: name of a weight -> name of a .safetensors file in the folder",
        )
    return sorted(set(weight_map.values()))


def _unpickled(folder: Path, name: str) -> NoReturn:
    raise SpecError(
        "the weights are not safetensors",
        f"{name} in {folder}",
        "*.safetensors, or a .gguf file: loading a pickle runs any code that its author put in it",
        "use the safetensors of the same model, or convert it on an isolated machine",
    )
