"""Where a job may keep what it makes: by who its nodes are, and never with a password in sight."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftsec_ray.errors import EnvironmentFault
from ftsec_ray.schedule.job_paths import (
    below,
    checked_files,
    checked_place,
    is_this_machine,
    is_uri,
)


@pytest.mark.parametrize(
    "place",
    [
        "s3://bucket/x",
        "gs://bucket/x",
        "gs://anonymous@bucket/x",
        "s3://bucket/x?region=eu-west-1&endpoint_override=host:9000",
    ],
)
def test_an_object_store_serves_every_cluster(place: str):
    for here in (True, False):
        assert checked_place(place, "store", here=here, shared_disk=False) == place


def test_a_path_serves_a_cluster_of_this_machine_alone_and_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert checked_place("a/store", "store", here=True, shared_disk=False) == str(
        tmp_path / "a/store"
    )
    assert checked_place(f"file://{tmp_path}/b", "store", here=True, shared_disk=False) == str(
        tmp_path / "b"
    )


@pytest.mark.parametrize("place", ["a/store", "/mnt/store", "file:///mnt/store"])
def test_a_path_is_refused_where_nodes_are_other_machines(place: str):
    with pytest.raises(EnvironmentFault, match="--shared-disk") as refused:
        checked_place(place, "store", here=False, shared_disk=False)
    assert place in str(refused.value)


def test_a_disk_that_all_nodes_mount_serves_by_absolute_path_only():
    assert checked_place("/mnt/store", "store", here=False, shared_disk=True) == "/mnt/store"
    with pytest.raises(EnvironmentFault, match="a relative path"):
        checked_place("store", "store", here=False, shared_disk=True)


@pytest.mark.parametrize(
    "place",
    [
        "s3://AKIAHOST:hunter2@bucket/x",
        "s3://bucket/x?access_key=A&secret_key=hunter2",
        "abfss://c@host/x?sas_token=hunter2",
        "s3://bucket/x?endpoint_override=https%3A%2F%2Fu%3Ahunter2%40host",
    ],
)
def test_a_place_with_a_password_is_refused_without_repeating_it(place: str):
    for here in (True, False):
        with pytest.raises(EnvironmentFault, match="--store contains credentials") as refused:
            checked_place(place, "store", here=here, shared_disk=True)
        assert "hunter2" not in str(refused.value)


def test_results_lie_in_the_store_whatever_its_options():
    assert below("s3://bucket/x/?region=eu", "results") == "s3://bucket/x/results?region=eu"
    assert below("/mnt/store", "results") == "/mnt/store/results"
    assert [is_uri(place) for place in ("s3://b", "file:///b", "c:/b", "b")] == [
        True,
        False,
        False,
        False,
    ]


def test_only_addresses_of_this_machine_make_a_cluster_of_this_machine():
    assert is_this_machine(["127.0.0.1"])
    assert not is_this_machine(["127.0.0.1", "203.0.113.77"])  # of a range for documentation
    assert not is_this_machine([])


def test_files_by_absolute_path_need_nodes_that_have_them():
    checked_files([], here=False, shared_disk=False)
    checked_files(["/data/rows.jsonl"], here=True, shared_disk=False)
    checked_files(["/data/rows.jsonl"], here=False, shared_disk=True)
    with pytest.raises(EnvironmentFault, match=r"/data/rows\.jsonl"):
        checked_files(["/data/rows.jsonl"], here=False, shared_disk=False)
    with pytest.raises(EnvironmentFault, match="relative path"):
        checked_files(["judges/mine"], here=True, shared_disk=True)
