"""What travels with a job: the right files at the right places, the same bytes every time, and
nothing else.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

import ftsec_ray
from ftsec_ray.config.sweep_file import load_sweep
from ftsec_ray.errors import EnvironmentFault
from ftsec_ray.schedule import upload

SWEEP = """\
models: [{path: ../models/tiny, family: tiny, aligned: true}, ladder:0.2m]
task:
  kind: rows
  splits:
    train: {path: ../rows/train.jsonl, prompt: prompt, response: response}
    test: {path: ABSOLUTE, prompt: prompt, response: response}
attacks: [none]
defenses: [none]
"""


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep two folders deep that names a folder and a file by relative path and a file by
    absolute path.
    """
    for name in (
        "a/sweeps/s.yaml",
        "a/models/tiny/config.json",
        "a/models/tiny/.cache/secret",
        "a/models/tiny/__pycache__/x.pyc",
        "a/rows/train.jsonl",
        "a/rows/other.jsonl",
        "a/.git/config",
        "a/results/run.json",
        "far/test.jsonl",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    path = tmp_path / "a/sweeps/s.yaml"
    path.write_text(SWEEP.replace("ABSOLUTE", str(tmp_path / "far/test.jsonl")))
    return path


def test_the_sweep_and_what_it_names_by_relative_path_keep_their_places(
    sweep: Path, tmp_path: Path
):
    sent = upload.upload_of(sweep, load_sweep(sweep), package=False)
    assert (sent.sweep, sorted(sent.files)) == (
        "sweeps/s.yaml",
        ["models/tiny/config.json", "rows/train.jsonl", "sweeps/s.yaml"],
    )
    assert sent.left_out == (str(tmp_path / "far/test.jsonl"),)
    with zipfile.ZipFile(sent.write(tmp_path / "one.zip")) as archive:
        archive.extractall(tmp_path / "there")
    there = load_sweep(tmp_path / "there" / sent.sweep)
    assert there.models[0].source == str(tmp_path / "there/models/tiny")
    assert (tmp_path / "there" / sent.sweep).read_text() == sweep.read_text()


def test_what_lies_behind_a_link_is_sent_under_the_name_of_the_link(sweep: Path, tmp_path: Path):
    (tmp_path / "a/models").rename(tmp_path / "elsewhere")
    (tmp_path / "a/models").symlink_to(tmp_path / "elsewhere")
    sent = upload.upload_of(sweep, load_sweep(sweep), package=False)
    assert "models/tiny/config.json" in sent.files
    assert sent.left_out == (str(tmp_path / "far/test.jsonl"),)


def test_a_sweep_without_files_is_sent_alone(tmp_path: Path):
    path = tmp_path / "s.yaml"
    path.write_text("models: [ladder:0.2m]\ntask: microworld\nattacks: [none]\ndefenses: [none]\n")
    sent = upload.upload_of(path, load_sweep(path), package=False)
    assert (sent.sweep, list(sent.files), sent.left_out) == ("s.yaml", ["s.yaml"], ())


def test_the_same_files_give_the_same_bytes_whenever_they_were_written(sweep: Path, tmp_path: Path):
    spec = load_sweep(sweep)
    first = upload.upload_of(sweep, spec, package=False).write(tmp_path / "one.zip").read_bytes()
    row = tmp_path / "a/rows/train.jsonl"
    row.touch()
    assert (
        upload.upload_of(sweep, spec, package=False).write(tmp_path / "two.zip").read_bytes()
        == first
    )
    row.write_text('{"prompt": 1}')
    assert (
        upload.upload_of(sweep, spec, package=False).write(tmp_path / "three.zip").read_bytes()
        != first
    )


def test_the_package_goes_along_whole_and_small(sweep: Path, tmp_path: Path):
    sent = upload.upload_of(sweep, load_sweep(sweep), package=True)
    package = Path(ftsec_ray.__file__).parent
    ours = {name for name in sent.files if name.startswith("ftsec_ray/")}
    assert {
        "ftsec_ray/__main__.py",
        "ftsec_ray/report/page.html.j2",
        "ftsec_ray/py.typed",
        "ftsec_ray/attacks/badnets.py",
    } <= ours
    assert len(ours) >= len(list(package.rglob("*.py")))
    assert not [
        name for name in sent.files if "__pycache__" in name or name.startswith(("tests/", ".git"))
    ]
    assert sent.write(tmp_path / "p.zip").stat().st_size < 2**20


def test_what_is_too_large_for_the_job_api_is_refused_with_the_file_that_makes_it_so(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "a/models/tiny/weights.safetensors").write_bytes(b"0" * 5000)
    monkeypatch.setattr(upload, "LIMIT_BYTES", 4000)
    sent = upload.upload_of(sweep, load_sweep(sweep), package=False)
    with pytest.raises(EnvironmentFault, match=r"models/tiny/weights\.safetensors"):
        sent.write(tmp_path / "large.zip")
    assert not (tmp_path / "large.zip").exists()


def test_a_folder_outside_of_site_packages_is_a_checkout(tmp_path: Path):
    import sysconfig

    assert upload.is_checkout(tmp_path / "ftsec_ray")
    assert not upload.is_checkout(Path(sysconfig.get_path("purelib")).resolve() / "ftsec_ray")
