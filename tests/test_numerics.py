"""Portable numerics: what is set, what the libraries report, what is refused, and the same bytes on
other CPUs.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ftsec_ray import numerics
from ftsec_ray.config.sweep_file import load_sweep
from ftsec_ray.errors import EnvironmentFault
from ftsec_ray.plan.build import build_plan
from ftsec_ray.plan.show import render, summarize

ROOT = Path(__file__).parents[1]
PORTABLE = numerics.environment_of("portable")
LADDER = {
    "name": "s",
    "models": ["ladder:0.2m"],
    "task": "microworld",
    "attacks": ["badnets"],
    "defenses": ["none", "weight_statistics"],
}


def python(code, *, variables=()):
    """What a fresh interpreter prints, started without any variable of the table but these."""
    kept = {name: value for name, value in os.environ.items() if name not in PORTABLE}
    done = subprocess.run(
        [sys.executable, "-c", f"import json\nfrom ftsec_ray import numerics\n{code}"],
        env={**kept, "PYTHONPATH": str(ROOT), **dict(variables)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


TELL = "print(json.dumps(numerics.in_force().to_json()))"
TRY = """
try:
    numerics.put_in_force('portable')
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_process_told_to_be_portable_is_and_one_that_is_not_told_is_not():
    loaded = "import torch, numpy, scipy.linalg\n"
    portable = json.loads(python("numerics.put_in_force('portable')\n" + loaded + TELL))
    assert portable == {
        "variables": PORTABLE,
        "cpu": "AVX2",
        "mkl": "COMPATIBLE",
        "openblas": ["Haswell", "Haswell"],
        "threads": [1, 1, 1],
        "before_torch": True,
        "mode": "portable",
    }
    fast = json.loads(python("numerics.put_in_force('fast')\n" + loaded + TELL))
    assert fast["variables"] == dict.fromkeys(PORTABLE)
    assert (fast["mode"], fast["mkl"] == "COMPATIBLE") == ("fast", False)


def test_variables_that_the_process_was_started_with_count_whoever_imports_torch_first():
    told = json.loads(python("import torch\n" + TELL, variables=PORTABLE.items()))
    assert (told["mode"], told["before_torch"]) == ("portable", True)
    code = (
        "import sys, torch\nsys.modules.pop('ftsec_ray.numerics')\nimport ftsec_ray.numerics as n"
    )
    told = json.loads(
        python(f"{code}\nprint(json.dumps(n.in_force().to_json()))", variables=PORTABLE.items())
    )
    assert (told["mode"], told["before_torch"]) == ("portable", None)


def test_variables_set_after_torch_was_imported_are_not_in_force():
    said = python(f"import torch\n{TRY}")
    assert said.startswith("EnvironmentFault [environment] this process does not compute with")
    assert "MKL_CBWR=COMPATIBLE" in said
    assert "numerics: fast" in said
    late = f"import os, torch\nos.environ.update({PORTABLE!r})\n{TRY}"
    assert "after torch was imported" in python(late)


def test_a_torch_that_took_its_kernels_already_shows_it_whatever_the_variables_say_now():
    code = (
        "import os, sys, torch\ntorch.ones(9).exp()\ntorch.ones(9, 9) @ torch.ones(9, 9)\n"
        f"os.environ.update({PORTABLE!r})\nsys.modules.pop('ftsec_ray.numerics')\n"
        "import ftsec_ray.numerics as n\nprint(sorted(n.in_force().differences()))"
    )
    said = set(ast.literal_eval(python(code, variables={"ATEN_CPU_CAPABILITY": "default"}.items())))
    # which kernels numpy's OpenBLAS takes by itself depends on the CPU; those of AVX2 are portable
    wanted = {"branch of MKL", "kernels of torch"} | ({"threads"} if os.cpu_count() != 1 else set())
    assert wanted <= said <= wanted | {"kernels of OpenBLAS"}


def test_a_blas_of_numpy_with_other_kernels_is_refused_and_nothing_is_set():
    code = f"import os, numpy\n{TRY}\nprint(os.environ.get('MKL_CBWR'))"
    said = python(code, variables={"OPENBLAS_CORETYPE": "Sandybridge"}.items())
    assert "'kernels of OpenBLAS': ['Sandybridge']" in said
    assert said.endswith("None")


def test_threads_alone_are_set_even_when_torch_is_there():
    kernels = {**numerics.KERNELS, "OMP_NUM_THREADS": "2"}
    code = "import torch, numpy\nnumerics.put_in_force('portable')\n" + TELL
    told = json.loads(python(code, variables=kernels.items()))
    assert (told["mode"], told["threads"]) == ("portable", [1, 1])


