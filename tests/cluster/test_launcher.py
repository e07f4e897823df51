"""The cluster launcher's files: valid for Ray and for the clouds' own requests, offline, and
started as they say.
"""

from __future__ import annotations

import copy
import json
import os
import stat
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from ftsec_ray import api
from tests.cluster.files import LAUNCHERS, ROOT, VALUES, launcher, prepared, strict

pytest.importorskip("jsonschema")
ON_DEMAND, SPOT = "head", "spot_gpu"


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_accepts_the_file_with_the_providers_defaults(name):
    from ray.autoscaler._private.util import validate_config

    config = prepared(name)
    validate_config(config)
    assert config["provider"]["type"] == name
    for change in (
        {"max_worker": 1},
        {"available_node_types": {"x": {}}},
        {"head_node_type": "nobody"},
    ):
        with pytest.raises(Exception, match=r"max_worker|required|must be one of"):
            validate_config({**copy.deepcopy(config), **change})


def test_ec2_accepts_every_node_as_a_request_for_an_instance():
    session = pytest.importorskip("botocore.session")
    from botocore.validate import ParamValidator

    model = session.get_session().get_service_model("ec2")
    shape, config = model.operation_model("RunInstances").input_shape, prepared("aws")
    for name, node in config["available_node_types"].items():
        request = {**node["node_config"], "MinCount": 1, "MaxCount": 1}
        assert not ParamValidator().validate(request, shape).has_errors(), (
            ParamValidator().validate(request, shape).generate_report()
        )
        assert request["InstanceType"] in model.shape_for("InstanceType").enum, name
    spot = config["available_node_types"][SPOT]["node_config"]["InstanceMarketOptions"]
    assert spot["MarketType"] in model.shape_for("MarketType").enum
    assert (
        spot["SpotOptions"]["InstanceInterruptionBehavior"]
        in model.shape_for("InstanceInterruptionBehavior").enum
    )
    broken = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, "InstanceTyp": "x"}, shape)
    assert "InstanceTyp" in broken.generate_report()


@pytest.fixture(scope="module")
def compute_engine():
    discovery = pytest.importorskip("googleapiclient.discovery_cache")
    import jsonschema

    document = json.loads(
        (Path(discovery.__file__).parent / "documents" / "compute.v1.json").read_text(
            encoding="utf-8"
        )
    )
    return jsonschema.Draft202012Validator(
        strict({"$defs": document["schemas"], "$ref": "Instance"}, refs="#/$defs/")
    )


def test_compute_engine_accepts_every_node_as_an_instance(compute_engine):
    nodes = prepared("gcp")["available_node_types"]
    for name, node in nodes.items():
        assert [
            error.message
            for error in compute_engine.iter_errors({**node["node_config"], "name": name})
        ] == []
    spot = nodes[SPOT]["node_config"]
    as_list = [{"onHostMaintenance": "TERMINATE"}]
    assert not compute_engine.is_valid({**spot, "scheduling": as_list}), (
        "Ray's own examples give a list, which Google refuses"
    )
    assert not compute_engine.is_valid({**spot, "machinetype": "x"})


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_head_is_on_demand_and_runs_no_stage(name):
    config = prepared(name)
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0
    assert not {"InstanceMarketOptions", "scheduling"} & set(head["node_config"])
    assert "--num-cpus=0" in config["head_start_ray_commands"][-1]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_worker_is_a_spot_node_that_comes_and_goes(name):
    config = prepared(name)
    workers = {
        key: node
        for key, node in config["available_node_types"].items()
        if key != config["head_node_type"]
    }
    assert workers
    assert not config["provider"]["cache_stopped_nodes"]
    for node in workers.values():
        given = node["node_config"]
        kind = (
            given["InstanceMarketOptions"]["MarketType"]
            if name == "aws"
            else given["scheduling"]["provisioningModel"]
        )
        assert kind.lower() == "spot"
        assert node["min_workers"] == 0
        assert 0 < node["max_workers"] <= config["max_workers"]


