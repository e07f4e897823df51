"""YAML text -> plain values and their line numbers, by the YAML 1.2 core schema.

PyYAML follows YAML 1.1, where `no` is a boolean, `2e-4` a string and `1:30` the number 90. Here
only `true` and `false` are booleans, `2e-4` is a number, and dates stay text. A duplicate key is a
fault; PyYAML would silently keep the last value.
"""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from ftsec_ray.config.faults import Faults
from ftsec_ray.config.limits import LARGEST_INT, NESTING, VALUES
from ftsec_ray.errors import SpecError
from ftsec_ray.redact import redacted, secrets_in, without_secrets


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2, no tags and limited nesting."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """One node; raises an error if it is nested too deeply or has a tag."""
        if fault := NESTING.exceeded_by(self._depth):
            raise fault
        event = self.peek_event()
        tag = getattr(event, "tag", None)
        if tag not in (None, "!"):
            raise yaml.MarkedYAMLError(
                problem=f"tags are not allowed: {tag}", problem_mark=event.start_mark
            )
        self._depth += 1
        try:
            node: yaml.Node | None = super().compose_node(parent, index)
        finally:
            self._depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}",
        re.compile(f"^(?:{_pattern})$"),
        [*(_first.replace("\0", "")), ""] if _tag == "null" else list(_first),
    )


def _decimal(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    value = int(node.value) if len(node.value) <= len(str(-LARGEST_INT)) else LARGEST_INT + 1
    if abs(value) > LARGEST_INT:
        raise yaml.MarkedYAMLError(
            problem=f"an integer of more than 64 bits ({node.value[:24]}...)",
            problem_mark=node.start_mark,
        )
    return value


_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)


def redacted_yaml(text: str) -> str:
    """A sweep file with secrets redacted. If YAML escapes or folding hide a secret in the text, the
    result is the redacted values as JSON, which is YAML too.
    """
    cleaned = redacted(text)
    values = read_yaml(text, Faults("sweep"))
    if not secrets_in(values):
        return cleaned
    again = read_yaml(cleaned, Faults("sweep"))
    if again is not None and not secrets_in(again):
        return cleaned
    return json.dumps(without_secrets(values), indent=1, ensure_ascii=False) + "\n"


def read_yaml(text: str, faults: Faults) -> Any:
    """The values of one YAML document, or None if it cannot be read; `faults` collects syntax
    errors and duplicate keys.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            faults.add(
                "file",
                "an empty sweep file",
                text.strip()[:40],
                "name, models, task, attacks, defenses",
            )
            return None
        lines: dict[str, int] = {}
        faults.lines = lines
        can_build = _walk(node, "", lines, faults, path=())
        return loader.construct_document(node) if can_build else None
    except SpecError as fault:
        faults.add_error("file", fault)
        return None
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "file"
        problem = getattr(error, "problem", None) or str(error)
        faults.add(
            place,
            "not valid YAML",
            problem,
            "one YAML document",
            "put texts that contain : # { [ or tabs in quotes",
        )
        return None


def _walk(
    node: yaml.Node, place: str, lines: dict[str, int], faults: Faults, path: tuple[int, ...]
) -> bool:
    """Record the line of every place, and a fault for each duplicate key; False if the document
    must not be built.
    """
    if id(node) in path:
        faults.add(
            place, "the value contains itself", place, "no alias to a value that encloses it"
        )
        return False
    if fault := VALUES.exceeded_by(len(lines)):
        faults.add_error(place, fault)
        return False
    lines[place] = node.start_mark.line + 1
    path = (*path, id(node))
    if isinstance(node, yaml.SequenceNode):
        return all(
            _walk(item, f"{place}[{index}]", lines, faults, path)
            for index, item in enumerate(node.value)
        )
    if not isinstance(node, yaml.MappingNode):
        return True
    seen: dict[str, int] = {}
    # Keys of a merge (`<<`) are defaults that a key may override; they are not duplicates.
    for key, value in node.value:
        name = str(key.value)
        inner = f"{place}.{name}" if place else name
        if name in seen:
            faults.add(
                inner,
                "a duplicate key",
                name,
                f"each key once; the first one is on line {seen[name]}",
                f"remove the one on line {key.start_mark.line + 1}",
            )
        seen[name] = key.start_mark.line + 1
        if not _walk(value, inner, lines, faults, path):
            return False
        lines[inner] = key.start_mark.line + 1
    return True