@pytest.mark.parametrize(
    ("machine", "flags", "got"),
    [
        ("aarch64", frozenset({"asimd"}), "a CPU of architecture aarch64"),
        ("x86_64", frozenset({"avx", "fma"}), "an x86-64 CPU without avx2"),
        ("x86_64", frozenset({"sse2"}), "an x86-64 CPU without avx2 and fma"),
        ("x86_64", None, "a system that does not list the features of its CPU"),
    ],
)
def test_a_cpu_that_cannot_is_refused_with_the_way_out(monkeypatch, machine, flags, got):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(numerics, "_cpu_flags", lambda: flags)
    for refuses in (numerics.put_in_force, numerics.check):
        with pytest.raises(EnvironmentFault, match="cannot run on this CPU") as held:
            refuses("portable")
        assert got in str(held.value)
        assert "numerics: fast" in str(held.value)
        refuses("fast")


# In a sweep.


def planned(**other):
    return build_plan(load_sweep({**LADDER, **other}))


def test_a_sweep_is_portable_where_all_its_models_are_of_the_ladder(tmp_path):
    assert planned().spec.numerics == "portable"
    real = {
        "name": "r",
        "source": "owner/name",
        "family": "f",
        "aligned": True,
        "parameters": 1_000_000,
        "revision": "0" * 40,
    }
    assert planned(models=["ladder:0.2m", real]).spec.numerics == "fast"
    assert planned(resources={"numerics": "fast"}).spec.numerics == "fast"
    assert planned(models=[real], resources={"numerics": "portable"}).spec.numerics == "portable"


def test_numerics_are_part_of_the_digest_of_what_computes_and_of_nothing_else():
    portable, fast = planned(), planned(resources={"numerics": "fast"})
    shared = portable.stages.keys() & fast.stages.keys()
    assert {portable.stages[digest].kind for digest in shared} == {"task"}
    told = {(stage.kind, stage.params.get("numerics")) for stage in portable.stages.values()}
    computing = {"source", "align", "craft", "finetune", "bank", "inspect", "generate"}
    assert told == {("task", None), ("score", None), *((kind, "portable") for kind in computing)}
    assert planned(resources={"numerics": "portable"}).stages.keys() == portable.stages.keys()


def test_a_source_that_only_loads_a_model_is_shared_by_both():
    real = {
        "name": "r",
        "source": "owner/name",
        "family": "f",
        "aligned": True,
        "parameters": 1_000_000,
        "revision": "0" * 40,
    }
    plans = [planned(models=[real], resources={"numerics": one}) for one in ("portable", "fast")]
    shared = plans[0].stages.keys() & plans[1].stages.keys()
    assert {plans[0].stages[digest].kind for digest in shared} == {"task", "source"}


def test_the_summary_of_a_plan_says_which():
    summary = summarize(planned(), set())
    assert summary.to_json()["numerics"] == "portable"
    assert "numerics: portable (the same bytes" in render(summary)


# The same bytes on other CPUs.

QEMU = shutil.which("qemu-x86_64")


def trained(mode, *, cpu=None, variables=()):
    """Hashes of a short training in a process of its own, natively or on an emulated CPU."""
    kept = {name: value for name, value in os.environ.items() if name not in PORTABLE}
    emulated = [QEMU, "-cpu", cpu] if cpu else []
    done = subprocess.run(
        [*emulated, sys.executable, "-W", "ignore", "-m", "tests.portable_training", mode],
        env={**kept, "PYTHONPATH": str(ROOT), **dict(variables)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    print(cpu or "native", mode, told["hashes"], f"{told['cpu_s']:.0f} s of CPU")
    return told


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(QEMU is None, reason="no qemu-x86_64 (Debian package qemu-user)")
@pytest.mark.parametrize("cpu", ["Haswell", "EPYC"])
def test_weights_have_the_same_bytes_here_and_on_an_emulated_cpu(cpu):
    native, emulated = trained("portable"), trained("portable", cpu=cpu)
    assert native["hashes"] == emulated["hashes"]
    assert native["in_force"] == emulated["in_force"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_other_kernels_give_other_bytes():
    """Without the settings the same training depends on the kernels: here torch's plain ones."""
    threads = {"OMP_NUM_THREADS": "1"}
    fast = trained("fast", variables=threads.items())["hashes"]
    kernels = {**threads, "ATEN_CPU_CAPABILITY": "default"}
    plain = trained("fast", variables=kernels.items())["hashes"]
    same = {name for name in fast if fast[name] == plain[name]}
    assert same == {"norm"}, "numpy's BLAS is the same, even torch's random weights are not"
