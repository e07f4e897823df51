"""Peak memory of tunes beside the estimate of the memory table: `python -m
tests.benchmarks.bench_memory MODEL`.

MODEL is a folder or a .gguf file; where none is named, random weights in the shape of
SmolLM2-135M.
Every setting runs in a process of its own on the CPU: it loads the model as a worker does, tunes it
for two steps, and reports the most memory that the process ever had, less what it had before it
loaded anything. malloc gives freed memory back at once: what it would keep for the next step (about
another third) is no need of the tune. The estimate is that of `plan.memory` for a CPU plus the
model that a worker keeps; rows are nothing but answer, so that all logits are asked for, as the
table assumes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ftsec_ray.plan.memory import Adapter, memory_gib, weight_bytes
from ftsec_ray.plan.shapes import shape_of_file

ROWS, LENGTH, STEPS = 8, 128, 2
GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """One way to tune."""

    adapter: Adapter
    dtype: str
    checkpointing: bool = False
    quantization: str = "none"

    @property
    def name(self) -> str:
        """As the table calls it."""
        parts = (self.adapter, self.dtype, self.quantization.replace("none", ""))
        return " ".join(filter(None, (*parts, "checkpointing" if self.checkpointing else "")))


SETTINGS = (
    Setting("lora", "float32"),
    Setting("lora", "float32", checkpointing=True),
    Setting("full", "float32"),
    Setting("lora", "bfloat16", checkpointing=True),
    Setting("lora", "bfloat16"),
    Setting("full", "bfloat16", checkpointing=True),
    Setting("lora", "float32", quantization="int8"),
    Setting("lora", "float32", quantization="nf4"),
)


def random_model(folder: Path) -> str:
    """A random Llama in the shape of SmolLM2-135M with the tests' word tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.fixtures_models import tiny_tokenizer

    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1_536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49_152,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "random")
    tiny_tokenizer().save_pretrained(folder / "random")
    return str(folder / "random")


def prepared(source: str, dtype: str, folder: Path) -> Path:
    """The model as an artifact of the store; made in a process of its own."""
    code = (
        "import sys; from pathlib import Path; from ftsec_ray.models.convert import load_source;"
        " from ftsec_ray.models.load import save_model; source, dtype, out = sys.argv[1:];"
        " save_model(load_source(source, name='m', family='f', aligned=True, dtype=dtype),"
        " Path(out))"
    )
    out = folder / dtype
    out.mkdir()
    subprocess.run([sys.executable, "-c", code, source, dtype, str(out)], check=True)
    return out


def peak(folder: Path, setting: Setting) -> dict[str, float]:
    """What a tune takes in this process: GiB at most, less those before the model was loaded."""
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    from ftsec_ray.config.sweep import TrainingConfig
    from ftsec_ray.context import Runtime
    from ftsec_ray.models.load import load_model
    from ftsec_ray.models.quantized import check_bitsandbytes
    from ftsec_ray.training.loop import sft
    from tests.fixtures_models import row, table

    torch.set_num_threads(1)
    if setting.quantization != "none":
        check_bitsandbytes()
        import bitsandbytes  # noqa: F401
    config = TrainingConfig(
        adapter=setting.adapter,
        quantization=setting.quantization,
        epochs=1.0,
        batch_size=ROWS,
        max_length=LENGTH,
        batching="shuffled",
    )
    rows = table([row(i, "a", "one word more " * LENGTH) for i in range(STEPS * ROWS)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loaded = load_model(folder)
    read = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    runtime = Runtime(gradient_checkpointing=setting.checkpointing)
    with tempfile.TemporaryDirectory() as work:
        report = sft(
            loaded, rows, config, seed=0, runtime=runtime, workdir=Path(work), base_digest="b" * 32
        )
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokens = report.tokens / len(report.losses)
    return {
        "peak": (most - before) * 1024 / GIB,
        "read": (read - before) * 1024 / GIB,
        "tokens": tokens,
    }


def estimate(folder: Path, setting: Setting) -> float:
    """GiB by the table, with the model that a worker keeps."""
    shape = shape_of_file(folder)
    assert shape is not None, folder
    kept = weight_bytes(shape, setting.dtype) / GIB
    return kept + memory_gib(
        shape,
        setting.adapter,
        LENGTH,
        ROWS,
        dtype=setting.dtype,
        quantization=setting.quantization,
        checkpointing=setting.checkpointing,
        on_gpu=False,
    )


def main() -> None:
    """Measure all settings, or the one of a child process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--first", type=int, default=len(SETTINGS), help="this many settings")
    parser.add_argument("--setting", type=int, help="of a child process")
    arguments = parser.parse_args()
    if arguments.setting is not None:
        print(json.dumps(peak(Path(arguments.model), SETTINGS[arguments.setting])))
        return
    print(f"{'setting':34}{'measured':>10}{'estimate':>10}{'ratio':>8}  (GiB; {ROWS} x {LENGTH})")
    with tempfile.TemporaryDirectory() as scratch:
        source = arguments.model or random_model(Path(scratch))
        asked = SETTINGS[: arguments.first]
        folders = {d: prepared(source, d, Path(scratch)) for d in {s.dtype: None for s in asked}}
        for index, setting in enumerate(asked):
            folder = folders[setting.dtype]
            found = subprocess.run(
                [sys.executable, "-m", __spec__.name, str(folder), "--setting", str(index)],
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
            )
            if found.returncode:
                print(f"{setting.name:34}  failed: {found.stderr.strip().splitlines()[-1]}")
                continue
            got, wanted = json.loads(found.stdout.splitlines()[-1]), estimate(folder, setting)
            print(
                f"{setting.name:34}{got['peak']:10.2f}{wanted:10.2f}{wanted / got['peak']:8.2f}"
                f"  {got['tokens']:.0f} tokens a step",
                flush=True,
            )


if __name__ == "__main__":
    main()
