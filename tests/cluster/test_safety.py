"""What must never be in a file of `cluster/`, and what the files must agree on so that nothing is
open by accident.
"""

from __future__ import annotations

import json
import re

import pytest
import yaml

from tests.cluster.files import FOLDER, LAUNCHERS, launcher, manifest, shell_lines

FILES = sorted(path for path in FOLDER.rglob("*") if path.is_file())
SECRETS = {
    "an AWS key": r"\b(AKIA|ASIA)[A-Z0-9]{16}\b",
    "a private key": r"-----BEGIN",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "a Google key": r"\bAIza[\w-]{30,}|\"private_key\"",
    "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{30,}",
    "a credential": (
        r"(?i)\b(aws_secret_access_key|password|secret_key|auth_token)\s*[:=]\s*[\"']?[\w/+]{8,}"
    ),
}


def test_every_file_is_one_that_is_tested():
    assert {str(path.relative_to(FOLDER)) for path in FILES} == {
        "README.md",
        "Dockerfile",
        "Dockerfile.dockerignore",
        "aws.yaml",
        "aws-base.yaml",
        "gcp.yaml",
        "gcp-head-nodes.yaml",
        "gcp-head-reads.yaml",
        "kuberay/access.yaml",
        "kuberay/raycluster.yaml",
        "kuberay/rayjob.yaml",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_holds_a_secret_or_opens_a_port_to_the_world(path):
    text = path.read_text(encoding="utf-8")
    assert [what for what, pattern in SECRETS.items() if re.search(pattern, text)] == []
    for word in ("0.0.0.0", "::/0", "LoadBalancer", "NodePort", "--privileged"):
        assert word not in text


def test_the_patterns_find_what_they_are_for():
    for what, text in {
        "an AWS key": "AKIA" + "A" * 16,
        "a private key": "-----BEGIN RSA",
        "a Hugging Face token": "hf_" + "a" * 30,
        "a Google key": "AIza" + "b" * 35,
        "a GitHub token": "ghp_" + "c" * 36,
        "a credential": "password: hunter22",
    }.items():
        assert re.search(SECRETS[what], text)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_dashboard_of_a_launched_head_listens_on_loopback_and_no_key_file_is_sent(name):
    config = launcher(name)
    starts = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert starts
    assert all(
        "--dashboard-host=127.0.0.1" in command and "--dashboard-port=8265" in command
        for command in starts
    )
    assert not config.get("file_mounts")
    assert not {"aws_credentials", "gcp_credentials"} & set(config["provider"])
    assert set(config["auth"]) == {"ssh_user"}
    assert any(line.startswith(f"ray dashboard {name}.mine.yaml") for line in shell_lines())


class _Template(yaml.SafeLoader):
    """CloudFormation's YAML: `!Ref x` is {"!Ref": "x"}."""


_Template.add_multi_constructor("!", lambda loader, tag, node: {f"!{tag}": node.value})


@pytest.fixture(scope="module")
def base():
    return yaml.load((FOLDER / "aws-base.yaml").read_text(encoding="utf-8"), Loader=_Template)[
        "Resources"
    ]


def of_type(base, kind):
    return {
        name: one.get("Properties", {})
        for name, one in base.items()
        if one["Type"] == f"AWS::{kind}"
    }


def test_the_aws_files_name_each_other_rightly(base):
    config = launcher("aws")
    groups = {one["GroupName"] for one in of_type(base, "EC2::SecurityGroup").values()}
    assert {config["provider"]["security_group"]["GroupName"]} == groups
    profiles = {
        one["InstanceProfileName"] for one in of_type(base, "IAM::InstanceProfile").values()
    }
    assert {
        node["node_config"]["IamInstanceProfile"]["Name"]
        for node in config["available_node_types"].values()
    } == profiles
    (registry,) = of_type(base, "ECR::Repository").values()
    assert config["docker"]["image"].split("/")[-1].startswith(registry["RepositoryName"] + ":")
    text = json.dumps(base)
    assert f'"aws:ResourceTag/ray-cluster-name": "{config["cluster_name"]}"' in text
    secret = re.search(r"SecretId='([^']+)'", config["worker_start_ray_commands"][-1])[1]
    assert f"secret:{secret}-*" in text
    assert any(f"create-secret --name {secret} " in line for line in shell_lines())
    region = config["provider"]["region"]
    assert all(
        zone.startswith(region) for zone in config["provider"]["availability_zone"].split(",")
    )
    used = re.findall(r"--region (\S+)|region_name='([^']+)'", json.dumps(config))
    assert {one or other for one, other in used} == {region}


def test_the_security_group_lets_in_ssh_from_one_address_and_its_own_members(base):
    (group,) = of_type(base, "EC2::SecurityGroup").values()
    (ssh,) = group["SecurityGroupIngress"]
    assert (ssh["FromPort"], ssh["ToPort"], ssh["CidrIp"]) == (22, 22, {"!Ref": "SshFrom"})
    (among,) = of_type(base, "EC2::SecurityGroupIngress").values()
    assert (
        among["GroupId"] == among["SourceSecurityGroupId"] == {"!GetAtt": "SecurityGroup.GroupId"}
    )
    given = yaml.load((FOLDER / "aws-base.yaml").read_text(encoding="utf-8"), Loader=_Template)[
        "Parameters"
    ]["SshFrom"]["AllowedPattern"]
    assert re.match(given, "203.0.113.7/32")
    assert not re.match(given, ".".join("0000") + "/0")


def test_the_bucket_is_private(base):
    (bucket,) = of_type(base, "S3::Bucket").values()
    assert set(bucket["PublicAccessBlockConfiguration"].values()) == {True}
    assert len(bucket["PublicAccessBlockConfiguration"]) == 4


def test_the_gcp_accounts_network_and_secret_are_those_that_the_readme_makes():
    config, lines = launcher("gcp"), shell_lines()
    nodes = [node["node_config"] for node in config["available_node_types"].values()]
    accounts = {
        account["email"].split("@")[0] for node in nodes for account in node["serviceAccounts"]
    }
    assert f"for account in {' '.join(sorted(accounts))}; do" in lines
    network = {
        part.rsplit("/", 1)[1]
        for node in nodes
        for part in [node["networkInterfaces"][0]["subnetwork"]]
    }
    assert all(
        any(line.startswith(f"gcloud compute networks subnets create {name} ") for line in lines)
        for name in network
    )
    rules = [line for line in lines if line.startswith("gcloud compute firewall-rules create")]
    assert len(rules) == 2
    assert all("8265" not in line and "--source-ranges=" in line for line in rules)
    secret = re.search(r"secrets/([^/]+)/versions", config["worker_start_ray_commands"][-1])[1]
    assert any(f"gcloud secrets create {secret} " in line for line in lines)


def test_the_kubernetes_secret_is_the_one_that_the_readme_makes_and_is_named_only():
    for name in ("raycluster", "rayjob"):
        text = json.dumps(manifest(name))
        (found,) = set(re.findall(r'"secretKeyRef": (\{[^}]*\})', text))
        reference = json.loads(found)
        assert any(
            line.startswith(
                f"kubectl create secret generic {reference['name']} --from-file={reference['key']}="
            )
            for line in shell_lines()
        )
        assert reference["optional"] is True
