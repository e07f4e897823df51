"""What must not happen: code run from an artifact, a path outside of store and results, a secret in
anything written.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import ftsec_ray
from ftsec_ray import api
from ftsec_ray.config.sweep_file import load_sweep
from ftsec_ray.context import Runtime
from ftsec_ray.errors import FtsecError, SpecError, SpecFaults, StoreError
from ftsec_ray.execute.session import Session
from ftsec_ray.execute.unit import run_unit
from ftsec_ray.models.load import save_model
from ftsec_ray.registry import ATTACKS, DEFENSES
from ftsec_ray.store import DamagedArtifact, Store
from ftsec_ray.store.record import files_of
from tests.fixtures_models import tiny_model
from tests.schedule.engine_runners import stage_of

PACKAGE = Path(ftsec_ray.__file__).parent
ROOT = PACKAGE.parent
ONE = "1" * 32
UNPICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "_pickle"}
LOADERS = {"eval", "exec", "compile", "__import__", "read_pickle", "allow_pickle"}


# Nothing is unpickled.


def calls_of_package():
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield path.relative_to(ROOT).as_posix(), node


def test_no_module_imports_what_unpickles():
    names = [
        (where, alias.name)
        for where, node in calls_of_package()
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    ]
    froms = [
        (where, node.module)
        for where, node in calls_of_package()
        if isinstance(node, ast.ImportFrom) and node.module
    ]
    assert len(names) > 500
    assert [one for one in names + froms if one[1].split(".")[0] in UNPICKLERS] == []


def test_no_call_loads_objects_or_runs_text():
    found, seen = [], 0
    for where, node in calls_of_package():
        if not isinstance(node, ast.Call):
            continue
        seen += 1
        name = ast.unparse(node.func)
        words = {keyword.arg: keyword.value for keyword in node.keywords}
        if (
            name.endswith(("torch.load", "np.load", "numpy.load"))
            or name in LOADERS
            or name.rsplit(".", 1)[-1] in ("read_pickle", "unsafe_load")
        ):
            found.append(f"{where}:{node.lineno} {name}")
        if name in ("yaml.load", "yaml.full_load", "yaml.load_all") or "allow_pickle" in words:
            found.append(f"{where}:{node.lineno} {name}")
        trusted = words.get("trust_remote_code")
        if isinstance(trusted, ast.Constant) and trusted.value is not False:
            found.append(f"{where}:{node.lineno} trusts remote code")
    assert seen > 2000
    assert found == []


def test_remote_code_is_off_wherever_there_is_a_default():
    defaults = []
    for where, node in calls_of_package():
        if isinstance(node, ast.FunctionDef):
            pairs = [
                *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True),
                *zip(node.args.args[::-1], node.args.defaults[::-1], strict=False),
            ]
            defaults += [
                (where, ast.unparse(value))
                for arg, value in pairs
                if arg.arg == "trust_remote_code" and value is not None
            ]
        if (
            isinstance(node, ast.AnnAssign)
            and ast.unparse(node.target) == "trust_remote_code"
            and node.value is not None
        ):
            defaults.append((where, ast.unparse(node.value)))
    assert len(defaults) >= 2
    assert {value for _, value in defaults} == {"False"}


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (Path(self.path), "boom"))


def model_artifact(store):
    folder = store.scratch(ONE)
    save_model(tiny_model(), folder)
    store.publish(ONE, folder, {"kind": "source"})
    return store.root / "artifacts" / ONE[:2] / ONE


def with_matching_record(folder, files):
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps({**record, "files": files}))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "state.pkl", "adapter_model.bin", "weights.ckpt"]
)
def test_a_planted_pickle_is_never_loaded_even_with_a_record_that_names_it(tmp_path, name):
    store, mark = Store.open(tmp_path / "store"), tmp_path / "boom"
    folder = model_artifact(store)
    files = files_of(folder)
    (folder / "model.safetensors").unlink()
    del files["model.safetensors"]
    (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
    from ftsec_ray.identity import sha256

    with_matching_record(
        folder,
        {**files, name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}},
    )
    with pytest.raises(DamagedArtifact, match="is the name of a pickle"):
        Session(Store.open(store.uri), Runtime(), 1.0).model(ONE)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))  # noqa: S301 - the bomb works
    assert mark.exists()


@pytest.mark.parametrize("name", ["extra.json", "model/evil.py", "pytorch_model.bin"])
def test_a_file_that_the_record_does_not_name_makes_the_artifact_absent(tmp_path, name):
    store = Store.open(tmp_path / "store")
    folder = model_artifact(store)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    with pytest.raises(DamagedArtifact, match="is not in its record"):
        Store.open(store.uri).fetch(ONE)
    assert store.done() == set()
    assert not (tmp_path / "boom").exists()


def test_weights_that_are_a_pickle_under_a_good_name_are_not_executed(tmp_path):
    store, mark = Store.open(tmp_path / "store"), tmp_path / "boom"
    folder = model_artifact(store)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb(mark)))
    with_matching_record(folder, files_of(folder))
    with pytest.raises(Exception, match=r"(?i)header|safetensors|deserializ"):
        Session(Store.open(store.uri), Runtime(), 1.0).model(ONE)
    assert not mark.exists()


def test_a_pickle_is_not_published(tmp_path):
    store = Store.open(tmp_path / "store")

    def pickles(stage, out, session):
        (out / "state.pkl").write_bytes(b"x")

    verdict = run_unit([stage_of("one")], store, None, pickles)[0]
    assert (verdict.status, verdict.error_code) == ("failed", "store")
    assert "state.pkl" in verdict.error
    assert store.done() == set()


# No path leaves its folder.

SWEEP = {
    "name": "fine",
    "models": ["ladder:0.2m"],
    "task": "microworld",
    "attacks": ["none"],
    "defenses": ["none"],
}
EVIL = [
    "../../x",
    "/etc/passwd",
    "..",
    ".",
    "a/b",
    "a\\b",
    "~root",
    "x\x00y",
    "a b",
    "",
    ".hidden",
    "C:evil",
    "x/../../y",
    "x..y",
    "con\n",
]


@pytest.mark.parametrize("name", EVIL)
def test_a_sweep_cannot_be_named_out_of_the_results_folder(name):
    with pytest.raises(SpecFaults, match="not a name"):
        load_sweep({**SWEEP, "name": name})


@pytest.mark.parametrize("name", [*EVIL[:4], "a/b"])
def test_a_spec_made_by_hand_cannot_either(tmp_path, name):
    from dataclasses import replace

    spec = replace(load_sweep(SWEEP), name=name)
    with pytest.raises(SpecError, match="not valid as a folder name"):
        api.run(spec, store=tmp_path / "store", results=tmp_path / "results", executor="local")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("name", [name for name in EVIL if ":" not in name])
def test_models_and_tasks_cannot_be_named_as_paths(name):
    with pytest.raises(SpecFaults, match="not a name"):
        load_sweep({**SWEEP, "models": [{"source": "ladder:0.2m", "name": name}]})
    with pytest.raises(SpecFaults, match="not a name"):
        load_sweep({**SWEEP, "task": {"kind": "microworld", "name": name}})


@pytest.mark.parametrize(
    "name",
    [
        "../../x",
        "/etc/passwd",
        "os.path",
        "badnets/../lisa",
        "ftsec_ray.attacks.badnets",
        "__init__",
        "base",
    ],
)
def test_methods_are_names_of_the_registry_and_never_paths_or_modules(name):
    for axis in ("attacks", "defenses"):
        with pytest.raises(SpecFaults, match="unknown"):
            load_sweep({**SWEEP, axis: [name]})
    for registry in (ATTACKS, DEFENSES):
        with pytest.raises(SpecError):
            registry.get(name)


@pytest.mark.parametrize(
    "source", ["../../../etc", "owner/../../x", "a//b", "owner/name/more", "-owner/x"]
)
def test_a_model_source_is_a_model_or_refused(source, tmp_path):
    with pytest.raises(SpecFaults):
        load_sweep({**SWEEP, "models": [source]}, base=tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch {mark}']",
        "!!python/name:os.system",
        "!!python/module:os",
    ],
)
def test_a_sweep_file_makes_no_python_objects(tmp_path, text):
    mark = tmp_path / "mark"
    (tmp_path / "x.yaml").write_text(
        "name: x\nmodels: [ladder:0.2m]\ntask: microworld\nattacks: [none]\ndefenses:"
        f" {text.format(mark=mark)}\n"
    )
    with pytest.raises(SpecFaults, match="not valid YAML"):
        load_sweep(tmp_path / "x.yaml")
    assert not mark.exists()


@pytest.mark.parametrize(
    "name",
    ["../../../../secret", "/etc/hostname", "a/../../x", "", "a\\..\\b", "a/./b", "a//b", "x\x00"],
)
def test_a_record_names_files_inside_of_its_artifact_or_is_damaged(tmp_path, name):
    store = Store.open(tmp_path / "store")
    folder = store.scratch(ONE)
    (folder / "a").write_text("x")
    store.publish(ONE, folder, {})
    with_matching_record(
        store.root / "artifacts" / "11" / ONE, {name: {"bytes": 1, "sha256": "0" * 64}}
    )
    with pytest.raises(DamagedArtifact, match="outside of it"):
        Store.open(store.uri).fetch(ONE)


@pytest.mark.parametrize("files", [None, [], {"a": None}, {"a": {"bytes": 1}}, {"a": "x"}])
def test_a_record_with_a_malformed_list_of_files_is_damaged(tmp_path, files):
    store = Store.open(tmp_path / "store")
    folder = store.scratch(ONE)
    (folder / "a").write_text("x")
    store.publish(ONE, folder, {})
    with_matching_record(store.root / "artifacts" / "11" / ONE, files)
    with pytest.raises(DamagedArtifact, match="its record"):
        Store.open(store.uri).fetch(ONE)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_in_an_artifact_makes_it_absent(tmp_path, kind):
    store = Store.open(tmp_path / "store")
    folder = store.scratch(ONE)
    (folder / "part").mkdir()
    (folder / "part" / "a").write_text("x")
    store.publish(ONE, folder, {})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a").write_text("x")  # the very bytes of the record
    held = store.root / "artifacts" / "11" / ONE / "part"
    (held / "a").unlink()
    if kind == "file":
        (held / "a").symlink_to(tmp_path / "elsewhere" / "a")
    else:
        held.rmdir()
        held.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedArtifact, match="is a link"):
        Store.open(store.uri).fetch(ONE)
    assert (tmp_path / "elsewhere" / "a").read_text() == "x"


def test_a_link_in_what_a_stage_wrote_is_not_published(tmp_path):
    store = Store.open(tmp_path / "store")

    def links(stage, out, session):
        (out / "passwd").symlink_to("/etc/passwd")

    verdict = run_unit([stage_of("one")], store, None, links)[0]
    assert verdict.status == "failed"
    assert "only regular files and folders" in verdict.error
    assert store.done() == set()


def test_an_adapter_whose_base_is_a_path_is_refused(tmp_path):
    store = Store.open(tmp_path / "store")
    folder = store.scratch(ONE)
    (folder / "model.json").write_text(
        json.dumps({"format": "adapter", "base": "../../../../etc", "info": {}})
    )
    store.publish(ONE, folder, {})
    with pytest.raises(StoreError, match="not the digest of an artifact"):
        Session(store, Runtime(), 1.0).model(ONE)


def test_strange_files_beside_the_verdicts_are_not_read(tmp_path):
    store = Store.open(tmp_path / "store")
    store.write_verdict(ONE, {"error": "nan", "error_code": "stage"})
    (store.root / "verdicts" / "..evil.json").write_text("{}")
    (store.root / "verdicts" / f"{'2' * 32}.json").write_text("{half")
    (store.root / "verdicts" / f"{'3' * 32}.json").write_text("[]")
    assert set(store.failures()) == {ONE}


# No secret is written.

SECRETS = {
    "HF_TOKEN": "hf_PlantedPlantedPlanted0001",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+access/key0002",
    "AWS_SESSION_TOKEN": "planted-session-0003",
    "DB_PASSWORD": "planted-password-0004",
}
KEY = "-----BEGIN PRIVATE KEY-----\nplantedkey0005\n-----END PRIVATE KEY-----\n"
PLANTED = (
    "PlantedPlanted",
    "planted/secret",
    "planted-session",
    "planted-password",
    "plantedkey",
    "plantedid",
    "planted%2Fsecret",
)


def environment(folder):
    credentials = folder / "elsewhere" / "google.json"
    credentials.parent.mkdir()
    credentials.write_text(
        json.dumps(
            {"type": "service_account", "private_key": KEY, "private_key_id": "plantedid0006"}
        )
    )
    return {
        **os.environ,
        **SECRETS,
        "GOOGLE_APPLICATION_CREDENTIALS": str(credentials),
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder / "home"),
        "XDG_CACHE_HOME": str(folder / "home" / "cache"),
        "HF_HOME": str(folder / "home" / "hf"),
        "COLUMNS": "400",
    }


def texts(folder):
    """Everything below a folder as text: tables as their values, the rest as it is."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield (
                path,
                (
                    str(pq.read_table(path).to_pylist())
                    if path.suffix == ".parquet"
                    else path.read_bytes().decode(errors="replace")
                ),
            )


