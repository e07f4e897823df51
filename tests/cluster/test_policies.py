"""No policy under `cluster/` has a wildcard without a condition, and none gives a right over
machines that the cluster did not make.
"""

from __future__ import annotations

import json
import re

import pytest
import yaml

from tests.cluster.files import FOLDER, README, launcher, shell_lines
from tests.cluster.policies import (
    aws_faults,
    gcp_binding_faults,
    gcp_role_faults,
    kubernetes_faults,
    statements,
)
from tests.cluster.test_safety import _Template

BLOCK = re.compile(r"```(?:json|yaml|yml)\n(.*?)```", re.DOTALL)


def documents():
    """Every document of every file, and of the README's blocks."""
    texts = {path: path.read_text(encoding="utf-8") for path in FOLDER.rglob("*.y*ml")}
    texts |= {path: path.read_text(encoding="utf-8") for path in FOLDER.rglob("*.json")}
    for number, block in enumerate(BLOCK.findall(README.read_text(encoding="utf-8"))):
        texts[README.with_name(f"README block {number}")] = block
    for path, text in texts.items():
        for document in yaml.load_all(text, Loader=_Template):
            yield path, document


def custom_roles():
    made = [shell for shell in shell_lines() if shell.startswith("gcloud iam roles create")]
    found = {}
    for line in made:
        name, file = re.search(r"create (\S+) .*--file=cluster/(\S+)", line).groups()
        found[name] = yaml.safe_load((FOLDER / file).read_text(encoding="utf-8"))
    return found


def bindings():
    return [one for one in shell_lines() if "add-iam-policy-binding" in one]


def test_no_statement_of_aws_has_a_wildcard_without_a_condition():
    found = [(path.name, one) for path, document in documents() for one in statements(document)]
    assert len(found) > 15, "the test sees the policies that it is about"
    assert [(name, fault) for name, one in found for fault in aws_faults(one)] == []


def test_no_role_of_kubernetes_reaches_beyond_its_namespace():
    kinds = [one.get("kind") for _, one in documents()]
    assert "ServiceAccount" in kinds
    assert [fault for _, one in documents() for fault in kubernetes_faults(one)] == []


def test_the_roles_and_bindings_of_google_cloud_are_of_the_clusters_own_nodes():
    roles = custom_roles()
    assert len(roles) == 2
    assert [fault for role in roles.values() for fault in gcp_role_faults(role)] == []
    assert len(bindings()) > 6
    assert [fault for one in bindings() for fault in gcp_binding_faults(one, roles)] == []
    config = launcher("gcp")
    zone, name = config["provider"]["availability_zone"], config["cluster_name"]
    (own,) = [one for one in bindings() if "ftsecHeadNodes" in one]
    assert f"/zones/{zone}/instances/ray-{name}-'" in own
    assert f"/zones/{zone}/disks/ray-{name}-'" in own


def test_the_head_on_aws_may_tag_and_end_what_the_launcher_makes():
    """The conditions are those that Ray's own requests meet."""
    from ray.autoscaler import tags

    own = {value for key, value in vars(tags).items() if key.startswith("TAG_RAY_")}
    own -= {tags.TAG_RAY_CLUSTER_NAME, "ray-user-node-type"}
    found = [one for _, document in documents() for one in statements(document)]
    (later,) = [one for one in found if "ForAllValues:StringEquals" in one.get("Condition", {})]
    allowed = set(later["Condition"]["ForAllValues:StringEquals"]["aws:TagKeys"])
    assert allowed >= own
    assert "Name" in allowed
    assert tags.TAG_RAY_CLUSTER_NAME not in allowed, "or the head could make any instance its own"
    asked = json.dumps(found)
    assert f'"aws:RequestTag/{tags.TAG_RAY_CLUSTER_NAME}": "{launcher("aws")["cluster_name"]}"' in (
        asked
    )
    for node in launcher("aws")["available_node_types"].values():
        disks = node["node_config"]["BlockDeviceMappings"]
        assert all(disk["Ebs"]["Encrypted"] for disk in disks)


