"""Plain values become typed dataclasses by the rules of JSON, and faults say what a field means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import pytest
from annotated_types import Ge, Lt

from ftsec_ray.config.faults import Faults
from ftsec_ray.config.typed import build, class_schema, fields_of, parse
from ftsec_ray.method import Defense, Phase


@dataclass(frozen=True, kw_only=True)
class Inner:
    """What stands inside."""

    depth: Annotated[int, Ge(1)] = 1
    """How deep."""


@dataclass(frozen=True, kw_only=True)
class Guard(Defense):
    """A defense with a field of every sort."""

    PHASE: ClassVar[Phase] = "post"

    rate: Annotated[float, Ge(0), Lt(1)]
    """Share of the rows,
    0..1.
    """
    count: int = 3
    words: tuple[str, ...] = ()
    pair: tuple[int, float] = (1, 0.5)
    mode: Literal["a", "b"] | None = None
    description: str = "d"
    default: int = 0
    title: str = "t"
    """A name that JSON schema has too."""
    table: Mapping[str, float] = field(default_factory=dict)
    inner: Inner = Inner()
    """The inner part."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters."""
        return [("count", self.count, "2 or more")] if self.count < 2 else []


@dataclass(frozen=True, kw_only=True)
class Child(Guard):
    """A defense that takes its parent's parameters over."""

    more: bool = False
    """Its own."""

    def __post_init__(self) -> None:
        if self.more and self.rate == 0:
            raise ValueError("more of nothing")


def told(cls: type, given: object, **options: Any) -> list[tuple[str, str, object, str, str]]:
    """The faults of a mapping."""
    faults = Faults("test")
    assert build(cls, given, "guard", faults, **options) is None
    return [(place, f.what, f.got, f.want, f.fix) for place, f in faults.found]


def test_values_come_in_the_types_of_their_fields():
    faults = Faults("test")
    given = {
        "rate": 0,
        "words": ["x", "y"],
        "pair": [2, 3],
        "table": {"k": 1},
        "inner": {"depth": 2},
    }
    guard = build(Guard, given, "guard", faults)
    assert guard == Guard(
        rate=0.0, words=("x", "y"), pair=(2, 3.0), table={"k": 1.0}, inner=Inner(depth=2)
    )
    assert [type(v) for v in (guard.rate, guard.pair[1], guard.table["k"])] == [float] * 3
    assert faults.found == []


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("rate", "0.5"),
        ("rate", True),
        ("rate", 10**400),
        ("count", 2.0),
        ("count", "2"),
        ("count", True),
        ("words", "x"),
        ("words", [1]),
        ("words", {"x": 1}),
        ("pair", [1]),
        ("mode", "c"),
        ("title", 1),
        ("table", {"k": "1"}),
        ("inner", {"depth": 0}),
        ("inner", {"dept": 1}),
    ],
)
def test_a_value_of_another_type_is_a_fault_at_its_place(name, wrong):
    [(place, what, got, _, _)] = told(Guard, {"rate": 0.5, name: wrong})
    assert place == f"guard.{name}"
    assert what.startswith("wrong value")
    assert got == wrong


@pytest.mark.parametrize(
    "wrong", [float("nan"), [float("inf")], {1: 2}, {"x"}, b"x", object(), "\ud800"]
)
def test_a_value_that_json_has_not_is_a_fault_and_hides_no_other(wrong):
    found = told(Guard, {"words": wrong, "count": "2"})
    assert [(place, what) for place, what, *_ in found] == [
        ("guard.rate", "missing"),
        ("guard.count", "wrong value"),
        ("guard.words", "not a JSON value with finite numbers"),
    ]


def test_a_value_without_end_is_a_fault():
    endless: list[Any] = []
    endless.append(endless)
    [(place, what, *_)] = told(Guard, {"rate": 0.5, "words": endless})
    assert (place, what) == ("guard.words", "not a JSON value with finite numbers")


def test_a_fault_says_what_is_wanted_and_what_the_field_means():
    assert told(Guard, {"rate": 1, "cout": 2}) == [
        (
            "guard.cout",
            "unknown key",
            "cout",
            "count | default | description | inner | mode | pair | rate | table | title | words",
            "did you mean 'count'?",
        ),
        ("guard.rate", "wrong value", 1, "number >= 0, < 1", "Share of the rows, 0..1."),
    ]
    assert told(Guard, {"rate": 0.5, "words": ["x", 1]}) == [
        ("guard.words", "wrong value at [1]", ["x", 1], "list of texts", "")
    ]


def test_a_method_is_asked_for_its_own_faults_when_the_types_are_right():
    assert told(Guard, {"rate": 0.5, "count": 1}) == [
        ("guard.count", "value out of range", 1, "2 or more", "")
    ]
    assert [place for place, *_ in told(Guard, {"count": 1})] == ["guard.rate"]
    assert parse(Guard, {"rate": 0.5, "count": 1}, "guard", Faults("test")) is not None


def test_a_value_that_a_class_itself_refuses_is_a_fault_of_the_whole():
    [(place, what, got, _, _)] = told(Child, {"rate": 0, "more": True})
    assert (place, got) == ("guard", {"rate": 0, "more": True})
    assert "more of nothing" in what


def test_a_fixed_value_is_taken_as_it_is_and_is_no_key():
    faults = Faults("test")
    table = {"k": 1.0}
    guard = build(Guard, {"count": 4}, "guard", faults, rate=0.25, table=table)
    assert guard == Guard(rate=0.25, count=4, table=table)
    assert guard.table is table
    assert [what for _, what, *_ in told(Guard, {"rate": 0.5}, rate=0.25)] == ["unknown key"]


def test_types_are_told_in_words_and_docs_of_a_parent_are_found():
    known = {info.name: info for info in fields_of(Child)}
    assert {name: info.type for name, info in known.items()} == {
        "rate": "number >= 0, < 1",
        "count": "integer",
        "words": "list of texts",
        "pair": "list of 2: integer, number",
        "mode": "one of a | b or null",
        "description": "text",
        "default": "integer",
        "title": "text",
        "table": "mapping",
        "inner": "mapping",
        "more": "true or false",
    }
    assert known["rate"].doc == "Share of the rows, 0..1."
    assert known["rate"].required
    assert (known["table"].default, known["pair"].default) == ({}, (1, 0.5))
    assert (known["more"].doc, known["title"].doc) == (
        "Its own.",
        "A name that JSON schema has too.",
    )


def test_the_schema_of_a_class_stands_alone():
    properties = class_schema(Child)["properties"]
    assert set(properties) == {info.name for info in fields_of(Child)}
    assert properties["inner"]["properties"]["depth"] == {
        "type": "integer",
        "minimum": 1,
        "default": 1,
        "description": "How deep.",
    }
    assert properties["inner"]["additionalProperties"] is False
    assert "$ref" not in str(class_schema(Child))
