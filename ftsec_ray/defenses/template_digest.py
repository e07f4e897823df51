"""Flags a model whose chat template is not the one that its publisher gave it.

Paper: the answer to backdoors in chat templates (arXiv:2602.04653 and arXiv:2602.05401, 2026); the
    rule is our own.
Differs: not applicable. `by: digest` compares with the publisher's template; `by: conditions` needs
    no trusted copy: it reads the template as a syntax tree and counts the places where the text of
    a message is compared with, or searched for, a fixed string. Templates of reasoning models do
    that by themselves (they cut thoughts out of earlier answers), so that a count above 0 alone is
    no proof, and a condition on the length, position or number of messages is not counted. The
    count is a lower bound: macros, `items()`, blocks of `set` and fixed strings that are held in
    variables are not followed.
Cost: none: no pass through the model.
Needs: the model that the cell starts from (`reference`), taken as the publisher's. An attack on the
    weights leaves the template as it is: the detector is blind to it.
Reads: the score is not relative to a bank of clean models, but compared with the publisher's own
    template. Over a sweep, scores of models with other templates are other numbers for `conditions`
    and `length`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftsec_ray.errors import DataError
from ftsec_ray.method import Defense, Inspection, Phase

if TYPE_CHECKING:
    from ftsec_ray.context import LoadedModel, StageContext

CONTENT = ("content", "text")
"""Keys of a message, or of a part of one, that hold its words."""
OTHERS = ("role", "type", "name")
"""Keys of a message, or of a part of one, that hold no words."""
SEARCHES = (
    *("startswith", "endswith", "find", "rfind", "index", "count"),
    *("replace", "split", "rsplit", "partition", "rpartition"),
)
"""Methods of a text that look for another."""
_MARKS = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
"""Marks of trained answers, which plain Jinja does not know."""


@dataclass(frozen=True, kw_only=True)
class TemplateDigest(Defense):
    """A changed template, or conditions on what messages say."""

    PHASE: ClassVar[Phase] = "post"
    NEEDS: ClassVar[frozenset[str]] = frozenset({"reference"})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"by": "length"}

    by: Literal["digest", "conditions", "length"] = "digest"
    """The score. `digest`: 1 if the template differs from the publisher's in any character, else 0;
    `conditions`: number of conditions on the words of messages; `length`: number of characters (the
    control).
    """

    def inspect(self, subject: LoadedModel, ctx: StageContext) -> Inspection:
        """The score of the fine-tuned model's template, and that of the publisher's."""
        own, published = (templates_of(m) for m in (subject, ctx.load("reference")))
        score, clean = (float(self._score(one, published)) for one in (own, published))
        changed = sorted(name for name in own | published if own.get(name) != published.get(name))
        details = {"changed": changed, "conditions": sum(map(conditions, own.values()))}
        return Inspection(score=score, clean_scores=(clean,), details=details)

    def _score(self, own: Mapping[str, str], published: Mapping[str, str]) -> int:
        if self.by == "digest":
            return int(dict(own) != dict(published))
        return sum(
            conditions(text) if self.by == "conditions" else len(text) for text in own.values()
        )


def templates_of(model: LoadedModel) -> dict[str, str]:
    """The templates of a model's tokenizer by name; the only one is `default`."""
    given = getattr(model.tokenizer, "chat_template", None)
    if isinstance(given, Mapping):
        return {str(name): str(text) for name, text in given.items()}
    return {"default": str(given)} if given else {}


def conditions(template: str) -> int:
    """Number of places at which a template compares the words of a message with a fixed string that
    is not empty, or searches them for one.
    """
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(_MARKS.sub("", template))
    except (TemplateSyntaxError, RecursionError) as error:
        raise DataError(
            f"template_digest: the chat template cannot be parsed: {error}",
            template[:200],
            "a Jinja template",
            "use `by: digest`, which compares its characters",
        ) from error
    names = _names_of_content(tree)
    asked = tree.find_all((nodes.Compare, nodes.Call, nodes.Filter))
    return sum(_asks(node, names) for node in asked)


def _names_of_content(tree: Any) -> set[str]:
    """Names of variables, and of fields of namespaces, that are set from the words of a message."""
    from jinja2 import nodes

    names: set[str] = set()
    while True:
        found = {
            name
            for node in tree.find_all((nodes.Assign, nodes.For))
            if _holds_content(node.node if isinstance(node, nodes.Assign) else node.iter, names)
            for name in _targets(node.target)
        }
        if found <= names:
            return names
        names |= found


def _targets(target: Any) -> Iterator[str]:
    """The names that an assignment or a loop sets."""
    from jinja2 import nodes

    if isinstance(target, nodes.NSRef):
        yield target.attr
    elif isinstance(target, nodes.Name):
        yield target.name
    elif isinstance(target, nodes.Tuple):
        for item in target.items:
            yield from _targets(item)


def _holds_content(node: Any, names: set[str]) -> bool:
    """Whether an expression reads the words of a message."""
    from jinja2 import nodes

    if isinstance(node, nodes.Compare | nodes.Test):
        return False  # the answer of a question is not the words
    if isinstance(node, nodes.CondExpr):
        parts = [part for part in (node.expr1, node.expr2) if part is not None]
        return any(_holds_content(part, names) for part in parts)
    if isinstance(node, nodes.Name) and node.name in names:
        return True
    key = _key(node)
    if key in (*CONTENT, *names):
        return True
    if key in OTHERS:
        return False
    return any(_holds_content(child, names) for child in node.iter_child_nodes())


def _key(node: Any) -> str:
    """The fixed key or field that an expression reads: `a.key`, `a['key']` or `a.get('key')`; empty
    for anything else.
    """
    from jinja2 import nodes

    if isinstance(node, nodes.Getattr):
        return str(node.attr)
    if isinstance(node, nodes.Getitem):
        return _text(node.arg)
    is_call = isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr)
    return _text(node.args[0]) if is_call and node.node.attr == "get" and node.args else ""


def _text(node: Any) -> str:
    """A fixed string, or the first one of a fixed list; empty for anything else."""
    from jinja2 import nodes

    if isinstance(node, nodes.List | nodes.Tuple):
        return next(filter(None, map(_text, node.items)), "")
    return node.value if isinstance(node, nodes.Const) and isinstance(node.value, str) else ""


def _asks(node: Any, names: set[str]) -> bool:
    """Whether a comparison, a call or a filter compares words of a message with a fixed string."""
    from jinja2 import nodes

    if isinstance(node, nodes.Filter):
        is_search = node.name == "replace" and any(map(_text, node.args[:1]))
        return is_search and _holds_content(node.node, names)
    if isinstance(node, nodes.Call):
        called = node.node
        if not isinstance(called, nodes.Getattr) or called.attr not in SEARCHES:
            return False
        return any(map(_text, node.args)) and _holds_content(called.node, names)
    sides = [node.expr, *(operand.expr for operand in node.ops)]
    fixed = [side for side in sides if _text(side)]
    return bool(fixed) and any(_holds_content(side, names) for side in sides if side not in fixed)
