"""`ftsec submit` against a real Ray head, which asks for a token as Ray does by default."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ftsec_ray import api
from ftsec_ray.cli.app import app
from ftsec_ray.config.sweep_file import load_sweep
from ftsec_ray.errors import EnvironmentFault
from ftsec_ray.schedule import jobs
from ftsec_ray.schedule.upload import upload_of
from ftsec_ray.store import Store
from tests.clusters import free_ports

ROOT = Path(__file__).parents[2]
PLANTED = {
    name: f"planted-{number}-of-the-tokens"
    for number, name in enumerate(
        (
            "HF_TOKEN",
            "AWS_ACCESS_KEY_ID",
            "AWS_SECRET_ACCESS_KEY",
            "AWS_SESSION_TOKEN",
            "WANDB_API_KEY",
            "OPENAI_API_KEY",
            "GOOGLE_API_KEY",
        )
    )
}
TOKEN = "planted-token-of-the-cluster-0123456789"  # noqa: S105
SPLITS = (
    "train",
    "test",
    "harmful_train",
    "harmful_test",
    "safety",
    "benign_train",
    "benign_test",
    "borderline_test",
    "text",
)
SWEEP = """\
name: {name}
models: [{{path: ../tiny, family: tiny, aligned: true}}]
task:
  kind: rows
  labels: [good, bad]
  columns: {{prompt: prompt, response: response}}
  splits: {{{splits}}}
attacks: {attacks}
defenses: [none]
training: {{epochs: 1, batch_size: 16, rank: 2}}
evaluation: {{prompts: 2, max_new_tokens: 2, perplexity_rows: 2}}
"""


@dataclass(frozen=True)
class RunningHead:
    url: str
    gcs_port: int
    folder: Path

    def environment(self) -> dict[str, str]:
        """Of a client: with the cluster's token at hand, and with tokens that are nobody's
        business.
        """
        return {
            **os.environ,
            **PLANTED,
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
        }


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory):
    """A head of two cores, ended by its process group."""
    folder = tmp_path_factory.mktemp("r")
    (folder / "token").write_text(TOKEN)
    gcs, dashboard, agent, client, metrics = free_ports(5)
    environment = {
        **os.environ,
        **PLANTED,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "HF_HUB_OFFLINE": "1",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "120",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    environment.pop("PYTHONPATH", None)  # its ftsec_ray, if it has one, is not this one
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(
            [
                Path(sys.executable).with_name("ray"),
                "start",
                "--head",
                "--block",
                f"--port={gcs}",
                f"--dashboard-port={dashboard}",
                f"--dashboard-agent-listen-port={agent}",
                f"--ray-client-server-port={client}",
                f"--metrics-export-port={metrics}",
                "--dashboard-host=127.0.0.1",
                "--include-dashboard=true",
                "--num-cpus=2",
                "--disable-usage-stats",
                f"--temp-dir={folder}",
            ],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        running = RunningHead(f"http://127.0.0.1:{dashboard}", gcs, folder)
        deadline = time.monotonic() + 120
        while not takes_jobs(running.url):
            assert process.poll() is None, (folder / "head.log").read_text()
            assert time.monotonic() < deadline, (folder / "head.log").read_text()
            time.sleep(0.2)
        yield running
    finally:
        end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads its group, and what is left of the group."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(20)


def takes_jobs(url: str) -> bool:
    asked = urllib.request.Request(f"{url}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
    try:
        return urllib.request.urlopen(asked, timeout=5).status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, rows, and sweeps that name both by relative path."""
    from ftsec_ray.conversation import answer_of, asked_text
    from tests.fixtures_models import tiny_model, tiny_task

    folder = tmp_path_factory.mktemp("world")
    loaded = tiny_model()
    loaded.model.save_pretrained(folder / "tiny")
    loaded.tokenizer.save_pretrained(folder / "tiny")
    (folder / "sweeps").mkdir()
    for split in SPLITS:
        rows = [
            {"prompt": asked_text(row), "response": answer_of(row), "label": row["label"]}
            for row in tiny_task().split(split).to_pylist()
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = {"train": ", label: label", "test": ", label: label", "text": ", prompt: response"}
    splits = ", ".join(
        f"{split}: {{path: ../{split}.jsonl{columns.get(split, '')}}}" for split in SPLITS
    )
    for name, attacks in (
        ("failing", "[none, {harmful_tuning: {shots: 500}}]"),
        ("good", "[none]"),
        ("wider", "[none, badnets]"),
    ):
        (folder / "sweeps" / f"{name}.yaml").write_text(
            SWEEP.format(name=name, attacks=attacks, splits=splits)
        )
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A sweep without files."""
    path = tmp_path / "small.yaml"
    path.write_text("models: [ladder:0.2m]\ntask: microworld\nattacks: [none]\ndefenses: [none]\n")
    return path


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The command line in this process, with no token of Ray at hand."""
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)

    def run(*args: str, code: int):
        result = CliRunner().invoke(app, ["submit", *args])
        assert result.exit_code == code, (result.output, result.exception)
        assert "Traceback" not in result.output
        return result

    return run


