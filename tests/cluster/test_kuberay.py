"""The manifests: valid for KubeRay's definitions, and a head and workers as a sweep wants them."""

from __future__ import annotations

import copy
import shlex

import pytest
import yaml
from typer.testing import CliRunner

from ftsec_ray import api
from ftsec_ray.cli.app import app
from tests.cluster.files import FOLDER, ROOT, cluster_of, definition, manifest, shell_lines, strict

NAMES = ("raycluster", "rayjob")
SPOT_MARKS = {
    "cloud.google.com/gke-spot": "true",
    "eks.amazonaws.com/capacityType": "SPOT",
    "karpenter.sh/capacity-type": "spot",
    "kubernetes.azure.com/scalesetpriority": "spot",
}


@pytest.mark.parametrize("name", NAMES)
def test_kuberays_definition_accepts_the_manifest_and_no_misspelt_key(name):
    jsonschema = pytest.importorskip("jsonschema")
    given, kind = manifest(name), definition(f"{name}s")
    version = given["apiVersion"].removeprefix(kind["spec"]["group"] + "/")
    schema = next(
        one["schema"]["openAPIV3Schema"]
        for one in kind["spec"]["versions"]
        if one["name"] == version and one["served"]
    )
    assert given["kind"] == kind["spec"]["names"]["kind"]
    validator = jsonschema.Draft202012Validator(strict(schema))
    plain = {**given, "metadata": {}}  # the definition leaves metadata to Kubernetes
    assert [error.message for error in validator.iter_errors(plain)] == []
    for path, value in (
        (("enableInTreeAutoscalin",), True),
        (("autoscalerOptions", "version"), "v3"),
        (("workerGroupSpecs", 0, "minReplicas"), "0"),
        (("headGroupSpec", "template", "spec", "containers", 0, "imag"), "x"),
    ):
        broken = copy.deepcopy(plain)
        place = cluster_of(broken)
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        assert not validator.is_valid(broken), path


def pods(given):
    """Every pod template of a manifest by what it is for."""
    cluster, spec = cluster_of(given), given["spec"]
    found = {
        "head": cluster["headGroupSpec"]["template"],
        **{group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]},
    }
    return found | (
        {"submitter": spec["submitterPodTemplate"]} if "submitterPodTemplate" in spec else {}
    )


def fits(terms, marks):
    """Whether a node with these labels meets one of the terms of a node affinity."""

    def meets(rule):
        has = marks.get(rule["key"]) in rule["values"]
        return has if rule["operator"] == "In" else not has

    return any(all(meets(rule) for rule in term["matchExpressions"]) for term in terms)


@pytest.mark.parametrize("name", NAMES)
def test_workers_go_on_spot_nodes_of_any_cloud_and_the_head_never_does(name):
    cluster = cluster_of(manifest(name))
    terms = {}
    for role, group in (
        ("head", cluster["headGroupSpec"]),
        ("worker", cluster["workerGroupSpecs"][0]),
    ):
        affinity = group["template"]["spec"]["affinity"]["nodeAffinity"]
        terms[role] = affinity["requiredDuringSchedulingIgnoredDuringExecution"][
            "nodeSelectorTerms"
        ]
    for key, value in SPOT_MARKS.items():
        assert fits(terms["worker"], {key: value})
        assert not fits(terms["head"], {key: value})
    for on_demand in (
        {},
        {"eks.amazonaws.com/capacityType": "ON_DEMAND"},
        {"karpenter.sh/capacity-type": "on-demand"},
    ):
        assert fits(terms["head"], on_demand)
        assert not fits(terms["worker"], on_demand)


