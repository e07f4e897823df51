"""Sweep files that mean harm, or that slipped: the answer is a plan or the faults, within limits."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ftsec_ray
from ftsec_ray.config.limits import CELLS, FILE_BYTES, LIMITS, NESTING, POINTS, RULES, VALUES
from ftsec_ray.errors import SpecError
from ftsec_ray.plan.build import build_plan

SWEEPS = sorted((Path(__file__).parents[2] / "sweeps").glob("*.yaml"))
BASE = "name: m\nmodels: [ladder:0.2m]\ntask: microworld\n"


def faults_of(text: str, tmp_path: Path) -> str:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(SpecError) as fault:
        ftsec_ray.load(tmp_path / "s.yaml")
    return str(fault.value)


def numbers(count: int) -> str:
    return "[" + ", ".join(str(n) for n in range(1, count + 1)) + "]"


@pytest.mark.parametrize(
    ("limit", "text"),
    [
        (FILE_BYTES, BASE + "attacks: none\ndefenses: none\n" + "#" * FILE_BYTES.default),
        (VALUES, BASE + f"attacks: none\ndefenses: none\nseeds: {numbers(VALUES.default)}\n"),
        (NESTING, BASE + f"attacks: {'[' * 3000}none{']' * 3000}\ndefenses: none\n"),
        (NESTING, BASE + "attacks: " + "{a: " * 3000 + "1" + "}" * 3000 + "\ndefenses: none\n"),
        (
            POINTS,
            BASE + "defenses: none\nattacks: [{harmful_tuning: {shots: {grid: "
            f"{numbers(400)}}}, order: {{grid: {numbers(400)}}}}}}}]\n",
        ),
        (
            POINTS,
            BASE + "attacks: none\ndefenses: [[{lisa: {rho: {grid: "
            f"{numbers(300)}}}}}}}, {{safe_lora: {{rank: {{grid: {numbers(300)}}}}}}}]]\n",
        ),
        (
            RULES,
            BASE
            + f"attacks: none\ndefenses: none\nseeds: {RULES.default + 1}\n"
            + f"exclude: [{{seed: {numbers(RULES.default + 1)}}}]\n".replace("[1, ", "[0, 1, "),
        ),
        (
            CELLS,
            BASE + "defenses: none\nseeds: 1000\nattacks: [none, {harmful_tuning: {shots: {grid: "
            f"{numbers(100)}}}}}}}]\n",
        ),
    ],
    ids=lambda given: given.name if hasattr(given, "name") else "",
)
def test_each_limit_is_told_with_its_number_and_how_to_raise_it(limit, text, tmp_path, monkeypatch):
    told = faults_of(text, tmp_path)
    assert f"too many {limit.counts}" in told
    assert f"at most {limit.default:,}" in told
    assert f"set the environment variable {limit.variable}" in told
    monkeypatch.setenv(limit.variable, "100000000000")
    if limit is not NESTING:  # that deep no reader of YAML goes
        (tmp_path / "s.yaml").write_text(text)
        faults: list[SpecError] = []
        try:
            ftsec_ray.load(tmp_path / "s.yaml")
        except SpecError as fault:
            faults.append(fault)
        assert limit.counts not in "".join(map(str, faults))


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.name)
@pytest.mark.parametrize("given", ["", "0", "-3", "1e9", "many", "9" * 5000])
def test_a_limit_that_is_no_count_is_a_fault(limit, given, monkeypatch):
    monkeypatch.setenv(limit.variable, given)
    with pytest.raises(SpecError, match=f"{limit.variable} is not a count"):
        limit.exceeded_by(1)


def test_aliases_that_multiply_are_counted_as_what_they_stand_for(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert f"too many {VALUES.counts}" in faults_of("\n".join(lines), tmp_path)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("seeds: !!bool nope", "tags are not allowed"),
        ("seeds: !!int {a: 1}", "tags are not allowed"),
        ("seeds: !!timestamp nope", "tags are not allowed"),
        ("seeds: !!python/object/apply:os.system [ls]", "tags are not allowed"),
        ("seeds: " + "9" * 400, "64 bits"),
        ("seeds: -" + "9" * 19, "64 bits"),
        ("? [a, b]\n: 1", "not valid YAML|unknown key"),
        ("training: {learning_rate: 1.0e999}", "finite"),
        ("resources: {gpu_memory_gib: .inf}", "finite"),
    ],
)
def test_values_that_are_not_plain_are_faults(line, match, tmp_path):
    told = faults_of(BASE + f"attacks: none\ndefenses: none\n{line}\n", tmp_path)
    assert re.search(match, told), told


@pytest.mark.parametrize("name", ["b" * 300, "a\0b", "~nobody_here_/x", "x/" * 3000])
@pytest.mark.parametrize("key", ["path", "source", "chat_template", "rows"])
def test_names_that_no_system_call_takes_are_faults(name, key, tmp_path):
    sweep: dict[str, Any] = {"models": ["ladder:0.2m"], "task": "microworld"}
    if key == "rows":
        sweep["task"] = {"kind": "sst2", "splits": {"train": {"path": name}}}
    else:
        model = {"source": "./m", "chat_template": name} if key == "chat_template" else {key: name}
        sweep["models"] = [{"family": "f", "aligned": True, **model}]
    with pytest.raises(SpecError):
        ftsec_ray.load({"name": "m", "attacks": ["none"], "defenses": ["none"], **sweep})


@pytest.mark.parametrize(
    "revision", ["main", "", "../../x", "--upload-pack=x", "a\nb", "A" * 40, "a" * 39, "a" * 41, 7]
)
@pytest.mark.parametrize("where", ["model", "at", "twin", "rows"])
def test_a_revision_is_a_commit_and_nothing_else(revision, where):
    sweep: dict[str, Any] = {"models": ["ladder:0.2m"], "task": "microworld"}
    if where == "rows":
        source = {"dataset": "a/b", "revision": revision, "prompt": "p", "response": "r"}
        sweep["task"] = {"kind": "rows", "splits": {"train": source}}
    else:
        model = {
            "model": {"id": "a/b", "revision": revision},
            "at": {"id": f"a/b@{revision}"},
            "twin": {"id": "a/b", "unaligned": f"a/c@{revision}"},
        }[where]
        sweep["models"] = [{"family": "f", "aligned": True, **model}]
    with pytest.raises(SpecError, match=r"not a commit|not a local file"):
        ftsec_ray.load({"name": "m", "attacks": ["none"], "defenses": ["none"], **sweep})


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        ["none", "all", "~x", "\0", "../..", "[", "{grid: []}", "1e400", "9" * 40, "a" * 400]
    ),
    st.builds(list),
    st.builds(dict),
    st.builds(lambda: {"grid": [1, 2]}),
    st.lists(st.integers(), max_size=3),
)


@functools.cache
def texts() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in SWEEPS]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(place for key, one in inner for place in places(one, (*path, key)))][
        0 if path else 1 :
    ]


@st.composite
def mutated_values(draw: st.DrawFn) -> Any:
    """A shipped sweep with some values exchanged, removed or put in twice."""
    sweep = yaml.safe_load(draw(st.sampled_from(texts())))
    for _ in range(draw(st.integers(1, 4))):
        known = places(sweep)
        if not known:
            break
        *path, last = draw(st.sampled_from(known))
        holder = functools.reduce(lambda value, key: value[key], path, sweep)
        action = draw(st.sampled_from(["set", "set", "remove", "twice"]))
        if action == "remove":
            del holder[last]
        elif action == "twice" and isinstance(holder, list):
            holder.append(holder[last])
        else:
            holder[last] = draw(SCALARS)
    return sweep


@st.composite
def mutated_texts(draw: st.DrawFn) -> str:
    """The text of a shipped sweep with characters exchanged, and lines removed or put in twice."""
    text = draw(st.sampled_from(texts()))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(text) - 1)))
        action = draw(st.sampled_from(["set", "insert", "cut", "line"]))
        piece = draw(
            st.one_of(st.text(max_size=3), st.sampled_from(list("[]{}:,#&*!|>'\"%@`-? \t")))
        )
        if action == "cut":
            text = text[:at] + text[at + draw(st.integers(1, 40)) :]
        elif action == "line":
            lines = text.splitlines(keepends=True)
            line = draw(st.sampled_from(lines)) if lines else ""
            text = text[:at] + "\n" + line + text[at:]
        else:
            text = text[:at] + piece + text[at + (action == "set") :]
    return text


def is_answered(given: Any, folder: Path) -> None:
    """A plan, or the faults, and nothing else."""
    if isinstance(given, str):
        file = folder / "s.yaml"
        file.write_text(given, encoding="utf-8", errors="surrogatepass")
        given = file
    with contextlib.suppress(SpecError):
        build_plan(ftsec_ray.load(given))


MUTATIONS = int(os.environ.get("FTSEC_TEST_MUTATIONS", "60"))
"""More of them, with what the slowest took: `python -m tests.benchmarks.bench_hostile_sweeps`."""


@pytest.mark.timeout(0 if MUTATIONS > 1000 else 300)
@settings(
    max_examples=MUTATIONS, deadline=None, suppress_health_check=list(HealthCheck), database=None
)
@given(sweep=st.one_of(mutated_values(), mutated_texts()))
def test_whatever_became_of_a_shipped_sweep_the_answer_is_a_plan_or_its_faults(
    sweep: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    is_answered(sweep, tmp_path_factory.getbasetemp())
