"""What travels with a job: the right files at the right places, the same bytes every time, and
nothing else.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

import ftsec_ray
from ftsec_ray.config.sweep_file import load_sweep
from ftsec_ray.errors import EnvironmentFault, SpecError
from ftsec_ray.schedule import upload
from ftsec_ray.schedule.key_files import is_key_name

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


def test_what_lies_behind_a_link_inside_is_sent_under_the_name_of_the_link(
    sweep: Path, tmp_path: Path
):
    (tmp_path / "a/models").rename(tmp_path / "a/elsewhere")
    (tmp_path / "a/models").symlink_to(tmp_path / "a/elsewhere")
    sent = upload.upload_of(sweep, load_sweep(sweep), package=False)
    assert "models/tiny/config.json" in sent.files
    assert sent.left_out == (str(tmp_path / "far/test.jsonl"),)


@pytest.mark.parametrize("place", ["models", "models/tiny", "rows", "rows/train.jsonl"])
def test_a_link_out_of_the_folder_on_the_way_to_what_is_named_is_refused(
    sweep: Path, tmp_path: Path, place: str
):
    outside = tmp_path / f"outside{Path(place).suffix}"
    (tmp_path / "a" / place).rename(outside)
    (tmp_path / "a" / place).symlink_to(outside)
    with pytest.raises(SpecError, match="out of the folder that would be uploaded") as caught:
        upload.upload_of(sweep, load_sweep(sweep), package=False)
    assert str(outside) in str(caught.value.got)
    assert "--shared-disk" in str(caught.value)


@pytest.mark.parametrize("target", ["/etc/hostname", "../../far/test.jsonl", "../../far", "gone"])
def test_a_link_out_of_a_model_folder_is_refused(sweep: Path, tmp_path: Path, target: str):
    spec = load_sweep(sweep)
    (tmp_path / "a/models/tiny/notes.txt").symlink_to(target)
    with pytest.raises(SpecError, match=r"notes\.txt -> ") as caught:
        upload.upload_of(sweep, spec, package=False)
    assert "out of the folder" in caught.value.what or "broken link" in caught.value.what


KEYS = [
    *("id_rsa", "id_ed25519.pub", "server.pem", "Server.KEY", "a.p12", "a.pfx", "a.kdbx", "b.env"),
    *("credentials", "credentials.json", "aws_credentials.csv", "client_secret_12.json"),
    *("my-service-account.json", "kubeconfig", "kubeconfig.yaml", "prod.kubeconfig", "token"),
    *("hf_token", "hf_token.txt", "my_token.txt", "api_key.txt", "secrets.yaml", "secret.txt"),
    *("password.txt", "x.tfstate", "terraform.tfvars", "rclone.conf", "_netrc", "a.gpg", "x.ovpn"),
    *("authorized_keys", "known_hosts", "passwd", "shadow", "credentials.csv", "secrets.jsonl.age"),
]


@pytest.mark.parametrize("name", KEYS)
def test_a_file_that_holds_keys_by_its_name_is_refused_and_named(
    sweep: Path, tmp_path: Path, name: str
):
    spec = load_sweep(sweep)
    path = tmp_path / "a/models/tiny" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("x")
    with pytest.raises(SpecError, match="look like keys") as caught:
        upload.upload_of(sweep, spec, package=False)
    assert f"models/tiny/{name}" in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        *("data/secrets.jsonl", "passwords.csv", "credentials.jsonl", "secret.parquet"),
        *("password.tsv.gz", "gcloud/sweep.yaml", "keyrings/rows.csv"),
    ],
)
def test_rows_about_secrets_are_no_keys(name: str):
    assert not is_key_name(name)


@pytest.mark.parametrize("name", [".config/gcloud/a.json", "h/.local/share/keyrings/login"])
def test_the_folders_in_which_programs_keep_keys_are_told_by_where_they_lie(name: str):
    assert is_key_name(name)


@pytest.mark.parametrize(
    "head",
    [
        "name,url,username,password,note\nExample,https://example.org,a,b,",
        '"url","username","password","httpRealm"\n"https://example.org","a","b",',
        "\ufeffUser name,Password,Access key ID,Secret access key\na,,AKIA,s",
        "-----BEGIN OPENSSH PRIVATE KEY-----\n",
        "-----BEGIN RSA PRIVATE KEY-----",
        "PuTTY-User-Key-File-3: x",
    ],
)
def test_a_key_under_a_harmless_name_is_refused(sweep: Path, tmp_path: Path, head: str):
    spec = load_sweep(sweep)
    (tmp_path / "a/models/tiny/notes.txt").write_text(head + "\nabc")
    with pytest.raises(SpecError, match=r"models/tiny/notes\.txt"):
        upload.upload_of(sweep, spec, package=False)


HIDDEN = [".env", ".netrc", ".ssh/id_rsa", ".aws/credentials", ".git/config", ".cache/token"]


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_files_of_a_folder_stay_here(sweep: Path, tmp_path: Path, name: str):
    path = tmp_path / "a/models/tiny" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("x")
    sent = upload.upload_of(sweep, load_sweep(sweep), package=False)
    assert not [one for one in sent.files if "/." in one]


@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"),
        *("added_tokens.json", "tokenizer.model", "model.safetensors", "merges.txt", "keys.jsonl"),
    ],
)
def test_the_files_of_models_are_no_keys(name: str):
    assert not is_key_name(f"models/tiny/{name}")


def test_what_is_sent_is_listed_with_sizes_in_short_lines(sweep: Path, tmp_path: Path):
    long = "n" * 90 + ".json"
    (tmp_path / "a/models/tiny" / long).write_text("x" * 2048)
    (tmp_path / "a/models/tiny/bad\x1b[2J.txt").write_text("x")
    lines = upload.upload_of(sweep, load_sweep(sweep), package=True).listed(80)
    assert all(len(line) <= 80 and line.isprintable() for line in lines)
    assert any(line.endswith("KiB  rows/train.jsonl") for line in lines)
    assert any(line.lstrip().startswith("2.0 KiB  models/tiny/nnn") for line in lines)
    assert any("\\x1b[2J" in line for line in lines)
    assert lines[-1].endswith(" files of ftsec_ray/"), "one line for the package"
    assert len(lines) == 6


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
    assert sent.write(tmp_path / "p.zip").stat().st_size < 2**21


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