@pytest.mark.parametrize("name", NAMES)
def test_workers_come_from_none_and_a_stage_of_the_surveys_sweep_fits_into_one(name):
    from ftsec_ray.schedule.capacity import bundles_of

    cluster = cluster_of(manifest(name))
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    bundles = bundles_of(api.load(ROOT / "sweeps" / "paper_1b_4b.yaml"), ["cpu", "gpu"])
    for group in cluster["workerGroupSpecs"]:
        assert (group["minReplicas"], group["replicas"]) == (0, 0)
        assert group["maxReplicas"] > 0
        assert not {"labels", "resources"} & set(group), (
            "the autoscaler reads what the pod asks for"
        )
        assert group["rayStartParams"] == {}
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        has = {"CPU": float(limits["cpu"]), "GPU": float(limits["nvidia.com/gpu"])}
        assert all(
            has[what] >= amount for bundle in bundles.values() for what, amount in bundle.items()
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_worker_has_time_to_drain_before_it_is_killed(name):
    pod = pods(manifest(name))["spot-gpu"]["spec"]
    drain = next(
        one["value"]
        for one in pod["containers"][0]["env"]
        if one["name"] == "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    )
    assert float(drain) < 25 < pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_listens_outside_the_clusters_network_and_every_call_needs_the_token(name):
    cluster = cluster_of(manifest(name))
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not {"enableIngress", "ingressOptions", "headService"} & set(cluster["headGroupSpec"])
    assert cluster["authOptions"] == {"mode": "token"}
    for template in pods(manifest(name)).values():
        assert not template["spec"].get("hostNetwork")
        assert not [
            port
            for container in template["spec"]["containers"]
            for port in container.get("ports", ())
            if "hostPort" in port
        ]


def test_the_network_policy_is_that_of_all_pods_and_lets_in_only_them_and_the_operator():
    *accounts, policy = yaml.safe_load_all(
        (FOLDER / "kuberay" / "access.yaml").read_text(encoding="utf-8")
    )
    label = policy["spec"]["podSelector"]["matchLabels"]
    among, operator = policy["spec"]["ingress"]
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert among == {"from": [{"podSelector": {"matchLabels": label}}]}
    assert [port["port"] for port in operator["ports"]] == [8265]
    (source,) = operator["from"]
    namespace = source["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"]
    assert any(
        line.startswith("helm install kuberay-operator") and f"--namespace {namespace} " in line
        for line in shell_lines()
    )
    used = set()
    for name in NAMES:
        for role, template in pods(manifest(name)).items():
            assert template["metadata"]["labels"].items() >= label.items(), (name, role)
            used |= {template["spec"].get("serviceAccountName")} - {None}
    assert used == {account["metadata"]["name"] for account in accounts}


@pytest.mark.parametrize("name", NAMES)
def test_no_pod_has_more_rights_than_it_needs(name):
    for role, template in pods(manifest(name)).items():
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"], role
        assert all(
            not one["securityContext"]["allowPrivilegeEscalation"] for one in pod["containers"]
        ), role
        assert (pod.get("automountServiceAccountToken") is False) == (role != "head"), (
            "only the head's autoscaler speaks to Kubernetes"
        )


def test_the_job_runs_a_command_that_exists_on_the_sweep_that_it_mounts():
    given = manifest("rayjob")
    program, *arguments = shlex.split(given["spec"]["entrypoint"])
    assert program == "ftsec"
    assert not set("$`;|&") & set(given["spec"]["entrypoint"]), (
        "the submitter's shell would read it first"
    )
    done = CliRunner().invoke(app, [*arguments, "--help"])
    assert done.exit_code == 0, done.output
    assert arguments[arguments.index("--store") + 1] == "s3://a-bucket/ftsec"
    head = pods(given)["head"]["spec"]
    (volume,) = head["volumes"]
    (mount,) = head["containers"][0]["volumeMounts"]
    assert mount["name"] == volume["name"]
    config = volume["configMap"]["name"]
    made = next(
        line for line in shell_lines() if line.startswith(f"kubectl create configmap {config} ")
    )
    assert f"{mount['mountPath']}/{made.split('--from-file=')[1].split('=')[0]}" == arguments[1]


def test_both_manifests_describe_the_same_cluster():
    one, other = (cluster_of(manifest(name)) for name in NAMES)
    head = other["headGroupSpec"]["template"]["spec"]
    del head["volumes"], head["containers"][0]["volumeMounts"]
    assert one == other
