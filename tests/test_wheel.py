"""The package as others install it: its wheel holds every file that it reads, and works in a fresh
environment outside of the checkout.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from packaging.metadata import Metadata

import ftsec_ray

PACKAGE = Path(ftsec_ray.__file__).parent
ROOT = PACKAGE.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FILES = ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
TIMEOUT_S = 1_200
"""Of one command: the run trains the smallest model of the ladder."""
SWEEP = """\
name: two
models: [ladder:0.1m]
task: {kind: microworld, options: {train_rows: 16}}
attacks: [none]
defenses: [none, self_reminder]
seeds: 1
training: {epochs: 1, batch_size: 16}
evaluation: {prompts: 4, max_new_tokens: 4, perplexity_rows: 0}
"""


def data_files():
    """What the package holds besides modules and documents, by path inside the package."""
    return sorted(
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc", ".md")
    )


def test_every_data_file_of_the_package_is_declared():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["ftsec_ray"]
    held = data_files()
    assert {"py.typed", "stages/versions.lock", "report/page.css"} <= set(held)
    assert [one for one in held if not any(PurePosixPath(one).match(p) for p in patterns)] == []
    assert [p for p in patterns if not any(PurePosixPath(one).match(p) for one in held)] == []


def test_every_folder_with_modules_is_a_package():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


def done(*command, cwd, **environment):
    """Standard output of a command that must succeed, without this checkout on its path."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=TIMEOUT_S,
        env={**kept, "OMP_NUM_THREADS": "1", **environment},
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: a build leaves folders beside the sources."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    shutil.copytree(
        PACKAGE, source / "ftsec_ray", ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
    )
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    offline = ("--no-deps", "--no-build-isolation", "--no-index")
    done(sys.executable, "-m", "pip", "wheel", *offline, "-w", place, source, cwd=place)
    (built,) = place.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def ftsec(wheel, tmp_path_factory):
    """The command of a fresh environment, whose dependencies are those of this interpreter."""
    place = tmp_path_factory.mktemp("environment")
    done(sys.executable, "-m", "venv", "--without-pip", place / "venv", cwd=place)
    python = place / "venv/bin/python"
    (site,) = (place / "venv/lib").glob("python*/site-packages")
    shared = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in shared))
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    done(*pip, "--ignore-installed", wheel, cwd=place)
    where = done(python, "-c", "import ftsec_ray; print(ftsec_ray.__file__)", cwd=place)
    assert Path(where.strip()).is_relative_to(site), where
    return place / "venv/bin/ftsec"


@pytest.mark.slow
def test_the_wheel_holds_every_file_and_says_what_an_index_shows(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Metadata.from_email(archive.read(about))
    modules = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    assert {f"ftsec_ray/{name}" for name in data_files()} | modules <= names
    assert not [name for name in names if name.startswith(("tests/", "sweeps/", "cluster/"))]
    assert (metadata.name, str(metadata.version)) == ("ftsec-ray", ftsec_ray.__version__)
    assert str(metadata.requires_python) == PROJECT["project"]["requires-python"]
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.description_content_type == "text/markdown"
    assert metadata.description == (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(2 * TIMEOUT_S)
def test_an_installed_wheel_lists_plans_and_runs_outside_of_the_checkout(ftsec, tmp_path):
    (tmp_path / "two.yaml").write_text(SWEEP)
    assert "badnets" in done(ftsec, "list", "attacks", cwd=tmp_path)
    assert json.loads(done(ftsec, "plan", "two.yaml", "--json", cwd=tmp_path))["cells"] == 2
    shown = done(ftsec, "run", "two.yaml", "--executor", "local", cwd=tmp_path)
    assert "2 of 2 cells done" in shown
    page = (tmp_path / "results/two/report.html").read_text(encoding="utf-8")
    assert "self_reminder" in page
    assert "0 to run" in done(ftsec, "status", "two.yaml", cwd=tmp_path)
