"""The image: built from files that exist, holding what `ftsec doctor --image` asks for, and checked
by it.
"""

from __future__ import annotations

import fnmatch
import io
import re
import shlex
import tomllib

import pytest
from packaging.requirements import Requirement

from ftsec_ray.cli import doctor
from tests.cluster.files import (
    FOLDER,
    LAUNCHERS,
    ROOT,
    VALUES,
    cluster_of,
    launcher,
    manifest,
    shell_lines,
)

dockerfile_parse = pytest.importorskip("dockerfile_parse")


@pytest.fixture(scope="module")
def steps():
    """(instruction, value) of every step, in order; build arguments are filled in where pip reads
    them.
    """
    parser = dockerfile_parse.DockerfileParser(
        fileobj=io.BytesIO((FOLDER / "Dockerfile").read_bytes())
    )
    return [
        (step["instruction"], step["value"])
        for step in parser.structure
        if step["instruction"] != "COMMENT"
    ]


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pip_installs(steps):
    """What pip is asked for, with the image's Ray version filled in."""
    version = next(
        value.split("=")[1]
        for kind, value in steps
        if kind == "ARG" and value.startswith("RAY_VERSION=")
    )
    lines = [value for kind, value in steps if kind == "RUN" and value.startswith("pip install ")]
    return [
        word.replace("${RAY_VERSION}", version) for line in lines for word in shlex.split(line)[2:]
    ], version


def test_the_last_step_checks_the_image_as_its_own_user(steps):
    assert steps[-1] == ("RUN", "ftsec doctor --image")
    users = [value for kind, value in steps if kind == "USER"]
    assert users
    assert users[-1].isdecimal(), "Kubernetes cannot see that a name is not root"
    assert int(users[-1]) > 0


def test_debian_brings_every_command_that_the_doctor_asks_for(steps):
    apt = next(value for kind, value in steps if kind == "RUN" and "apt-get install" in value)
    packages = set(re.search(r"apt-get install (.*?)&&", apt, flags=re.DOTALL)[1].split())
    assert {package for package, _ in doctor.IMAGE_COMMANDS.values()} <= packages
    assert doctor.IMAGE_COMMANDS


def test_pip_brings_every_package_and_every_extra_that_the_doctor_asks_for(steps, project):
    asked, version = pip_installs(steps)
    extras = {
        name: set(match[1].split(","))
        for one in asked
        if (match := re.search(r"\[(.*)\]", one))
        for name in [one.split("[")[0]]
    }
    for name, (extra, _) in doctor.IMAGE_EXTRAS.items():
        assert extra in extras["." if name == project["name"] else name]
    ray = Requirement(next(text for text in project["dependencies"] if text.startswith("ray")))
    assert version in ray.specifier
    torch = next(Requirement(one) for one in asked if one.startswith("torch"))
    assert (
        torch.specifier
        == next(
            Requirement(text) for text in project["dependencies"] if text.startswith("torch")
        ).specifier
    )


def test_the_image_takes_every_extra_that_a_run_can_need(steps, project):
    asked, _ = pip_installs(steps)
    own = next(one for one in asked if one.startswith(".["))
    assert set(own[2:-1].split(",")) == set(project["optional-dependencies"]) - {
        "dev",
        "bench",
        "sign",
    }


def test_what_is_copied_exists_and_is_not_hidden_from_the_build(steps):
    lines = (FOLDER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    shown = {line[1:] for line in lines if line.startswith("!")}
    copied = [word for kind, value in steps if kind == "COPY" for word in value.split()[:-1]]
    assert "*" in lines
    assert set(copied) == shown
    assert all((ROOT / name).exists() for name in copied)
    assert not any(fnmatch.fnmatch(".git", name) for name in shown)


def test_all_files_speak_of_one_image_and_one_ray(steps):
    _, version = pip_installs(steps)
    clusters = [cluster_of(manifest(name)) for name in ("raycluster", "rayjob")]
    images = {launcher(name)["docker"]["image"] for name in LAUNCHERS}
    for cluster in clusters:
        assert cluster["rayVersion"] == version
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            images |= {one["image"] for one in group["template"]["spec"]["containers"]}
    images |= {
        one["image"]
        for one in manifest("rayjob")["spec"]["submitterPodTemplate"]["spec"]["containers"]
    }
    (image,) = images
    assert image.startswith(VALUES["REGISTRY"] + "/")
    built = [line for line in shell_lines() if line.startswith("docker build")]
    assert built
    assert all(
        f"-f cluster/Dockerfile -t $REGISTRY/{image.removeprefix(VALUES['REGISTRY'] + '/')} ."
        in line
        for line in built
    )


def test_the_images_python_is_one_that_the_package_runs_on(steps, project):
    base = next(value for kind, value in steps if kind == "FROM")
    found = re.fullmatch(r"python:(\d+\.\d+)-slim-bookworm", base)
    assert found
    assert Requirement(f"python{project['requires-python']}").specifier.contains(found[1] + ".1")
