"""YAML text -> plain values with the line of each, by the YAML 1.2 core rules.

PyYAML follows YAML 1.1, where `no` is a boolean, `2e-4` a string and `1:30` ninety; here `true` and
`false` alone are booleans, numbers are numbers, and dates stay text. A key given twice is a fault
and not a silent overwrite.
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
    """SafeLoader with the scalars of YAML 1.2, without tags, and of limited depth."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """One node; a fault of YAML where it lies too deep or is tagged as what it is not."""
        if fault := NESTING.exceeded_by(self._depth):
            raise fault
        event = self.peek_event()
        tag = getattr(event, "tag", None)
        if tag not in (None, "!"):
            raise yaml.MarkedYAMLError(
                problem=f"a tag ({tag}); values are written without", problem_mark=event.start_mark
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
            problem=f"an int of more than 64 bits ({node.value[:24]}...)",
            problem_mark=node.start_mark,
        )
    return value


_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)


def redacted_yaml(text: str) -> str:
    """A sweep file without secrets; as JSON, which is YAML too, where only YAML's own escapes and
    folds put one together.
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
    """The values of one YAML document, None when it cannot be read; syntax errors and double keys
    go to `faults`.
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
        whole = _walk(node, "", lines, faults, path=())
        return loader.construct_document(node) if whole else None
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
            "quote texts that hold : # { [ or tabs",
        )
        return None


def _walk(
    node: yaml.Node, place: str, lines: dict[str, int], faults: Faults, path: tuple[int, ...]
) -> bool:
    """Note the line of every place and each key given twice; False when the document must not be
    built.
    """
    if id(node) in path:
        faults.add(place, "a value that contains itself", place, "no alias to an outer value")
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
    # The keys of a merge (`<<`) are defaults that a key may override: they are not keys given
    # twice.
    for key, value in node.value:
        name = str(key.value)
        inner = f"{place}.{name}" if place else name
        if name in seen:
            faults.add(
                inner,
                "a key given twice",
                name,
                f"each key once; it is already on line {seen[name]}",
                f"remove the one on line {key.start_mark.line + 1}",
            )
        seen[name] = key.start_mark.line + 1
        if not _walk(value, inner, lines, faults, path):
            return False
        lines[inner] = key.start_mark.line + 1
    return True
