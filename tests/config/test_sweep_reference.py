"""The reference of the sweep file says what the code says, and its examples load."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from ftsec_ray.config.faults import Faults
from ftsec_ray.config.sweep_file import KEYS, load_sweep
from ftsec_ray.config.task_entries import COLUMNS, SPLITS
from ftsec_ray.config.yaml_text import read_yaml
from ftsec_ray.errors import SpecFaults
from ftsec_ray.registry import ATTACKS, DEFENSES
from tests import sweep_reference
from tests.document_blocks import DOCUMENTS, RESULTS, ROOT, SWEEP_FILE, blocks_of
from tests.shipped_sweeps import FILES
from tests.sweep_reference import BLOCK, PLACES, TABLES, mapping_at, whole_schema, written

jsonschema = pytest.importorskip("jsonschema")
SMALLEST = {
    "name": "example",
    "models": "ladder:0.2m",
    "task": "microworld",
    "attacks": "none",
    "defenses": "none",
}
"""What completes an example of some keys to a sweep."""
EXAMPLES = [
    pytest.param(block, id=f"{document.relative_to(ROOT)}-{number}")
    for document in DOCUMENTS
    for number, block in enumerate(blocks_of(document, "yaml"))
]


def table_names(text: str) -> list[str]:
    return [match[2] for match in BLOCK.finditer(text)]


@pytest.mark.parametrize("document", sweep_reference.DOCUMENTS, ids=lambda path: path.name)
def test_the_generated_tables_are_those_of_the_code(document):
    text = document.read_text(encoding="utf-8")
    assert text.count("<!-- generated:") == len(table_names(text)) > 0
    for match in BLOCK.finditer(text):
        table = text[match.end(1) : match.start(3)]
        assert table == TABLES[match[2]](), (
            f"table {match[2]!r} of {document.name} is not what the code says: run `make docs`"
        )


def test_every_table_stands_once_in_the_documents():
    names = [name for path in sweep_reference.DOCUMENTS for name in table_names(path.read_text())]
    assert sorted(names) == sorted(TABLES)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("| `rank` | ", "| `ranks` | "),
        ("| `16.0` |", "| `32.0` |"),
        ("LoRA rank.", "LoRA rank, 1 to 8."),
        ("[vaccine_rho.yaml](vaccine_rho.yaml)", "[vaccine.yaml](vaccine.yaml)"),
    ],
)
def test_a_table_that_was_edited_by_hand_is_noticed_and_made_right(right, wrong):
    text = SWEEP_FILE.read_text(encoding="utf-8")
    assert right in text
    edited = text.replace(right, wrong)
    assert written(edited) == text != edited


def test_text_outside_of_the_tables_is_left_as_it_is():
    text = "before\n<!-- generated: budget -->\nold\n<!-- end -->\nafter | `rank` |\n"
    made = written(text)
    assert made.startswith("before\n<!-- generated: budget -->\n| key | type |")
    assert made.endswith("|\n<!-- end -->\nafter | `rank` |\n")


def mappings(node: Any, place: str = "") -> Iterator[tuple[str, frozenset[str]]]:
    """Every mapping with named keys in a JSON schema, by its place."""
    if isinstance(node, list):
        for item in node:
            yield from mappings(item, place)
    elif isinstance(node, dict):
        if "properties" in node:
            yield place, frozenset(node["properties"])
        for key, value in node.items():
            yield from mappings(value, f"{place}.{key}")


def test_no_mapping_of_the_sweep_file_is_left_out():
    methods = {*ATTACKS.names(), *DEFENSES.names()}
    in_tables = {frozenset(mapping_at(place)["properties"]) for place in PLACES.values()}
    in_prose = {frozenset(keys) for keys in (SPLITS, COLUMNS, ["grid"], ["low", "high", "log"])}
    missing = {
        place: sorted(keys)
        for place, keys in mappings({**whole_schema(), "$defs": {}})
        if keys not in in_tables | in_prose
    }
    assert missing == {}
    for axis in ("attack", "defense"):
        choices = [one["properties"] for one in whole_schema()["$defs"][axis]["anyOf"][1:]]
        assert {name for choice in choices for name in choice} <= methods
    assert set(mapping_at("")["properties"]) == set(KEYS)


@pytest.mark.parametrize("name", PLACES)
def test_every_key_has_a_type_a_default_and_a_meaning(name):
    lines = TABLES[name]().splitlines()[2:]
    assert lines
    for line in lines:
        key, kind, default, _, meaning = re.split(r"(?<!\\)\|", line.strip("|"))
        assert key.strip(" `") in mapping_at(PLACES[name])["properties"]
        assert kind.strip(), line
        assert default.strip(), line
        assert len(meaning.split()) >= 1, line
        assert "None" not in meaning, "a sweep file writes null"


def test_a_number_without_a_unit_is_refused(monkeypatch):
    monkeypatch.delitem(sweep_reference.UNITS, "resources.timeout_s")
    with pytest.raises(KeyError, match=r"give the unit of resources\.timeout_s in UNITS"):
        TABLES["resources"]()


def test_a_key_without_a_default_is_refused(monkeypatch):
    monkeypatch.delitem(sweep_reference.DEFAULTS, "models.family")
    with pytest.raises(KeyError, match=r"give the default of models\.family in DEFAULTS"):
        TABLES["models"]()


@pytest.mark.parametrize("known", ["UNITS", "DEFAULTS", "TYPES"])
def test_what_is_said_by_hand_is_about_keys_that_exist(known):
    for place in getattr(sweep_reference, known):
        table, _, key = place.partition(".")
        mapping = mapping_at(PLACES[table])
        assert key in mapping["properties"], place
        assert known != "DEFAULTS" or key not in mapping.get("required", ()), place


def test_the_splits_of_a_task_are_all_listed():
    text = SWEEP_FILE.read_text(encoding="utf-8")
    rows = text.partition("| split | rows | used by |\n")[2].partition("\n\n")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", rows, re.MULTILINE)) == SPLITS
    sentence = text.partition("`columns` may give\n")[2].partition("once for all")[0]
    assert set(re.findall(r"`(\w+)`", sentence)) == set(COLUMNS)


@pytest.fixture
def folder(tmp_path):
    """A folder with the files that the examples name."""
    for model in ("models/x", "models/qwen2.5-0.5b-instruct"):
        (tmp_path / model).mkdir(parents=True)
        (tmp_path / model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for name in ("models/x.gguf", "rows.jsonl", "requests.csv", "judges/small.gguf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "rubric.txt").write_text("{request} {answer}: yes or no?")
    for name in ("chatml.jinja", "plain.jinja"):
        template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        (tmp_path / name).write_text(template)
    return tmp_path


def parsed(block: str) -> Any:
    faults = Faults("the example")
    given = read_yaml(block, faults)
    faults.check()
    return given


@pytest.mark.parametrize("block", EXAMPLES)
def test_an_example_loads(block, folder):
    given = parsed(block)
    assert load_sweep({**SMALLEST, **given}, base=folder)
    as_json = json.loads(json.dumps({**SMALLEST, **given}))
    faults = jsonschema.Draft202012Validator(whole_schema()).iter_errors(as_json)
    assert [(fault.json_path, fault.message) for fault in faults] == []


def test_an_example_with_a_slip_does_not_load(folder):
    (block,) = [one for one in blocks_of(SWEEP_FILE, "yaml") if "search:" in one]
    given = parsed(block.replace("trials: 12", "trails: 12"))
    with pytest.raises(SpecFaults, match=r"trails(?s:.)*trials"):
        load_sweep({**SMALLEST, **given}, base=folder)


def sections(text: str) -> dict[str, str]:
    first, *rest = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    return {"": first, **dict(zip(rest[::2], rest[1::2], strict=True))}


def test_every_measured_table_stands_below_the_commands_that_make_it():
    parts = sections(RESULTS.read_text(encoding="utf-8"))
    tables = {title: text for title, text in parts.items() if "\n|" in text}
    assert len(tables) >= 6
    for title, text in tables.items():
        before = text.partition("\n|")[0]
        commands = "\n".join(re.findall(r"```bash\n(.*?)```", before, flags=re.DOTALL))
        made = {f"sweeps/{path.name}" for path in FILES if f"sweeps/{path.name}" in commands}
        assert len(made) == 1, title
        assert re.search(r"^(ftsec run|make \w+)", commands, re.MULTILINE), title
        assert re.search(r"^(ftsec (report|claims)|python -m)", commands, re.MULTILINE), title
        assert re.search(r"\bseeds?\b", before), f"{title}: how many seeds?"
