"""Portable numerics: settings that make CPU kernels give the same bytes on all x86 CPUs with AVX2.

MKL, torch, oneDNN and OpenBLAS choose their kernels by the CPU, and split sums by the number of
threads, so that the last bits of a sum, and after some training steps all weights, depend on the
machine. Each library reads its setting from the environment once, when it is loaded or first used:
the variables must be set before torch is imported. `put_in_force` sets them if it is early enough,
and `check` compares what the libraries report. GPUs are not covered.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ftsec_ray.errors import EnvironmentFault

NumericsMode = Literal["portable", "fast"]
KERNELS = {
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
}
"""Variable -> value that fixes the kernels of MKL, torch, oneDNN, and the BLAS of numpy and scipy.
"""
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Variable -> value that keeps every sum in one thread."""
_CPU_FLAGS = ("avx2", "fma")
_MKL_ALL, _MKL_COMPATIBLE = -1, 3
"""From mkl_types.h: MKL_CBWR_ALL and MKL_CBWR_COMPATIBLE."""


def environment_of(mode: NumericsMode) -> dict[str, str]:
    """The environment variables for a process with this mode; empty for `fast`."""
    return {**KERNELS, **THREADS} if mode == "portable" else {}


@dataclass(frozen=True, kw_only=True)
class InForce:
    """What decides the CPU kernels of this process, as far as the libraries are loaded."""

    variables: Mapping[str, str | None]
    """Every variable of `portable` and its value here."""
    cpu: str | None
    """Instruction set of torch's kernels; None: torch is not imported."""
    mkl: str | None
    """`COMPATIBLE` or the number of another branch; None: torch is not imported or hides it."""
    openblas: tuple[str, ...]
    """CPU type of the kernels of each loaded OpenBLAS."""
    threads: tuple[int, ...]
    """Threads of torch and of each loaded OpenBLAS."""
    before_torch: bool | None
    """Whether the variables were set before torch was imported; None: torch is not imported, or was
    imported before this module.
    """

    def differences(self) -> dict[str, object]:
        """What differs from `portable`."""
        wanted = environment_of("portable")
        differences: dict[str, object] = {
            name: value for name, value in self.variables.items() if value != wanted[name]
        }
        if self.cpu not in (None, "AVX2"):
            differences["kernels of torch"] = self.cpu
        if self.mkl not in (None, "COMPATIBLE"):
            differences["branch of MKL"] = self.mkl
        if any(core != "Haswell" for core in self.openblas):
            differences["kernels of OpenBLAS"] = list(self.openblas)
        if any(count != 1 for count in self.threads):
            differences["threads"] = list(self.threads)
        if self.before_torch is False:
            differences["set"] = "after torch was imported, or at an unknown time"
        return differences

    @property
    def mode(self) -> NumericsMode:
        """The mode that these settings amount to."""
        return "fast" if self.differences() else "portable"

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {**asdict(self), "mode": self.mode}


class _Order:
    """The order in which the variables were set and torch was imported, as far as it is known."""

    torch_came_first = "torch" in sys.modules
    are_early = not torch_came_first and KERNELS.items() <= os.environ.items()


def in_force() -> InForce:
    """The settings of this process; imports nothing."""
    torch = sys.modules.get("torch")
    blas = list(_openblas())
    return InForce(
        variables={name: os.environ.get(name) for name in environment_of("portable")},
        cpu=torch.backends.cpu.get_cpu_capability() if torch is not None else None,
        mkl=_mkl_branch(str(torch.__file__)) if torch is not None else None,
        openblas=tuple(core for core, _ in blas),
        threads=(
            *([torch.get_num_threads()] if torch is not None else []),
            *(count for _, count in blas),
        ),
        before_torch=_Order.are_early
        or (None if torch is None or _Order.torch_came_first else False),
    )


def put_in_force(mode: NumericsMode) -> None:
    """Set the variables of `portable` in this process before torch is imported; EnvironmentFault if
    it is too late or the CPU does not support it. `fast` sets nothing.
    """
    if mode != "portable":
        return
    check_cpu()
    if "torch" not in sys.modules and all(core == "Haswell" for core, _ in _openblas()):
        os.environ.update(KERNELS)
        _Order.are_early = True
    if KERNELS.items() <= os.environ.items():
        os.environ.update(THREADS)
        _one_thread()
    check(mode)


