"""`ftsec doctor`: what this machine or cluster can run, what is missing, and how to install it.

With `--image` it checks the image for the nodes of a cluster instead: the commands that launchers
call in it, the extras, and a torch built for CUDA; no GPU is needed for that. `cluster/Dockerfile`
ends with this check.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ftsec_ray import numerics
from ftsec_ray.errors import EnvironmentFault, StoreError
from ftsec_ray.redact import redacted
from ftsec_ray.schedule.cluster_address import as_given, check_address, cluster_address
from ftsec_ray.store.artifact_store import Store

if TYPE_CHECKING:
    from packaging.requirements import Requirement

State = Literal["ok", "note", "missing"]
GIB = 2**30
MIN_PYTHON = (3, 11)
LOW_DISK_GIB, LOW_MEMORY_GIB = 5.0, 4.0
"""Below these a laptop-sized sweep may not fit."""
PACKAGE = "ftsec-ray"
EXTRA_USES = {
    "cluster": "starting workers on AWS and GCP",
    "deepspeed": "training one model in several processes",
    "dev": "the tests",
    "bench": "the timings under tests/benchmarks",
    "benchmarks": "benchmarks of lm-eval on the finished models",
    "quantization": "a quantized base model under an adapter",
    "sign": "signatures of archives",
}
"""What the extras of this package are for; which there are, and what each holds, its metadata says.
"""
IMAGE_COMMANDS = {
    "bash": ("bash", "Ray runs all commands of a node with it"),
    "rsync": ("rsync", "`ray up` sends the cluster's configuration with it"),
    "ssh": ("openssh-client", "the head node starts worker nodes with it"),
    "wget": ("wget", "the health checks of KubeRay use it"),
}
"""Command that the nodes of a cluster call -> its Debian package, and what for."""
IMAGE_EXTRAS = {
    "ray": ("default", "the job port and the dashboard"),
    "ftsec-ray": ("cluster", "starting workers on AWS and GCP"),
}
"""Distribution -> the extra that the nodes of a cluster need of it, and what for."""


@dataclass(frozen=True)
class Check:
    """One check and its result."""

    what: str
    found: str
    state: State = "ok"
    fix: str = ""

    def as_json(self) -> dict[str, str]:
        """JSON values of it."""
        return asdict(self)


def examine(store: str | Path, *, address: str | None = None) -> Iterator[Check]:
    """Check everything that a run depends on."""
    yield _python()
    yield from _packages()
    yield from _extras()
    is_remote = "://" in str(store)
    yield from _machine(
        Path.home() if is_remote else Path(store), "store's cache" if is_remote else "store"
    )
    if is_remote:
        yield _remote(str(store))
    yield from _gpus()
    yield from _numerics()
    yield _hub()
    if cluster_address(address) is not None:
        yield from _cluster(address)


def examine_image() -> Iterator[Check]:
    """Everything that an image must hold to be the head and the workers of a cluster; it need not
    run on a GPU.
    """
    yield _python()
    yield from _packages()
    yield from (_extra(name, extra, use) for name, (extra, use) in IMAGE_EXTRAS.items())
    yield _cuda_build()
    for command, (package, use) in IMAGE_COMMANDS.items():
        found = shutil.which(command)
        yield Check(
            command,
            found or "not found",
            "ok" if found else "missing",
            "" if found else f"apt-get install {package} ({use})",
        )
    is_root = os.geteuid() == 0
    yield Check(
        "user",
        "root" if is_root else f"uid {os.geteuid()}",
        "note" if is_root else "ok",
        "end the Dockerfile with a USER that is not root" if is_root else "",
    )


def _extra(name: str, extra: str, use: str) -> Check:
    """Whether every requirement of an extra of a distribution is there, in a version that it
    allows.
    """
    of_extra = _requirements(name, extra)
    lacking = _lacking(of_extra)
    what, good = f"{name}[{extra}]", bool(of_extra) and not lacking
    return Check(
        what,
        "installed" if good else f"without {', '.join(lacking) or 'the extra'}",
        "ok" if good else "missing",
        "" if good else f"pip install '{what}' ({use})",
    )


def _cuda_build() -> Check:
    if find_spec("torch") is None:
        return Check("cuda", "no torch", "missing", "pip install torch")
    import torch

    built = torch.version.cuda
    return Check(
        "cuda",
        f"torch built for CUDA {built}" if built else "torch built for the CPU only",
        "ok" if built else "missing",
        "" if built else "pip install torch from PyPI on Linux x86_64, not from the CPU index",
    )


def _python() -> Check:
    good = sys.version_info >= MIN_PYTHON
    return Check(
        "python",
        f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "ok" if good else "missing",
        "" if good else f"install Python {'.'.join(map(str, MIN_PYTHON))} or newer",
    )


def _packages() -> Iterator[Check]:
    """Every requirement of this package, with the extras that it asks for."""
    wanted = _requirements(PACKAGE)
    if not wanted:
        yield Check(
            PACKAGE,
            "not installed: its requirements are not known",
            "note",
            f"pip install {PACKAGE}, or pip install -e . in its source",
        )
    for one in wanted:
        found, lacking = _version(one.name), _lacking([one])
        of_extras = [
            need for extra in sorted(one.extras) for need in _requirements(one.name, extra)
        ]
        without = _lacking(of_extras) if found else []
        text = found or "not installed"
        if found and lacking:
            text += f", want {one.specifier}"
        if without:
            text += f", without {', '.join(without)}"
        is_good = not lacking and not without
        asked = str(one).partition(";")[0].strip()
        yield Check(
            one.name,
            text,
            "ok" if is_good else "missing",
            "" if is_good else f"pip install '{asked}'",
        )


def _extras() -> Iterator[Check]:
    """Every extra of this package; none of them is needed by a sweep on this machine."""
    try:
        names = metadata(PACKAGE).get_all("Provides-Extra") or []
    except PackageNotFoundError:
        return
    for name in names:
        use = EXTRA_USES.get(name, "")
        found = _extra(PACKAGE, name, use)
        if found.state == "ok":
            yield found
        else:
            yield replace(
                found,
                found=found.found + (f"; only for {use}" if use else ""),
                state="note",
                fix=f"pip install '{found.what}'",
            )


def _requirements(name: str, extra: str = "") -> list[Requirement]:
    """What a distribution requires on this machine, or what an extra of it adds to that; nothing
    where it is not installed.
    """
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in requires(name) or ()]
    except PackageNotFoundError:
        return []
    always = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    if not extra:
        return always
    return [
        one
        for one in wanted
        if one not in always and one.marker and one.marker.evaluate({"extra": extra})
    ]


def _lacking(wanted: Sequence[Requirement]) -> list[str]:
    """Names of the requirements that are not installed in a version that they allow."""
    return sorted(
        {
            one.name
            for one in wanted
            if (held := _version(one.name)) is None
            or not one.specifier.contains(held, prereleases=True)
        }
    )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _machine(store: Path, use: str) -> Iterator[Check]:
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    yield Check("cores", str(cores))
    memory = memory_bytes() / GIB
    yield Check(
        "memory",
        f"{memory:.1f} GiB",
        "ok" if memory >= LOW_MEMORY_GIB else "note",
        "" if memory >= LOW_MEMORY_GIB else "run with --workers 1 and resources: {cache_gib: 0.5}",
    )
    place = next(
        folder for folder in (store.absolute(), *store.absolute().parents) if folder.exists()
    )
    free = shutil.disk_usage(place).free / GIB
    yield Check(
        "disk",
        f"{free:.1f} GiB free for the {use} {store}",
        "ok" if free >= LOW_DISK_GIB else "note",
        "" if free >= LOW_DISK_GIB else "choose another disk with --store",
    )
    if not os.access(place, os.W_OK):
        yield Check(
            "store",
            f"{place} cannot be written",
            "missing",
            "choose another folder with --store",
        )


def _remote(store: str) -> Check:
    """Whether a store at a URI can be opened."""
    try:
        held = len(Store.open(store).done())
    except StoreError as error:
        return Check("store", redacted(error.what), "missing", error.fix)
    return Check("store", f"{store} can be read and holds {held} artifacts")


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or the container's limit where that is
    lower.
    """
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if limit.isdigit():
            whole = min(whole, int(limit))
    return whole


