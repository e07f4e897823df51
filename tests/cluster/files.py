"""The files of `cluster/` as a user has them: filled in by the very `sed` commands that the README
gives.
"""

from __future__ import annotations

import os
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster"
README = FOLDER / "README.md"
LAUNCHERS = ("aws", "gcp")
VALUES = {
    "REGISTRY": "registry.example/team",
    "PROJECT_ID": "a-project",
    "STORE": "s3://a-bucket/ftsec",
}
"""What the user puts in the place of each name."""


def shell_lines() -> list[str]:
    """The commands of the README's code blocks, continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [re.sub(r"\s+", " ", line.partition("  #")[0]).strip() for line in lines if line]


@cache
def filled() -> dict[str, str]:
    """Name of a file before its first dot -> its text after the README's command for it."""
    found = {}
    for line in shell_lines():
        if line.startswith("sed "):
            command, _, target = line.partition(" > ")
            done = subprocess.run(
                ["bash", "-euc", command],
                cwd=ROOT,
                env={**os.environ, **VALUES},
                capture_output=True,
                text=True,
                check=True,
            )
            found[target.split(".")[0]] = done.stdout
    return found


def launcher(name: str) -> dict[str, Any]:
    """A launcher's configuration, as given to `ray up`."""
    config: dict[str, Any] = yaml.safe_load(filled()[name])
    return config


def prepared(name: str) -> dict[str, Any]:
    """The same with the defaults that Ray fills in."""
    from ray.autoscaler._private.util import prepare_config

    config: dict[str, Any] = prepare_config(launcher(name))
    return config


def manifest(name: str) -> dict[str, Any]:
    """A manifest of KubeRay, as given to `kubectl apply`."""
    given: dict[str, Any] = yaml.safe_load(filled()[name])
    return given


def cluster_of(given: dict[str, Any]) -> dict[str, Any]:
    """The cluster of a RayCluster or of a RayJob."""
    spec: dict[str, Any] = given["spec"]
    return spec.get("rayClusterSpec", spec)


def definition(name: str) -> dict[str, Any]:
    """KubeRay's definition of a resource; skips where its folder is not at hand."""
    import gzip

    given = os.environ.get("KUBERAY_CRDS")
    folders = [Path(given)] if given else [parent / "shared" / "kuberay" for parent in ROOT.parents]
    for folder in folders:
        file = folder / f"ray.io_{name}.yaml.gz"
        if file.is_file():
            loaded: dict[str, Any] = yaml.load(
                gzip.decompress(file.read_bytes()),
                Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader),
            )
            return loaded
    pytest.skip(
        f"KubeRay's definition of {name} is not here: put ray.io_{name}.yaml.gz (KubeRay,"
        " ray-operator/config/crd/bases) into a folder and name it in KUBERAY_CRDS"
    )


def strict(schema: Any, *, refs: str = "") -> Any:
    """A JSON schema out of Kubernetes' or Google's dialect, which also refuses keys that it does
    not know.

    Args:
        schema: A part of a definition.
        refs: What to put before the bare names of `$ref`.
    """
    if isinstance(schema, list):
        return [strict(one, refs=refs) for one in schema]
    if not isinstance(schema, dict):
        return schema
    # Google writes 64-bit numbers as text and takes both.
    if schema.get("x-kubernetes-int-or-string") or (
        schema.get("type") == "string" and schema.get("format") in ("int64", "uint64")
    ):
        return {"type": ["integer", "string"]}
    made = {}
    for key, value in schema.items():
        if key in ("properties", "$defs"):
            made[key] = {name: strict(one, refs=refs) for name, one in value.items()}
        elif key == "$ref":
            made[key] = refs + value
        elif key not in (
            "format",
            "default",
            "description",
            "annotations",
            "required",
        ) or isinstance(value, list):
            made[key] = strict(value, refs=refs)
    if made.get("type") == "any":
        del made["type"]
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if "properties" in schema and not is_open:
        made["additionalProperties"] = False
    return made