def leaks(folder, ended):
    written = dict(texts(folder))
    written |= {"stdout": ended.stdout, "stderr": ended.stderr}
    return written, [
        (str(where), planted)
        for where, text in written.items()
        for planted in PLANTED
        if planted in text
    ]


def test_secrets_of_the_environment_reach_no_record_no_log_and_no_report(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "s.yaml").write_text(
        "name: leaky\nmodels: [ladder:0.2m]\ntask: microworld\nattacks: [none, badnets, badedit]\n"
        "defenses: [none, shrink]\n"
    )
    planted = environment(tmp_path)
    for verb in (
        ["run", "s.yaml", "--executor", "local"],
        ["status", "s.yaml", "--json"],
        ["status", "s.yaml"],
        ["report", "s.yaml"],
    ):
        ended = subprocess.run(
            [sys.executable, "-m", "tests.leaky", *verb],
            cwd=work,
            env=planted,
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
        )
        assert ended.returncode in (0, 1), ended.stderr
        written, found = leaks(work, ended)
        assert found == []
        assert "Traceback" not in ended.stderr
    records = [text for path, text in written.items() if str(path).endswith("record.json")]
    assert records
    assert any("[HF_TOKEN]" in text or "[redacted]" in text for text in records), (
        "the runner did put them into its notes"
    )
    verdicts = [text for path, text in written.items() if "/verdicts/" in str(path)]
    assert len(verdicts) >= 2
    assert all("403 Client Error" in text for text in verdicts)
    page = next(text for path, text in written.items() if str(path).endswith("report.html"))
    assert "403 Client Error" in page


