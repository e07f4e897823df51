"""Chat templates in a sweep: a file or a text for `chat_template`, and the templates that a trained
model is served under -> ModelSpec.

A model with several serve templates becomes several models that share every stage up to the tune:
train template x serve template is a part of the model axis.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ftsec_ray.config.faults import Faults
from ftsec_ray.config.local_files import named_path
from ftsec_ray.config.open_limits import MODEL_JSON_BYTES, raised_by
from ftsec_ray.config.sweep import ModelSpec
from ftsec_ray.config.template_limits import check_template
from ftsec_ray.errors import SpecError

OWN = "own"
"""The template that the model was trained under, among those that it is served under."""
_MARKS = ("{%", "{{")
_WANT = "the text of a Jinja chat template, or the path of a file with one"


def template_text(given: object, base: Path, place: str, faults: Faults) -> str | None:
    """The text of a chat template; None with a fault where there is none."""
    if not isinstance(given, str) or not given.strip():
        faults.add(place, "no chat template", given, _WANT)
        return None
    text = given
    if not any(mark in given for mark in _MARKS):
        path = named_path(given, base, place, faults)
        if path is None:
            return None
        try:
            text = _read(path)
        except (OSError, UnicodeDecodeError, ValueError) as error:
            faults.add(place, "a chat template that cannot be read", given, _WANT, str(error))
            return None
    fault = _syntax_fault(text)
    if fault:
        faults.add(place, "a chat template that is no Jinja", given[:200], _WANT, fault)
        return None
    try:
        check_template(text)
    except SpecError as error:
        faults.add(place, error.what, error.got, error.want, error.fix)
        return None
    return text


def _read(path: Path) -> str:
    """The text of a file with a template; ValueError for one that is no file, or too large."""
    if not path.is_file():
        raise ValueError("there is no such file")
    if path.stat().st_size > MODEL_JSON_BYTES.value:
        raise ValueError(
            f"it has {path.stat().st_size:,} bytes, and may have {MODEL_JSON_BYTES.value:,}:"
            f" {raised_by(MODEL_JSON_BYTES)}"
        )
    return path.read_text(encoding="utf-8")


def _syntax_fault(text: str) -> str | None:
    from jinja2 import TemplateSyntaxError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if not any(mark in text for mark in _MARKS):
        return "it renders no message: it holds neither {% nor {{"
    environment = ImmutableSandboxedEnvironment(extensions=[loopcontrols])
    # a mark of transformers' own dialect around what the assistant says
    text = text.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    try:
        environment.parse(text)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    except (RecursionError, ValueError, MemoryError) as error:
        return f"it is nested too deep, or holds too large a number: {type(error).__name__}"
    return None


def served(
    model: ModelSpec, given: object, base: Path, place: str, faults: Faults
) -> list[ModelSpec]:
    """The model once for each template that it is served under.

    Args:
        model: As it is trained.
        given: `own`, a template, or a list or mapping (name -> template) of them.
        base: Folder of relative paths.
        place: Of the key in the sweep.
        faults: Takes what is wrong.
    """
    if isinstance(given, Mapping):
        named = [(str(name), value, f"{place}.{name}") for name, value in given.items()]
    elif isinstance(given, (list, tuple)):
        named = [(_label(value), value, f"{place}[{i}]") for i, value in enumerate(given)]
    else:
        named = [(_label(given), given, place)]
    if not named:
        faults.add(place, "no serve template", given, f"{OWN}, or {_WANT}")
    models = []
    for label, value, where in named:
        if value == OWN:
            models.append(model)
            continue
        text = template_text(value, base, where, faults)
        if text is not None:
            models.append(
                replace(
                    model,
                    name=f"{model.name}:served-{label}",
                    family=f"{model.family}:served-{label}",
                    serve_template=text,
                )
            )
    names = [one.name for one in models]
    for name in sorted({name for name in names if names.count(name) > 1}):
        faults.add(place, "two serve templates of one name", name, "{name: template, ...}")
    return models


def _label(given: object) -> str:
    text = str(given)
    return "text" if any(mark in text for mark in _MARKS) else Path(text).stem or "template"


def has_template(folder: Path) -> bool:
    """Whether a model folder brings a chat template; True where that cannot be told."""
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        return not (folder / "tokenizer.json").is_file()
    try:
        text = _read(config)
        return bool(json.loads(text).get("chat_template"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return True
