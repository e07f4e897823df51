"""The walks of CONTRIBUTING.md: every file that it shows is written into a copy of the package, or
into a package beside it, and works there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ftsec_ray.version import __version__
from tests.test_end_to_end import filled, sweep

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`(ftsec_ray/[\w/]+\.py)`:\n\n```python\n(.*?)```", TEXT, re.M | re.S))
"""Path -> the whole file, as the document shows it."""
RUN = """
import json
from pathlib import Path
import ftsec_ray
sweep = json.loads(Path("sweep.json").read_text())
results = ftsec_ray.run(sweep, executor="local", store="store", results="out")
print(json.dumps({
    "metrics": results.metrics.select(["cell", "metric", "value", "n"]).to_pylist(),
    "answers": results.generations.select(["cell", "probe", "completion"]).to_pylist(),
    "stages": [[s["kind"], s["method"]] for s in results.stages.to_pylist()],
    "status": [c["status"] for c in results.cells.to_pylist()],
}))
"""
SHUFFLE = """
import json
from pathlib import Path
from ftsec_ray.context import Runtime, StageContext
from ftsec_ray.registry import DEFENSES
from tests.fixtures_models import prompts, tiny_task
task = tiny_task()
context = StageContext(seed=0, task=task, runtime=Runtime(), workdir=Path("w"), load=None)
shuffle, rows = DEFENSES.get("shuffle"), task.split("train")
print(json.dumps([prompts(rows), *(
    prompts(shuffle(share=share).craft_data(rows, context)) for share in (0.0, 0.5)
)]))
"""


def says(folder, *command):
    """What Python prints there, with the copy of the package before the one under test."""
    paths = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "100"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A copy of the package with every file of the document in it."""
    folder = tmp_path_factory.mktemp("walks")
    shutil.copytree(
        ROOT / "ftsec_ray", folder / "ftsec_ray", ignore=shutil.ignore_patterns("__pycache__")
    )
    for path, text in FILES.items():
        assert not (folder / path).exists(), f"{path} is there already"
        (folder / path).write_text(text, encoding="utf-8")
    return folder


def test_every_python_block_of_the_document_is_a_whole_file():
    assert sorted(FILES) == [
        "ftsec_ray/defenses/rounding.py",
        "ftsec_ray/defenses/shuffle.py",
        "ftsec_ray/judges/terse.py",
        "ftsec_ray/stages/answer_words.py",
        "ftsec_ray/stages/compress.py",
    ]
    assert TEXT.count("```python") == len(FILES)


def test_the_files_of_the_document_keep_the_house_style(package):
    names = [str(package / path) for path in FILES]
    config = ["--config", str(ROOT / "pyproject.toml")]
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *config, *names],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_method_of_the_document_is_one_file_and_acts(package):
    shown = says(package, "-m", "ftsec_ray", "show", "shuffle")
    assert "share" in shown
    assert "Share of the rows that are shuffled" in shown
    before, control, after = json.loads(says(package, "-c", SHUFFLE))
    assert control == before, "its control changes nothing"
    changed = [one != other for one, other in zip(before, after, strict=True)]
    assert 0.2 < sum(changed) / len(changed) < 0.8
    assert all(
        sorted(one.split()) == sorted(other.split())
        for one, other in zip(before, after, strict=True)
    )


LOWER_CASE = """
import json
from ftsec_ray.context import Runtime, StageContext
from ftsec_ray.conversation import asked_text, with_asked
from ftsec_ray.data.rows import map_rows
from ftsec_ray.registry import DEFENSES
from tests.fixtures_models import prompts, tiny_task
task = tiny_task()
context = StageContext(seed=0, task=task, runtime=Runtime(), workdir=None, load=None)
rows = map_rows(task.split("train"), lambda row: with_asked(row, asked_text(row).upper()))
lower = DEFENSES.get("lower_case")
print(json.dumps([prompts(rows), *(
    prompts(lower(share=share).craft_data(rows, context)) for share in (0.0, 1.0)
)]))
"""


def test_the_method_of_the_readme_is_one_file_and_acts(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = readme.split("## Add a method")[1].split("```python\n")[1].split("```")[0]
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "ftsec_ray", tmp_path / "ftsec_ray", ignore=ignored)
    (tmp_path / "ftsec_ray/defenses/lower_case.py").write_text(block, encoding="utf-8")
    assert "Share of the prompts" in says(tmp_path, "-m", "ftsec_ray", "show", "lower_case")
    before, control, after = json.loads(says(tmp_path, "-c", LOWER_CASE))
    assert control == before, "its control changes nothing"
    assert after == [prompt.lower() for prompt in before] != before


def test_the_metric_of_the_judge_is_listed_and_the_hook_of_the_stage_kind(package):
    assert "terse_rate" in says(package, "-m", "ftsec_ray", "list", "metrics")
    kinds = says(package, "-m", "ftsec_ray", "list", "stages")
    assert kinds.index("revise_model") < kinds.index("compress_model")
    assert kinds.index("compress_model") < kinds.index("wrap_generation")


@pytest.mark.timeout(600)
def test_a_sweep_runs_the_methods_the_judge_the_metric_and_the_stage_kinds(package):
    changes = {
        "attacks": ["none"],
        "defenses": ["none", ["shuffle", "rounding"]],
        "evaluation": {"prompts": 8, "max_new_tokens": 4, "judges": ["terse"]},
    }
    (package / "world").mkdir()
    described = sweep(filled(package / "world"), **changes)
    (package / "sweep.json").write_text(json.dumps(described))
    told = json.loads(says(package, "-c", RUN).strip().splitlines()[-1])
    assert told["status"] == ["done", "done"]
    assert ["craft", "shuffle"] in told["stages"]
    assert ["compress", "rounding"] in told["stages"]
    measured = {(row["cell"], row["metric"]): row for row in told["metrics"]}
    cells = {cell for cell, _ in measured}
    assert len(cells) == 2
    for cell in cells:
        words = [
            len(answer["completion"].split())
            for answer in told["answers"]
            if (answer["cell"], answer["probe"]) == (cell, "benign")
        ]
        assert words
        assert measured[cell, "answer_words"]["value"] == pytest.approx(sum(words) / len(words))
        assert measured[cell, "answer_words"]["n"] == len(words)
        terse = sum(count <= 8 for count in words)
        assert measured[cell, "terse_rate"]["value"] == terse / len(words)


def test_the_plug_in_of_the_document_is_found_by_its_entry_point(tmp_path):
    block = TEXT.split("```toml\n")[1].split("```")[0]
    project = tomllib.loads(block)["project"]
    info = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {module}" for name, module in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (module,) = project["entry-points"]["ftsec_ray.defenses"].values()
    folder = tmp_path / module.split(".")[0]
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / f"{module.split('.')[1]}.py").write_text(FILES["ftsec_ray/defenses/shuffle.py"])
    (name,) = project["entry-points"]["ftsec_ray.defenses"]
    assert name in says(tmp_path, "-m", "ftsec_ray", "list", "defenses")
    assert "Share of the rows" in says(tmp_path, "-m", "ftsec_ray", "show", name)


def test_the_version_is_that_of_the_images_and_of_the_newest_section_of_the_changelog():
    tags = {
        tag
        for path in (ROOT / "cluster").rglob("*")
        if path.is_file()
        for tag in re.findall(r"ftsec-ray:([\w.]+)", path.read_text(encoding="utf-8"))
    }
    assert tags == {__version__}
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \[([\d.]+)\]", changelog, re.M)[0] == __version__