def test_a_download_that_fails_does_not_tell_the_token_in_its_address(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    (work / "s.yaml").write_text(
        "name: hub\nmodels: [{id: owner/model, family: f, aligned: true}]\ntask:"
        " microworld\nattacks: [none]\ndefenses: [none]\ntraining: {epochs: 1}\n"
    )
    asked = []

    class Forbidden(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(403, f"{SECRETS['HF_TOKEN']} may not")

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Forbidden)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://me:{SECRETS['HF_TOKEN']}@127.0.0.1:{server.server_port}"
    ended = subprocess.run(
        [sys.executable, "-m", "ftsec_ray", "run", "s.yaml", "--executor", "local"],
        cwd=work,
        capture_output=True,
        text=True,
        env={**environment(tmp_path), "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"},
        check=False,
        timeout=240,
    )
    server.shutdown()
    server.server_close()
    assert ended.returncode == 1, ended.stderr
    assert asked
    written, found = leaks(work, ended)
    assert found == []
    assert any(
        "the model cannot be loaded" in text
        for path, text in written.items()
        if "/verdicts/" in str(path)
    )


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAX:planted-password@bucket/x",
        "s3://user@bucket/x",
        "s3://bucket/x?access_key=planted-password",
        "s3://bucket/x?secret_key=planted-password",
        "s3://bucket/x?region=a&session_token=planted-password",
        "s3://a:planted-password/y@bucket/x",
        "gs://bucket/x?access_token=planted-password",
        "s3://bucket/x?endpoint_override=me:planted-password@host:9000",
        "hdfs://me:planted-password@host/x",
        "abfs://c:planted-password@account/x",
    ],
)
def test_a_store_uri_with_a_secret_is_refused_and_not_repeated(uri):
    with pytest.raises(StoreError, match="the store URI contains") as caught:
        Store.open(uri)
    for text in (str(caught.value), repr(caught.value), str(caught.value.args)):
        assert "planted-password" not in text
    assert caught.value.__cause__ is None
    assert isinstance(caught.value, FtsecError)
    assert "environment" in caught.value.fix
