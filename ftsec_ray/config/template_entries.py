"""Chat templates in a sweep: `chat_template` (a file or a text) and `serve_template` -> ModelSpec.

A model with several serve templates becomes several models, which share all stages up to the
fine-tune: training template x serve template is part of the model axis.
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
"""Value of `serve_template` that means the template of the training."""
_MARKS = ("{%", "{{")
_WANT = "the text of a Jinja chat template, or the path of such a file"


def template_text(given: object, base: Path, place: str, faults: Faults) -> str | None:
    """The text of a chat template; None and a fault if it is not a valid one.

    Args:
        given: The text of a template, or the path of a file.
        base: Folder at which relative paths start.
        place: Place of the value in the sweep file.
        faults: Collects the faults.
    """
    if not isinstance(given, str) or not given.strip():
        faults.add(place, "not a chat template", given, _WANT)
        return None
    text = given
    if not any(mark in given for mark in _MARKS):
        path = named_path(given, base, place, faults)
        if path is None:
            return None
        try:
            text = _read(path)
        except (OSError, UnicodeDecodeError, ValueError) as error:
            faults.add(place, "cannot read this chat template", given, _WANT, str(error))
            return None
    fault = _syntax_fault(text)
    if fault:
        faults.add(place, "not a valid Jinja chat template", given[:200], _WANT, fault)
        return None
    try:
        check_template(text)
    except SpecError as error:
        faults.add(place, error.what, error.got, error.want, error.fix)
        return None
    return text


def _read(path: Path) -> str:
    """The text of a template file; ValueError if there is no such file or it is too large."""
    if not path.is_file():
        raise ValueError("there is no such file")
    if path.stat().st_size > MODEL_JSON_BYTES.value:
        raise ValueError(
            f"the file has {path.stat().st_size:,} bytes, the limit is"
            f" {MODEL_JSON_BYTES.value:,}; {raised_by(MODEL_JSON_BYTES)}"
        )
    return path.read_text(encoding="utf-8")


def _syntax_fault(text: str) -> str | None:
    from jinja2 import TemplateSyntaxError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if not any(mark in text for mark in _MARKS):
        return "the template contains neither {% nor {{, so it renders no message"
    environment = ImmutableSandboxedEnvironment(extensions=[loopcontrols])
    # transformers adds this tag around the assistant's text; plain Jinja rejects it
    text = text.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    try:
        environment.parse(text)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {error.message}"
    except (RecursionError, ValueError, MemoryError) as error:
        return f"nested too deeply, or a number is too large: {type(error).__name__}"
    return None


def served(
    model: ModelSpec, given: object, base: Path, place: str, faults: Faults
) -> list[ModelSpec]:
    """The model once for each of its serve templates.

    Args:
        model: The model as it is trained.
        given: `own`, a template, or a list or mapping (name -> template) of them.
        base: Folder at which relative paths start.
        place: Place of `serve_template` in the sweep file.
        faults: Collects the faults.
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
    names = [served_model.name for served_model in models]
    for name in sorted({name for name in names if names.count(name) > 1}):
        faults.add(place, "two serve templates have the same name", name, "{name: template, ...}")
    return models


def _label(given: object) -> str:
    text = str(given)
    return "text" if any(mark in text for mark in _MARKS) else Path(text).stem or "template"


def has_template(folder: Path) -> bool:
    """Whether a model folder contains a chat template; True if that cannot be determined."""
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
