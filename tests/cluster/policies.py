"""What is wrong with a policy of AWS, Google Cloud or Kubernetes: wildcards without a condition,
and rights over machines that the cluster did not make.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

CLUSTER_TAG = "ray-cluster-name"
_OWN_NODES = {
    "ec2:CreateTags": ("ec2:CreateAction", f"aws:ResourceTag/{CLUSTER_TAG}"),
    **dict.fromkeys(
        ("ec2:TerminateInstances", "ec2:StopInstances", "ec2:StartInstances", "ec2:DeleteTags"),
        (f"aws:ResourceTag/{CLUSTER_TAG}",),
    ),
}
"""Actions on instances -> condition keys of which one says that the cluster made them."""
_READS = re.compile(r"\.(get|list|use|useReadOnly)$")
_TYPE_ALONE = re.compile(r"[\w-]*[/:]?\*.*")
"""The resource of an ARN that names a type and no resource of it: `instance/*`, `*`."""


def statements(node: Any) -> Iterator[dict[str, Any]]:
    """Every statement of IAM below a node, whatever holds it."""
    if isinstance(node, dict):
        if "Effect" in node:
            yield node
        for value in node.values():
            yield from statements(value)
    elif isinstance(node, list):
        for value in node:
            yield from statements(value)


def aws_faults(statement: dict[str, Any]) -> list[str]:
    """What is wrong with a statement of AWS."""
    if statement["Effect"] != "Allow":
        return []
    faults = [f"{key} allows all but some" for key in statement if key.startswith("Not")]
    actions, resources = _texts(statement.get("Action")), _texts(statement.get("Resource"))
    keys = _condition_keys(statement.get("Condition"))
    for action in actions:
        if action == "*" or action.endswith(":*") or ("*" in action and not keys):
            faults.append(f"action {action} is a wildcard without a condition")
        wanted = _OWN_NODES.get(action)
        if wanted and not keys.intersection(wanted):
            faults.append(f"{action} without a condition on {' or '.join(wanted)}")
        if action == "iam:PassRole" and any("*" in one for one in resources):
            faults.append("iam:PassRole of any role")
    if "Principal" not in statement:
        faults += [
            f"resource {one} is a wildcard without a condition"
            for one in resources or ["nothing"]
            if _is_wild(one) and not keys
        ]
    principal = statement.get("Principal")
    if principal == "*" or (isinstance(principal, dict) and "*" in _texts([*principal.values()])):
        faults.append("anybody may take the role")
    return faults


def _texts(value: Any) -> list[str]:
    """The texts of a field of CloudFormation: `!Sub x` is its text, `!GetAtt x` a resource."""
    if isinstance(value, list):
        return [text for one in value for text in _texts(one)]
    if isinstance(value, dict):
        return [str(one) if tag == "!Sub" else f"<{one}>" for tag, one in value.items()]
    return [] if value is None else [str(value)]


def _is_wild(resource: str) -> bool:
    if resource.startswith("${") and not resource.startswith("${AWS"):
        return False  # below a resource of the template itself
    parts = resource.split(":", 5)
    if len(parts) < 6 or not resource.startswith("arn:"):
        return "*" in resource or resource == "nothing"
    return bool(_TYPE_ALONE.fullmatch(parts[5])) or any("*" in part for part in parts[:5])


def _condition_keys(condition: Any) -> set[str]:
    """Keys that a request must have with a certain value. Operators that hold where the key is
    absent ask for none, and neither does a value that is a wildcard.
    """
    found: set[str] = set()
    for operator, asked in (condition or {}).items():
        if operator.startswith(("ForAllValues", "Null")) or operator.endswith("IfExists"):
            continue
        if "Not" in operator:
            continue
        found |= {key for key, value in asked.items() if "*" not in _texts(value)}
    return found


def kubernetes_faults(document: dict[str, Any]) -> list[str]:
    """What is wrong with a manifest."""
    kind = str(document.get("kind"))
    if kind.startswith("Cluster"):
        return [f"{kind} counts in every namespace"]
    if kind == "RoleBinding":
        faults = []
        if document["roleRef"]["kind"] != "Role":
            faults.append(f"a binding to {document['roleRef']['kind']}")
        for subject in document.get("subjects") or []:
            if subject["kind"] != "ServiceAccount":
                faults.append(f"a binding of {subject['kind']} {subject['name']}")
        return faults
    faults = []
    for rule in (document.get("rules") or []) if kind == "Role" else []:
        for field in ("apiGroups", "resources", "verbs"):
            faults += [f"{field} *" for one in rule.get(field, []) if "*" in one]
        if {"escalate", "bind", "impersonate"} & set(rule.get("verbs", [])):
            faults.append("a verb that gives rights")
        writes = set(rule.get("verbs", [])) - {"get", "list", "watch", "create"}
        secret = "secrets" in rule.get("resources", [])
        if (writes or secret) and not rule.get("resourceNames"):
            faults.append(f"{sorted(rule.get('verbs', []))} of resources that it does not name")
    return faults


def gcp_role_faults(role: dict[str, Any]) -> list[str]:
    """What is wrong with a custom role of Google Cloud."""
    return [f"permission {one}" for one in role["includedPermissions"] if "*" in one]


def gcp_binding_faults(command: str, roles: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with a `gcloud ... add-iam-policy-binding`.

    Args:
        command: The line.
        roles: Name of a custom role -> its file.
    """
    words = shlex.split(command)
    if "add-iam-policy-binding" not in words:
        return []
    options = dict(one.split("=", 1) for one in words if one.startswith("--") and "=" in one)
    role, who = options["--role"], options["--member"]
    if who in ("allUsers", "allAuthenticatedUsers"):
        return [f"{who} has {role}"]
    if re.search(r"/(owner|editor)$|[aA]dmin$", role):
        return [f"{role} is more than a cluster needs"]
    if words[1] not in ("projects", "organizations", "resource-manager"):
        return []  # of one bucket, one registry, one subnet, one account, one secret
    own = roles.get(role.rsplit("/", 1)[-1])
    condition = options.get("--condition", "None")
    if own is not None and all(_READS.search(one) for one in own["includedPermissions"]):
        return []
    names = re.findall(r"resource\.name\.startsWith\('([^']+)'\)", condition)
    if not names or not all(re.search(r"/(instances|disks)/ray-[\w-]+-$", one) for one in names):
        return [f"{role} of the whole project without a condition on names"]
    rest = re.sub(r"resource\.name\.startsWith\('[^']+'\)", "", condition.split("expression=")[-1])
    return [f"a condition that asks for more than names: {rest}"] if rest.strip(" |()") else []
