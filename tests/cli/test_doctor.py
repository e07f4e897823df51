"""`ftsec doctor`: what is there, what is missing, how to get it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from ftsec_ray.cli import doctor
from ftsec_ray.cli.app import app


def test_a_machine_that_has_everything_needed_passes(tmp_path):
    result = CliRunner().invoke(app, ["doctor", "--json", "--store", str(tmp_path / "store")])
    found = {row["what"]: row for row in json.loads(result.stdout)}
    assert {"python", "torch", "ray", "cores", "memory", "disk", "hugging face"} <= set(found)
    assert result.exit_code == (
        3 if any(row["state"] == "missing" for row in found.values()) else 0
    )
    assert not (tmp_path / "store").exists()


def needs(monkeypatch, texts, *, extras=()):
    """Have the metadata of the package say this, and that of all others what it says."""
    known = doctor.requires
    monkeypatch.setattr(
        doctor, "requires", lambda name: texts if name == "ftsec-ray" else known(name)
    )
    monkeypatch.setattr(doctor, "metadata", lambda name: Metadata(extras))


class Metadata:
    def __init__(self, extras):
        self.extras = list(extras)

    def get_all(self, name):
        assert name == "Provides-Extra"
        return self.extras


def findings(where):
    return {finding.what: finding for finding in doctor.examine(where)}


def test_every_requirement_of_the_package_is_looked_at(monkeypatch, tmp_path):
    from importlib.metadata import version

    needs(monkeypatch, ["numpy>=2", "torch>=2.8,<99", "tomli; python_version < '3'"])
    found = findings(tmp_path)
    assert (found["numpy"].state, found["numpy"].found) == ("ok", version("numpy"))
    assert found["torch"].state == "ok"
    assert not {"tomli", "ray", "ftsec-ray"} & found.keys()


def test_a_missing_package_gives_exit_code_3_and_the_command_that_installs_it(monkeypatch):
    needs(monkeypatch, ["no-such-package-here>=1.5; python_version > '3'"])
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 3
    assert "pip install 'no-such-package-here>=1.5'" in result.stderr


def test_a_package_out_of_range_is_as_good_as_missing(monkeypatch, tmp_path):
    from importlib.metadata import version

    needs(monkeypatch, ["numpy<2,>=1"])
    found = findings(tmp_path)["numpy"]
    assert (found.state, found.fix) == ("missing", "pip install 'numpy<2,>=1'")
    assert found.found == f"{version('numpy')}, want <2,>=1"


def test_the_extras_that_a_requirement_asks_for_are_looked_at(monkeypatch, tmp_path):
    needs(monkeypatch, ["ray[default]>=2"])
    assert findings(tmp_path)["ray"].state == "ok"
    known = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "aiohttp" else known(name))
    found = findings(tmp_path)["ray"]
    assert (found.state, found.fix) == ("missing", "pip install 'ray[default]>=2'")
    assert found.found.endswith(", without aiohttp")


def test_extras_of_the_package_may_lack_and_are_named(monkeypatch, tmp_path):
    texts = ["numpy", 'deepspeed>=0.18; extra == "deepspeed"', 'pytest; extra == "dev"']
    needs(monkeypatch, texts, extras=["deepspeed", "dev"])
    found = findings(tmp_path)
    assert [found[f"ftsec-ray[{name}]"].state for name in ("deepspeed", "dev")] == ["ok", "ok"]
    assert not {"deepspeed", "pytest"} & found.keys()
    texts[1] = 'no-such-package-here; extra == "deepspeed"'
    lacking = findings(tmp_path)["ftsec-ray[deepspeed]"]
    assert (lacking.state, lacking.fix) == ("note", "pip install 'ftsec-ray[deepspeed]'")
    assert lacking.found.startswith("without no-such-package-here; only for training")


def test_a_package_that_is_not_installed_is_told_and_not_taken_for_complete(monkeypatch, tmp_path):
    def unknown(name):
        raise doctor.PackageNotFoundError(name)

    for function in ("requires", "metadata"):
        monkeypatch.setattr(doctor, function, unknown)
    found = findings(tmp_path)["ftsec-ray"]
    assert (found.state, found.found.partition(":")[0]) == ("note", "not installed")


def test_every_extra_has_a_use():
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert doctor.EXTRA_USES.keys() == project["optional-dependencies"].keys()
    assert project["name"] == doctor.PACKAGE


def test_numerics_are_told_and_what_portable_would_set(monkeypatch, tmp_path):
    from ftsec_ray import numerics

    found = findings(tmp_path)
    assert found["numerics"].found.startswith("portable (torch AVX2, MKL branch COMPATIBLE")
    assert "MKL_CBWR=COMPATIBLE" in found["numerics: portable"].found
    assert found["numerics: portable"].state == "ok"
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    assert findings(tmp_path)["numerics"].found.startswith("fast (")
    monkeypatch.setattr(numerics, "cpu_fault", lambda: "an x86-64 CPU without avx2")
    found = findings(tmp_path)["numerics: portable"]
    assert (found.state, "numerics: fast" in found.fix) == ("note", True)
    assert "without avx2" in found.found


def test_offline_hugging_face_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = {finding.what: finding for finding in doctor.examine(tmp_path)}
    assert "offline" in found["hugging face"].found
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert (
        "downloads allowed" in {f.what: f for f in doctor.examine(tmp_path)}["hugging face"].found
    )


def test_memory_is_that_of_the_machine_or_less():
    import psutil

    assert 0 < doctor.memory_bytes() <= psutil.virtual_memory().total * 1.01


@pytest.mark.timeout(60)
def test_a_cluster_that_is_not_there_is_missing(tmp_path):
    found = [f for f in doctor.examine(tmp_path, address="127.0.0.1:1") if f.what == "cluster"]
    assert [f.state for f in found] == ["missing"]


def image_findings():
    return {finding.what: finding for finding in doctor.examine_image()}


def test_an_image_needs_a_cuda_build_of_torch_where_a_laptop_does_not():
    import torch

    cuda = image_findings()["cuda"]
    assert cuda.state == ("ok" if torch.version.cuda else "missing")
    assert (torch.version.cuda or "CPU only") in cuda.found


def test_an_image_needs_the_commands_that_launchers_call(monkeypatch, tmp_path):
    (tmp_path / "rsync").write_text("#!/bin/sh\n")
    (tmp_path / "rsync").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = image_findings()
    assert found["rsync"].state == "ok"
    assert {name: found[name].state for name in ("ssh", "wget", "bash")} == {
        "ssh": "missing",
        "wget": "missing",
        "bash": "missing",
    }
    assert found["ssh"].fix.startswith("apt-get install openssh-client")


def test_an_image_needs_every_package_of_its_extras_in_a_version_that_fits(monkeypatch):
    requirements = {
        "ray": [
            'aiohttp>=3; extra == "default"',
            'no-such-package-here; extra == "default"',
            'other; extra == "tune"',
        ],
        "ftsec-ray": ['numpy<1; extra == "cluster"', "torch"],
    }
    monkeypatch.setattr(doctor, "requires", requirements.get)
    found = image_findings()
    assert (found["ray[default]"].state, found["ray[default]"].found) == (
        "missing",
        "without no-such-package-here",
    )
    assert (found["ftsec-ray[cluster]"].state, found["ftsec-ray[cluster]"].found) == (
        "missing",
        "without numpy",
    )
    requirements["ray"].pop(1)
    assert image_findings()["ray[default]"].state == "ok"
    requirements["ftsec-ray"].clear()
    assert image_findings()["ftsec-ray[cluster]"].found == "without the extra"


def test_the_check_of_an_image_names_what_lacks_and_ends_with_exit_code_3(monkeypatch):
    monkeypatch.setitem(
        doctor.IMAGE_COMMANDS, "no-such-command-here", ("no-such-package", "this test")
    )
    result = CliRunner().invoke(app, ["doctor", "--image", "--json"])
    assert result.exit_code == 3
    assert "this image cannot be a node" in result.stderr
    assert "apt-get install no-such-package (this test)" in result.stderr
    assert {row["what"]: row["state"] for row in json.loads(result.stdout)}[
        "no-such-command-here"
    ] == "missing"
