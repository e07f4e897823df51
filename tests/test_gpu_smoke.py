"""The script for GPUs, on a small model on the CPU; on a GPU where there is one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu_smoke import main

pytestmark = pytest.mark.timeout(1_200)

ROOT = Path(__file__).parents[1]


def run(*arguments):
    """The script in a process of its own: it sets up torch.distributed."""
    return subprocess.run(
        [sys.executable, "-m", "tests.gpu_smoke", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=1_200,
    )


@pytest.mark.slow
def test_every_part_runs_on_a_small_model_on_the_cpu():
    ended = run("--device", "cpu", "--tiny")
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2_000:]
    assert ended.stdout.startswith("CPU, torch")
    parts = ("LoRA bf16 ", "checkpointing", "generate", "ZeRO stage 2", "against one process")
    assert all(part in ended.stdout for part in parts)
    assert "FAILED" not in ended.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_claims_nothing(capsys):
    assert main([]) == 2
    assert "no CUDA device here" in capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.slow
def test_every_part_runs_on_a_gpu():
    ended = run()
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2_000:]