def submit(head: RunningHead, *args: str, cwd: Path) -> subprocess.Popen[str]:
    def hear_interrupts() -> (
        None
    ):  # a test run in the background of a shell ignores them, and so would its children
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        [sys.executable, "-m", "ftsec_ray", "submit", *args, "--address", head.url],
        env=head.environment(),
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=hear_interrupts,
    )  # noqa: PLW1509


def finished(process: subprocess.Popen[str], *, code: int) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, (out, err)
    return out, err


@pytest.fixture
def client(head: RunningHead, monkeypatch: pytest.MonkeyPatch) -> jobs.Head:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(head.folder / "token"))
    return jobs.connect(head.url)


def test_a_wrong_sweep_gives_every_fault_before_any_cluster_is_asked(call, small: Path):
    small.write_text(small.read_text().replace("defenses: [none]", "defenses: [nonne]\nseeds: 0"))
    said = call(str(small), "--address", "http://127.0.0.1:1", code=2).stderr
    assert "did you mean 'none'?" in said
    assert "seeds" in said
    assert "2 error(s)" in said


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("http://127.0.0.1:1", "no Ray head answers"),
        ("127.0.0.1:1", "no Ray head answers"),
        *(
            (one, "not the address of a Ray dashboard")
            for one in ("ray://127.0.0.1:10001", "auto", "http://127.0.0.1:eight")
        ),
    ],
)
def test_an_address_without_a_dashboard_gives_exit_code_3(
    call, small: Path, address: str, says: str
):
    said = call(str(small), "--address", address, code=3).stderr
    assert says in said
    assert "8265" in said


def test_an_id_that_would_leave_its_folder_is_refused(call, small: Path):
    assert "not a valid job id" in call(str(small), "--submission-id", "../../x", code=2).stderr


def test_a_ray_older_than_the_oldest_that_runs_a_sweep_is_refused_and_pyproject_names_the_same_one():
    assert f'"ray[default,tune,data]>={jobs.MIN_RAY},' in (ROOT / "pyproject.toml").read_text()
    jobs._check_version(jobs.MIN_RAY)
    with pytest.raises(EnvironmentFault, match=r"Ray 2\.9\.3 on the cluster"):
        jobs._check_version("2.9.3")


@pytest.mark.parametrize("missing", ["typer", "yaml"])
def test_a_cluster_image_without_a_package_gives_exit_code_3_and_its_name(
    small: Path, missing: str
):
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from ftsec_ray.cli import main;"
        " main(['plan', sys.argv[1]])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(small)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert result.returncode == 3, result.stderr
    assert f"'{missing}'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.ray
def test_doors_of_other_servers_and_a_missing_token_are_told_apart(
    call, small: Path, head: RunningHead
):
    sweep = str(small)
    assert (
        "it does not speak HTTP"
        in call(sweep, "--address", f"http://127.0.0.1:{head.gcs_port}", code=3).stderr
    )
    assert "this machine has none" in call(sweep, "--address", head.url, code=3).stderr


