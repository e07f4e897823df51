"""What only a GPU can show, in under four minutes: `make gpu-smoke`, or `python -m tests.gpu_smoke`.

A model of the shape of Qwen2.5-0.5B with random weights in bfloat16: an adapter is trained on it,
with and without gradient checkpointing, on a packed base where bitsandbytes is installed, and under
ZeRO stage 2 in a group of one process; then the adapted model answers prompts. It prints what each
part took (seconds, tokens per second, peak memory beside the estimate of the memory table) and ends
with 1 where a part fails or gives what it must not. `--device cpu --tiny` walks the same paths on a
small model, which says that they run and nothing about a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import LoadedModel, ModelInfo, Runtime, WorkerGroup

GIB = 2**30
QWEN = {
    "hidden_size": 896,
    "intermediate_size": 4_864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
}
TINY = {
    **QWEN,
    "hidden_size": 56,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 64,
}
BASE = "b" * 32


def random_model(sizes: dict[str, int], device: str) -> LoadedModel:
    """A random Qwen2 in bfloat16 with the tests' word tokenizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tests.fixtures_models import tiny_tokenizer

    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = Qwen2Config(**sizes, max_position_embeddings=1_024, tie_word_embeddings=True, **ids)
    with torch.device(device):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16).eval()
    count = sum(p.numel() for p in model.parameters())
    info = ModelInfo(name="random", family="qwen2", parameters=count, aligned=True)
    return LoadedModel(model, tiny_tokenizer(), info)


class Part:
    """Runs the parts one after the other and prints a line for each."""

    def __init__(self, device: str) -> None:
        self.device, self.failed = device, False

    def run(self, name: str, work: Callable[[], str]) -> None:
        """One part; `work` says what came out."""
        import torch

        on_gpu = self.device == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        try:
            said = work()
        except Exception as error:  # noqa: BLE001 - the other parts still tell something
            self.failed = True
            said = f"FAILED {type(error).__name__}: {str(error).splitlines()[0][:200]}"
        took = time.perf_counter() - start
        peak = f"  peak {torch.cuda.max_memory_allocated() / GIB:.2f} GiB" if on_gpu else ""
        print(f"{name:34}{took:7.1f} s{peak}  {said}", flush=True)


def trained(
    start: LoadedModel, config: TrainingConfig, runtime: Runtime, rows: Any, folder: Path
) -> Any:
    """A tune whose losses are finite and whose adapter is float32 beside a bfloat16 base."""
    import torch

    from ftsec_ray.models.lora import lora_modules
    from ftsec_ray.models.precision import weights_dtype
    from ftsec_ray.training.loop import sft

    report = sft(start, rows, config, seed=0, runtime=runtime, workdir=folder, base_digest=BASE)
    if not all(map(math.isfinite, report.losses)):
        raise AssertionError(report.losses)
    if weights_dtype(report.loaded.model) is not torch.bfloat16:
        raise AssertionError(weights_dtype(report.loaded.model))
    if {m.B.dtype for m in lora_modules(report.loaded)} != {torch.float32}:
        raise AssertionError("the adapter is not float32")
    return report