def demanded(config, *bundles):
    """What Ray's autoscaler starts on a cluster of nothing but its head, for these requests: node
    types, and requests that fit nowhere.
    """
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    typed = AutoscalingConfig(config, skip_content_hash=True)
    types = typed.get_node_type_configs()
    types[typed.get_head_node_type()].min_worker_nodes = 0
    requests = ResourceRequestUtil.group_by_count(
        [ResourceRequestUtil.make(dict(bundle)) for bundle in bundles]
    )
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=types,
            max_num_nodes=typed.get_max_num_nodes(),
            resource_requests=requests,
        )
    )
    return Counter({launch.instance_type: launch.count for launch in reply.to_launch}), len(
        reply.infeasible_resource_requests
    )


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_autoscaler_starts_spot_workers_for_stages_by_what_they_ask_for_alone(name):
    from ftsec_ray.schedule.capacity import bundles_of

    config = prepared(name)
    for node in config["available_node_types"].values():
        assert set(node["resources"]) <= {"CPU", "GPU"}
        assert "labels" not in node
    stages = bundles_of(api.load(ROOT / "sweeps" / "paper_1b_4b.yaml"), ["cpu", "gpu"])
    assert demanded(config) == (Counter(), 0)
    assert demanded(config, stages["gpu"]) == (Counter({SPOT: 1}), 0)
    assert demanded(config, stages["cpu"]) == (Counter({SPOT: 1}), 0)
    assert demanded(config, *[stages["gpu"]] * 3)[0] == Counter({SPOT: 3})
    assert demanded(config, *[stages["gpu"]] * 50)[0] == Counter({SPOT: config["max_workers"]})
    assert demanded(config, {"GPU": 2}) == (Counter(), 1)


FAKE_CLOUDS = {
    "boto3.py": (
        "class client:\n    def __init__(self, service, *, region_name): assert (service,"
        " region_name) == ('secretsmanager', {region!r})\n    def get_secret_value(self, SecretId):"
        " return {{'SecretString': {{'ftsec/hf-token': 'the-token'}}[SecretId]}}\n"
    ),
    "googleapiclient/__init__.py": "",
    "googleapiclient/discovery.py": (
        "import base64\nclass build:\n    def __init__(self, *service): assert service =="
        " ('secretmanager', 'v1')\n    projects = secrets = versions = lambda self: self\n    def"
        " access(self, *, name): self.name = name; return self\n    def execute(self):\n       "
        " found = {{'projects/{project}/secrets/ftsec-hf-token/versions/latest':"
        " b'the-token'}}[self.name]\n        return {{'payload': {{'data':"
        " base64.b64encode(found).decode()}}}}\n"
    ),
}


@pytest.mark.parametrize("has_secret", [True, False])
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_worker_starts_with_the_token_of_the_clouds_secret_store_or_without_one(
    name, has_secret, tmp_path
):
    config = launcher(name)
    if has_secret:
        for file, text in FAKE_CLOUDS.items():
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).write_text(
                text.format(region=config["provider"]["region"], project=VALUES["PROJECT_ID"])
            )
    else:
        for package in ("boto3", "googleapiclient"):
            (tmp_path / f"{package}.py").write_text("raise OSError('no such secret')\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python").symlink_to(sys.executable)
    (tools / "ray").write_text('#!/bin/bash\necho "token=$HF_TOKEN" "$@"\n')
    (tools / "ray").chmod(stat.S_IRWXU)
    command = config["worker_start_ray_commands"][-1].replace("ulimit -n 65536;", "")
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHONPATH": str(tmp_path),
            "RAY_HEAD_IP": "10.0.0.2",
        },
    )
    token = "the-token" if has_secret else ""
    assert (
        done.stdout == f"token={token} start --address=10.0.0.2:6379 --object-manager-port=8076\n"
    )
