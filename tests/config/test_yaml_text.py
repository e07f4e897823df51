"""YAML as people mean it: numbers are numbers, words are words, and a key stands once."""

from __future__ import annotations

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftsec_ray.config.faults import Faults
from ftsec_ray.config.yaml_text import read_yaml


def read(text: str) -> object:
    faults = Faults("test")
    value = read_yaml(text, faults)
    faults.check()
    return value


def faults_of(text: str) -> dict[str, str]:
    faults = Faults("test")
    read_yaml(text, faults)
    return {place: f"{fault.what}: {fault.got} {fault.want}" for place, fault in faults.found}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("2.0e-4", 2e-4),
        ("-1E3", -1000.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("1e3", 1000.0),
        ("007", 7),
        ("+3", 3),
        ("10", 10),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("ladder:1m", "ladder:1m"),
        ("0.2m", "0.2m"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("=", "="),
        ("'1'", "1"),
        ("e5", "e5"),
        ("-", [None]),
    ],
)
def test_a_scalar_is_read_as_yaml_1_2_says(text, value):
    found = read(f"a: {text}\n" if text != "-" else "a:\n  -\n")["a"]
    assert found == value
    assert type(found) is type(value)
    assert not isinstance(found, datetime.date)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_finite_float_comes_back(value):
    assert read(f"a: {value!r}")["a"] == value


def test_a_key_given_twice_is_a_fault_with_both_lines():
    found = faults_of("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\na: 2\n")
    assert set(found) == {"a", "b.c"}
    assert "first one is on line 3" in found["b.c"]


def test_merge_keys_work_and_do_not_count_as_twice():
    assert read("x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}\n")["y"] == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    "text",
    [
        "a: [1, 2",
        "a: 'x",
        "a:\n\t- 1",
        "a: 1\n---\nb: 2\n",
        "a: !!python/object:os.system x",
        "a: *nowhere",
        "{[]: 1}",
        "%",
    ],
)
def test_text_that_is_not_yaml_is_one_fault_with_its_line(text):
    ((place, message),) = faults_of(text).items()
    assert place.startswith("line")
    assert "not valid YAML" in message


def test_an_empty_text_is_a_fault():
    assert "empty" in faults_of("# nothing\n")["file"]


def test_a_value_that_contains_itself_is_a_fault():
    assert any("contains itself" in message for message in faults_of("a: &a [*a]\n").values())


def test_a_text_that_explodes_through_aliases_is_refused():
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
    )
    assert any("too many values" in message for message in faults_of(bomb).values())