def check(mode: NumericsMode) -> None:
    """EnvironmentFault if this process would compute with other settings than those of the mode."""
    if mode != "portable":
        return
    check_cpu()
    differences = in_force().differences()
    if differences:
        raise EnvironmentFault(
            "this process does not compute with portable numerics",
            differences,
            " ".join(f"{name}={value}" for name, value in environment_of(mode).items())
            + " before torch is imported",
            "start it with these variables, or write `resources: {numerics: fast}` in the sweep",
        )


def check_cpu() -> None:
    """EnvironmentFault if this CPU does not have the instructions that `portable` needs."""
    fault = cpu_fault()
    if fault is not None:
        raise EnvironmentFault(
            "numerics: portable cannot run on this CPU",
            fault,
            "an x86-64 CPU with AVX2 and FMA",
            "write `resources: {numerics: fast}` in the sweep: results are then this machine's own",
        )


def cpu_fault() -> str | None:
    """What this CPU lacks for `portable`; None if nothing."""
    machine = platform.machine()
    if machine.lower() not in ("x86_64", "amd64"):
        return f"a CPU of architecture {machine or 'unknown'}"
    flags = _cpu_flags()
    if flags is None:
        return "a system that does not list the features of its CPU (no /proc/cpuinfo)"
    lacking = [flag for flag in _CPU_FLAGS if flag not in flags]
    return f"an x86-64 CPU without {' and '.join(lacking)}" if lacking else None


def record_of(mode: NumericsMode) -> dict[str, str | None]:
    """The numerics of a stage for its record; `cpu` is None if its process did not import torch."""
    return {"mode": mode, "cpu": in_force().cpu}


@cache
def _cpu_flags() -> frozenset[str] | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    match = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return frozenset(match.group(1).split()) if match else None


def _one_thread() -> None:
    """Set the loaded libraries to one thread; libraries loaded later read the environment."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)
    for library in _openblas_libraries():
        setter = _symbol(library, "set_num_threads")
        if setter is not None:
            setter.argtypes, setter.restype = [ctypes.c_int], None
            setter(1)


@cache
def _mkl_branch(torch_file: str) -> str | None:
    """The branch of the MKL inside torch, which it fixes at its first use."""
    for path in sorted((Path(torch_file).parent / "lib").glob("libtorch_cpu.*")):
        try:
            branch = ctypes.CDLL(str(path)).mkl_serv_cbwr_get
        except (OSError, AttributeError):
            continue
        branch.argtypes, branch.restype = [ctypes.c_int], ctypes.c_int
        code = branch(_MKL_ALL)
        return "COMPATIBLE" if code == _MKL_COMPATIBLE else str(code)
    return None


def _openblas() -> Iterator[tuple[str, int]]:
    """CPU type and number of threads of every loaded OpenBLAS that reports them."""
    for library in _openblas_libraries():
        core, threads = _symbol(library, "get_corename"), _symbol(library, "get_num_threads")
        if core is not None and threads is not None:
            core.argtypes, core.restype = [], ctypes.c_char_p
            threads.argtypes, threads.restype = [], ctypes.c_int
            yield core().decode(), threads()


def _openblas_libraries() -> list[ctypes.CDLL]:
    """The loaded OpenBLAS libraries; numpy and scipy have one each."""
    if "numpy" not in sys.modules and "scipy" not in sys.modules:
        return []
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    paths = {line.split(maxsplit=5)[-1] for line in lines if "openblas" in line and "/" in line}
    return [ctypes.CDLL(path) for path in sorted(paths) if Path(path).exists()]


def _symbol(library: ctypes.CDLL, name: str) -> Any:
    """A function of OpenBLAS, with the prefix and suffix of its build."""
    for prefix in ("scipy_openblas_", "openblas_"):
        for suffix in ("64_", "_64", ""):
            function = getattr(library, prefix + name + suffix, None)
            if function is not None:
                return function
    return None