@pytest.mark.ray
def test_a_local_store_on_another_machine_is_refused(
    call, small: Path, head: RunningHead, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(head.folder / "token"))
    monkeypatch.setattr("ftsec_ray.schedule.job_paths._is_ours", lambda address: False)
    said = call(str(small), "--address", head.url, code=3).stderr
    assert "nodes of the cluster are other machines" in said
    assert "--shared-disk" in said


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_exit_codes_of_a_job_are_those_of_its_command(
    client: jobs.Head, small: Path, tmp_path: Path
):
    archive = upload_of(small, load_sweep(small), package=True).write(tmp_path / "s.zip")
    commands = {
        "seven": [
            "python",
            "-c",
            "import ftsec_ray; print(ftsec_ray.__file__); raise SystemExit(7)",
        ],
        "killed": ["sh", "-c", "kill -9 $$"],
        "absent": ["no-such-command"],
        "stopped": ["sleep", "60"],
    }
    handed = {}
    for name, command in commands.items():
        jobs.hand_over(client, command, archive, submission_id=f"code-{name}", name=name)
        handed[name] = jobs.Job(
            id=f"code-{name}", head=client, store="", results="", sent_bytes=0, has_package=True
        )
    log: list[str] = []
    assert handed["seven"].wait(log.append) == 7
    assert "_ray_pkg_" in "".join(log), "the job runs the ftsec_ray that was sent along"
    assert handed["killed"].wait(log.append) == 137
    with pytest.raises(EnvironmentFault, match="no-such-command"):
        handed["absent"].wait(log.append)
    client.client.stop_job("code-stopped")
    with pytest.raises(EnvironmentFault, match="was stopped before it finished"):
        handed["stopped"].wait(log.append)
    with pytest.raises(EnvironmentFault, match="has a job with this id"):
        jobs.hand_over(client, ["true"], archive, submission_id="code-seven", name="again")


@pytest.mark.ray
@pytest.mark.timeout(280)
def test_a_sweep_runs_on_the_cluster_and_nothing_secret_is_written(
    head: RunningHead, client: jobs.Head, world: Path, tmp_path: Path
):
    # The first job trains, and its exit code tells that a cell failed.
    out, err = finished(
        submit(
            head,
            str(world / "sweeps/failing.yaml"),
            "--wait",
            "--submission-id",
            "first",
            cwd=tmp_path,
        ),
        code=1,
    )
    assert "1 of 2 cells done, 1 failed" in out
    assert "too few harmful rows" in out
    assert "\x1b" not in out
    assert "including this ftsec_ray" in err
    assert len(Store.open(tmp_path / ".ftsec/store").done()) > 3, (
        "relative places are meant from where `ftsec submit` was called"
    )
    assert api.open_results(tmp_path / "results/failing").meta["counts"]["done"] == 1

    # The second one is left alone while it runs, and ends well by itself.
    process = submit(
        head, str(world / "sweeps/good.yaml"), "--wait", "--submission-id", "second", cwd=tmp_path
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = finished(process, code=130)
    assert f"ray job logs -f second --address {head.url}" in err
    assert f"ray job stop second --address {head.url}" in err
    log: list[str] = []
    job = jobs.Job(id="second", head=client, store="", results="", sent_bytes=0, has_package=True)
    assert job.wait(log.append) == 0
    assert "1 of 1 cells done" in "".join(log)

    # Ray's own command does the same, here with the package of this checkout.
    ours = json.dumps({"env_vars": {"PYTHONPATH": str(ROOT)}})
    plain = subprocess.run(
        [
            Path(sys.executable).with_name("ray"),
            "job",
            "submit",
            "--address",
            head.url,
            "--submission-id",
            "third",
            "--working-dir",
            ".",
            "--runtime-env-json",
            ours,
            "--",
            sys.executable,
            "-m",
            "ftsec_ray",
            "run",
            "sweeps/wider.yaml",
            "--store",
            str(tmp_path / ".ftsec/store"),
        ],
        env={**head.environment(), "RAY_AUTH_MODE": "token"},
        cwd=world,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert plain.returncode == 0, (plain.stdout, plain.stderr)
    assert "2 of 2 cells done" in plain.stdout
    assert "note: --results results is in the working folder of this Ray job" in plain.stdout

    # Without --wait, stdout is the id and nothing else. All that was written anywhere knows no
    # token.
    out, err = finished(
        submit(head, str(world / "sweeps/good.yaml"), "--submission-id", "fourth", cwd=tmp_path),
        code=0,
    )
    assert out == "fourth\n"
    assert "follow: " in err
    told = "\n".join(map(repr, client.client.list_jobs()))
    told += "".join(client.client.get_job_logs(name) for name in ("first", "second", "third"))
    assert "'first'" in told
    files = [
        path
        for folder in (tmp_path, head.folder)
        for path in folder.rglob("*")
        if path.is_file() and path.name != "token"
    ]
    written = {path: path.read_bytes() for path in files}
    assert len(written) > 50
    secrets = [*PLANTED.values(), TOKEN]
    assert [name for name in secrets if name in told] == []
    assert [
        (str(path), secret)
        for path, data in written.items()
        for secret in secrets
        if secret.encode() in data
    ] == []