def smoke(device: str, *, tiny: bool) -> int:
    """All parts; 1 where one failed."""
    from ftsec_ray.plan.memory import Shape, memory_gib
    from tests.fixtures_models import sentiment_rows, table

    sizes = TINY if tiny else QWEN
    batch, length, steps = (4, 32, 2) if tiny else (16, 512, 8)
    part = Part(device)
    start = random_model(sizes, device)
    answer = " ".join(["red blue green stone"] * length)
    rows = table([{**row, "messages": [row["messages"][0], {**row["messages"][1], "content": answer}]}
                  for row in sentiment_rows(batch * steps)])  # fmt: skip
    config = TrainingConfig(epochs=1.0, batch_size=batch, max_length=length, batching="shuffled")
    runtime = Runtime(device=device, micro_batch=batch)
    shape = Shape(
        start.info.parameters, sizes["hidden_size"], sizes["num_hidden_layers"],
        sizes["intermediate_size"], sizes["vocab_size"],
    )  # fmt: skip
    kept: dict[str, Any] = {}

    def tune(name: str, config: TrainingConfig, runtime: Runtime) -> str:
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            report = kept[name] = trained(start, config, runtime, rows, Path(folder))
        rate = report.tokens / (time.perf_counter() - begun)
        group = runtime.worker_group
        recomputes = runtime.gradient_checkpointing
        gib = memory_gib(
            shape, "lora", length, batch, group.zero_stage if group else 0, dtype="bfloat16",
            quantization=config.quantization, checkpointing=recomputes,
        )  # fmt: skip
        curve = f"loss {report.losses[0]:.3f} to {report.losses[-1]:.3f}"
        return f"{rate:.0f} tokens/s, table {gib:.2f} GiB beside the base, {curve}"

    again = replace(runtime, gradient_checkpointing=True)
    group = WorkerGroup(workers=1, zero_stage=2, micro_batch=batch)
    part.run("LoRA bf16", lambda: tune("plain", config, runtime))
    part.run("LoRA bf16, checkpointing", lambda: tune("again", config, again))
    if importlib.util.find_spec("bitsandbytes") is None:
        print("LoRA on a packed base: left out, bitsandbytes is not installed")
    else:
        for how in ("int8", "nf4"):
            packed = replace(config, quantization=how)
            part.run(f"LoRA {how}", lambda packed=packed: tune("packed", packed, runtime))
    part.run("generate", lambda: answers(kept["plain"].loaded, tiny=tiny))
    if importlib.util.find_spec("deepspeed") is None:
        print("ZeRO stage 2: left out, deepspeed is not installed")
    else:
        with process_group(device):
            alone = replace(runtime, worker_group=group)
            part.run("LoRA bf16, ZeRO stage 2", lambda: tune("zero", config, alone))
        part.run("ZeRO against one process", lambda: apart(kept["plain"], kept["zero"]))
    part.run("checkpointing against none", lambda: apart(kept["plain"], kept["again"]))
    return int(part.failed)


def answers(loaded: LoadedModel, *, tiny: bool) -> str:
    """Greedy answers with the adapter beside the base."""
    from ftsec_ray.conversation import chat_of
    from ftsec_ray.models.generator import Generator
    from ftsec_ray.models.precision import as_asked
    from tests.fixtures_models import sentiment_rows

    chats = [chat_of(row) for row in sentiment_rows(4 if tiny else 64)]
    new = 4 if tiny else 64
    begun = time.perf_counter()
    said = Generator(as_asked(loaded)).complete(chats, max_new_tokens=new)
    if len(said) != len(chats):
        raise AssertionError(len(said))
    return f"{len(chats) / (time.perf_counter() - begun):.1f} prompts/s of {new} tokens at most"


def apart(one: Any, other: Any) -> str:
    """How far two curves are from one another; they differ by rounding to bf16 alone."""
    worst = max(abs(a - b) / b for a, b in zip(other.losses, one.losses, strict=True))
    if worst > 0.02:  # noqa: PLR2004 - five units of bf16
        raise AssertionError(f"losses are {worst:.1%} apart")
    return f"losses at most {worst:.1e} apart"


class process_group:  # noqa: N801 - a context manager
    """torch.distributed of this process alone."""

    def __init__(self, device: str) -> None:
        self._device = device

    def __enter__(self) -> None:
        import torch.distributed as dist

        names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update({**names, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
        self._folder = tempfile.TemporaryDirectory()
        dist.init_process_group(
            "nccl" if self._device == "cuda" else "gloo",
            init_method=f"file://{self._folder.name}/meeting",
            rank=0,
            world_size=1,
        )

    def __exit__(self, *_: object) -> None:
        import torch.distributed as dist

        dist.destroy_process_group()
        self._folder.cleanup()


def main(arguments: list[str] | None = None) -> int:
    """Run the parts, or say that there is no device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model")
    given = parser.parse_args(arguments)
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: run this on a machine with one, or --device cpu --tiny")
        return 2
    name = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}")
    return smoke(given.device, tiny=given.tiny)


if __name__ == "__main__":
    sys.exit(main())