def _gpus() -> Iterator[Check]:
    if find_spec("torch") is None:
        return
    import torch

    count = torch.cuda.device_count()
    for index in range(count):
        card = torch.cuda.get_device_properties(index)
        yield Check(
            f"gpu {index}",
            f"{card.name}, {card.total_memory / GIB:.0f} GiB, compute {card.major}.{card.minor}",
        )
    if count == 0:
        yield Check(
            "gpu",
            f"none (torch built for {torch.version.cuda or 'CPU only'})",
            "note",
            "ladder models need none; larger models need a CUDA build of torch and a GPU",
        )


def _numerics() -> Iterator[Check]:
    """What decides the CPU kernels of this process, and what portable sweeps set for theirs."""
    here = numerics.in_force()
    kernels = [
        f"torch {here.cpu or 'not loaded'}",
        f"MKL branch {here.mkl or 'not known'}",
        *(f"OpenBLAS {core}" for core in sorted(set(here.openblas))),
        f"threads {max(here.threads, default=0) or 'not known'}",
    ]
    is_set = ", ".join(f"{name}={value}" for name, value in here.variables.items() if value)
    yield Check("numerics", f"{here.mode} ({', '.join(kernels)}); set: {is_set or 'nothing'}")
    fault = numerics.cpu_fault()
    wanted = " ".join(f"{k}={v}" for k, v in numerics.environment_of("portable").items())
    yield Check(
        "numerics: portable",
        f"not possible: {fault}" if fault else f"possible, sets {wanted}",
        "note" if fault else "ok",
        "ladder sweeps need `resources: {numerics: fast}` on this machine" if fault else "",
    )