ANY = "arn:aws:ec2:us-east-1:1:instance/*"
OWN = {"StringEquals": {"aws:ResourceTag/ray-cluster-name": "ftsec"}}


@pytest.mark.parametrize(
    ("statement", "fault"),
    [
        ({"Action": ["ec2:RunInstances", "ec2:CreateTags"], "Resource": "*"}, "ec2:CreateTags wi"),
        ({"Action": "ec2:CreateTags", "Resource": ANY}, "without a condition on ec2:CreateAction"),
        ({"Action": "ec2:TerminateInstances", "Resource": ANY}, "aws:ResourceTag"),
        ({"Action": "ec2:Describe*", "Resource": "arn:aws:ec2:r:1:subnet/s"}, "action ec2:Desc"),
        ({"Action": "*", "Resource": "arn:aws:s3:::b", "Condition": OWN}, "action *"),
        ({"Action": "ec2:*", "Resource": "arn:aws:s3:::b", "Condition": OWN}, "action ec2:*"),
        ({"Action": "s3:GetObject", "Resource": "*"}, "resource *"),
        ({"Action": "s3:GetObject"}, "resource nothing"),
        ({"Action": "s3:GetObject", "Resource": {"!Sub": "arn:aws:s3:::*"}}, "resource arn"),
        ({"Action": "s3:GetObject", "Resource": ["arn:aws:s3:::b/k", "*"]}, "resource *"),
        ({"Action": "ec2:RunInstances", "Resource": ANY}, "resource arn"),
        ({"Action": "ec2:RunInstances", "Resource": "arn:aws:ec2:*:1:subnet/s"}, "resource arn"),
        ({"Action": "iam:PassRole", "Resource": "*", "Condition": OWN}, "PassRole of any"),
        ({"Action": "iam:PassRole", "Resource": "arn:aws:iam::1:role/*"}, "PassRole of any"),
        ({"NotAction": "iam:PassRole", "Resource": "arn:aws:s3:::b"}, "NotAction"),
        ({"Action": "s3:GetObject", "NotResource": "arn:aws:s3:::b"}, "NotResource"),
        ({"Action": "sts:AssumeRole", "Principal": "*"}, "anybody"),
        ({"Action": "sts:AssumeRole", "Principal": {"AWS": "*"}}, "anybody"),
        *(
            ({"Action": "ec2:TerminateInstances", "Resource": ANY, "Condition": one}, "ResourceTag")
            for one in (
                {},
                {"StringLike": {"aws:ResourceTag/ray-cluster-name": "*"}},
                {"StringLike": {"aws:ResourceTag/ray-cluster-name": ["a", "*"]}},
                {"StringEqualsIfExists": OWN["StringEquals"]},
                {"ForAllValues:StringEquals": OWN["StringEquals"]},
                {"StringNotEquals": OWN["StringEquals"]},
                {"Null": {"aws:ResourceTag/ray-cluster-name": "false"}},
                {"StringEquals": {"aws:ResourceTag/another": "x"}},
                {"StringEquals": {"aws:RequestTag/ray-cluster-name": "ftsec"}},
            )
        ),
    ],
)
def test_a_statement_of_aws_that_gives_too_much_is_refused(statement, fault):
    assert any(fault in one for one in aws_faults({"Effect": "Allow", **statement}))


def test_a_statement_of_aws_under_a_condition_is_not_refused():
    for one in (
        {"Action": "ec2:TerminateInstances", "Resource": ANY, "Condition": OWN},
        {"Action": "s3:GetObject", "Resource": {"!Sub": "${Bucket.Arn}/*"}},
        {"Action": "s3:ListBucket", "Resource": {"!GetAtt": "Bucket.Arn"}},
        {"Action": "ssm:GetParameter", "Resource": "arn:aws:ssm:r::parameter/aws/service/x/*"},
    ):
        assert aws_faults({"Effect": "Allow", **one}) == []
    assert aws_faults({"Effect": "Deny", "Action": "*", "Resource": "*"}) == []


