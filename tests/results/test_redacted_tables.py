"""Secrets leave the texts of tables, and nothing that only holds one by chance is torn apart."""

from __future__ import annotations

import json

import pyarrow as pa

from ftsec_ray.redact import environment_secret_in
from ftsec_ray.results.redacted_tables import redacted_tables, secret_in_table


def cleaned(**columns: list[str | None]) -> dict[str, list[str | None]]:
    table = redacted_tables({"t": pa.table(columns)})["t"]
    assert secret_in_table(table) is None, "what was cleaned once is clean"
    return table.to_pydict()


def test_a_digest_that_holds_a_short_secret_by_chance_stays(monkeypatch):
    monkeypatch.setenv("DB_PASSWORD", "abc123")
    held = cleaned(cell=["ff0abc1239", "abc123"], completion=["xabc123 abc1239", "it is abc123."])
    assert held["cell"] == ["ff0abc1239", "abc123"]
    assert held["completion"] == ["xabc123 abc1239", "it is [DB_PASSWORD]."]
    assert environment_secret_in('"ff0abc1239"') is None
    assert environment_secret_in('"abc123"') == "DB_PASSWORD"


def test_parameters_stay_json_whatever_of_them_is_a_secret(monkeypatch):
    monkeypatch.setenv("JOB_PASS", "20240101")
    held = cleaned(attack_params=['{"n":[20240101],"day":"20240101"}'])
    assert json.loads(held["attack_params"][0]) == {"n": [20240101], "day": "[JOB_PASS]"}


def test_secrets_that_no_pattern_of_arrow_takes_do_not_stop_the_tables(monkeypatch):
    monkeypatch.setenv("ODD_TOKEN", "\udcff\udcfe-not-utf8")
    assert cleaned(completion=["plain", None])["completion"] == ["plain", None]
    monkeypatch.setenv("LONG_TOKEN", long := "aB3-dE5gH1j" * 2500)
    assert cleaned(completion=["plain", f"x {long}"])["completion"] == ["plain", "x [LONG_TOKEN]"]


def test_prompts_whose_ids_differ_in_a_secret_alone_stay_two(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "plantedvalue77")
    monkeypatch.setenv("B_TOKEN", "plantedvalue78")
    ids = ["a plantedvalue77", "a hf_" + "aB3dE5gH1j" * 3, "a hf_" + "aB3dE5gH1j" * 4]
    held = cleaned(prompt_id=[*ids, ids[0]])["prompt_id"]
    assert held == ["a [A_TOKEN]", "a [redacted]", "a [redacted, 2]", "a [A_TOKEN]"]


def test_chunks_of_one_column_are_all_cleaned(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "plantedvalue77")
    column = pa.chunked_array([["plantedvalue77"], ["b plantedvalue77"]])
    table = redacted_tables({"t": pa.table({"raw": column})})["t"]
    assert table["raw"].to_pylist() == ["[A_TOKEN]", "b [A_TOKEN]"]
    assert secret_in_table(pa.table({"raw": column})) == (
        "`raw`",
        "the value of A_TOKEN in this environment",
    )