def _hub() -> Check:
    is_offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    cache = os.environ.get("HF_HOME", "~/.cache/huggingface")
    if is_offline:
        return Check(
            "hugging face",
            f"offline: only models and data sets in {cache}",
            "note",
            "unset HF_HUB_OFFLINE to download; ladder models need nothing",
        )
    return Check("hugging face", f"downloads allowed, cache {cache}")


def _cluster(address: str | None) -> Iterator[Check]:
    if find_spec("ray") is None:
        return
    import ray

    try:
        check_address(address)
        ray.init(address=cluster_address(address), logging_level="ERROR", log_to_driver=False)
    except (EnvironmentFault, ConnectionError, RuntimeError, ValueError) as error:
        yield Check(
            "cluster",
            f"{as_given(address)}: {str(error).splitlines()[0]}",
            "missing",
            "start it with `ray start --head`, or check the address",
        )
        return
    try:
        alive = [node for node in ray.nodes() if node["Alive"]]
        has = ray.cluster_resources()
        yield Check(
            "cluster",
            f"{as_given(address)}: {len(alive)} node(s), {has.get('CPU', 0):g} cores,"
            f" {has.get('GPU', 0):g} GPUs, {has.get('memory', 0) / GIB:.0f} GiB memory",
        )
    finally:
        ray.shutdown()


def fault_of(
    findings: list[Check], *, what: str = "this machine cannot run a sweep yet"
) -> EnvironmentFault | None:
    """The fault to end with when something needed is missing."""
    missing = [finding for finding in findings if finding.state == "missing"]
    if not missing:
        return None
    return EnvironmentFault(
        what, [f.what for f in missing], "all of them present", "; ".join(f.fix for f in missing)
    )