@pytest.mark.parametrize(
    "document",
    [
        {"kind": "ClusterRole", "rules": []},
        {"kind": "ClusterRoleBinding"},
        *(
            {"kind": "Role", "rules": [rule]}
            for rule in (
                {"apiGroups": [""], "resources": ["*"], "verbs": ["get"]},
                {"apiGroups": ["*"], "resources": ["pods"], "verbs": ["get"]},
                {"apiGroups": [""], "resources": ["pods"], "verbs": ["*"]},
                {"apiGroups": [""], "resources": ["pods/*"], "verbs": ["get"]},
                {"apiGroups": [""], "resources": ["pods"], "verbs": ["delete"]},
                {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]},
                {"apiGroups": [""], "resources": ["roles"], "verbs": ["bind"]},
            )
        ),
        {"kind": "RoleBinding", "roleRef": {"kind": "ClusterRole", "name": "admin"}},
        {
            "kind": "RoleBinding",
            "roleRef": {"kind": "Role", "name": "r"},
            "subjects": [{"kind": "Group", "name": "system:authenticated"}],
        },
    ],
    ids=json.dumps,
)
def test_a_role_of_kubernetes_that_gives_too_much_is_refused(document):
    assert kubernetes_faults(document)


HEAD = "--member=serviceAccount:ftsec-head@p.iam.gserviceaccount.com"
NAMES = "resource.name.startsWith('projects/p/zones/z/instances/ray-ftsec-')"


@pytest.mark.parametrize(
    "line",
    [
        f"gcloud projects add-iam-policy-binding p {HEAD} --role=roles/compute.admin",
        f"gcloud projects add-iam-policy-binding p {HEAD} --role=roles/editor",
        f"gcloud projects add-iam-policy-binding p {HEAD} --role=roles/owner --condition={NAMES!r}",
        f"gcloud projects add-iam-policy-binding p {HEAD} --role=roles/compute.viewer",
        f"gcloud projects add-iam-policy-binding p {HEAD} --role=projects/p/roles/nodes",
        f"gcloud projects add-iam-policy-binding p {HEAD} --role=projects/p/roles/nodes"
        " --condition=None",
        f"gcloud projects add-iam-policy-binding p {HEAD} --role=projects/p/roles/nodes"
        ' --condition="title=t,expression=true"',
        f"gcloud projects add-iam-policy-binding p {HEAD} --role=projects/p/roles/nodes"
        f' --condition="title=t,expression={NAMES} || true"',
        f"gcloud projects add-iam-policy-binding p {HEAD} --role=projects/p/roles/nodes"
        " --condition=\"title=t,expression=resource.name.startsWith('projects/p/')\"",
        "gcloud storage buckets add-iam-policy-binding gs://b --member=allUsers"
        " --role=roles/storage.objectUser",
    ],
)
def test_a_binding_of_google_cloud_that_gives_too_much_is_refused(line):
    roles = {"nodes": {"includedPermissions": ["compute.instances.delete"]}}
    assert gcp_binding_faults(line, roles)
    good = f'{HEAD} --role=projects/p/roles/nodes --condition="title=t,expression={NAMES}"'
    assert gcp_binding_faults(f"gcloud projects add-iam-policy-binding p {good}", roles) == []
    assert gcp_role_faults({"includedPermissions": ["compute.*"]})


def test_cloudformation_takes_the_template():
    api = pytest.importorskip("cfnlint.api")
    text = (FOLDER / "aws-base.yaml").read_text(encoding="utf-8")
    assert [str(one) for one in api.lint(text, regions=["us-east-1"])] == []
