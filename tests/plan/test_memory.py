"""Memory by the shape of a model, its dtype, how its base is packed, and whether blocks are computed
again.
"""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import pytest

from ftsec_ray.config.strategy import StrategyConfig
from ftsec_ray.config.sweep import ModelSpec, ResourceSpec, TrainingConfig
from ftsec_ray.config.sweep_file import load_sweep
from ftsec_ray.context import Runtime, WorkerGroup
from ftsec_ray.errors import SpecFaults
from ftsec_ray.execute.stage_job import StageJob
from ftsec_ray.plan import build_plan
from ftsec_ray.plan.memory import Shape, guessed_shape, memory_gib, weight_bytes
from ftsec_ray.plan.shapes import gguf_header, shape_of, shape_of_file
from tests.plan.test_build_plan import only, sweep

GIB = 2**30
SMOL = Shape(134_479_872, 576, 30, 1_536, 49_152)
CONFIG = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "intermediate_size": 1_536,
    "vocab_size": 49_152,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def gguf(file, entries):
    """A GGUF file that ends behind its header."""

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    def entry(name, value):
        if isinstance(value, str):
            return text(name) + struct.pack("<I", 8) + text(value)
        if isinstance(value, list):
            head = struct.pack("<IIQ", 9, 8, len(value))
            return text(name) + head + b"".join(map(text, value))
        if isinstance(value, float):
            return text(name) + struct.pack("<If", 6, value)
        return text(name) + struct.pack("<II", 4, value)

    body = b"".join(entry(name, value) for name, value in entries.items())
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + body)
    return file


HEADER = {
    "general.architecture": "llama",
    "general.tags": ["a", "b"],
    "llama.block_count": 30,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1_536,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.rope.freq_base": 1e5,
    "llama.vocab_size": 49_152,
    "tokenizer.ggml.tokens": ["never read"],
}


def test_files_tell_the_shape_of_a_model_and_its_weights_follow(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for found in (shape_of_file(folder), shape_of_file(gguf(tmp_path / "m.gguf", HEADER))):
        assert replace(found, parameters=SMOL.parameters) == SMOL
        # norms, two in a block and one behind them, are all that is left out
        norms = (2 * 30 + 1) * 576
        assert found.parameters == SMOL.parameters + 35_136 - norms
    nested = {"text_config": CONFIG, "model_type": "gemma3"}
    (folder / "config.json").write_text(json.dumps(nested))
    assert shape_of_file(folder, 7).parameters == 7


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"GGUF" + b"\xff" * 40, b"no model at all", b"GGUF" + b"\0" * 20]
)
def test_a_file_that_is_no_model_tells_nothing(tmp_path, content):
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    assert gguf_header(file) == {}
    assert shape_of_file(file) is None


def test_the_ladder_has_the_shape_of_its_table_and_a_hub_id_that_of_its_size():
    ladder = shape_of(ModelSpec(name="l", source="ladder:1m", family="l", aligned=True))
    assert ladder.depth == 5
    hub = ModelSpec(name="h", source="owner/m-1b", family="m", aligned=True)
    assert shape_of(hub) == guessed_shape(10**9)


def test_bytes_of_weights_by_dtype_and_packing():
    linear, rest = SMOL.parameters - 576 * 49_152, 576 * 49_152
    assert weight_bytes(SMOL, "float32") == 4 * SMOL.parameters
    assert weight_bytes(SMOL, "bfloat16") == 2 * SMOL.parameters
    assert weight_bytes(SMOL, "bfloat16", "int8") == linear + 2 * rest
    assert weight_bytes(SMOL, "float32", "nf4") == pytest.approx(0.5625 * linear + 4 * rest)


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_half_precision_and_checkpointing_take_less(adapter, on_gpu):
    def gib(**more):
        return memory_gib(SMOL, adapter, 128, 8, on_gpu=on_gpu, **more)

    plain, again = gib(), gib(checkpointing=True)
    inputs = 8 * 128 * SMOL.depth * 4 * SMOL.width / GIB
    kept = (plain - again + inputs) * SMOL.depth / (SMOL.depth - 1)
    # inputs of all blocks and one block, instead of all blocks
    assert again == pytest.approx(plain - kept + inputs + kept / SMOL.depth)
    assert kept > 5 * inputs
    half = gib(checkpointing=True, dtype="bfloat16")
    if adapter == "full":
        assert half == again, "full fine-tuning always uses float32 weights"
    else:
        assert gib(checkpointing=True, dtype="bfloat16", quantization="nf4") < half < again


def test_logits_stand_a_slice_at_a_time():
    one, two = (memory_gib(SMOL, "lora", 1_024, rows, checkpointing=True) for rows in (8, 16))
    tokens = 8 * 1_024
    blocks = tokens * (30 * 4 * 576 + 30 * 576 * 4) / GIB
    assert two - one < blocks + tokens * 12 * 49_152 / GIB / 4


# where it is decided


def hub(**more):
    return ModelSpec(name="m", source="owner/m-1b", family="m", aligned=True, **more)


def planned(model, how="auto", training=None, strategy="single", **resources):
    spec = sweep(models=(model,), attacks=("none",), training=training or TrainingConfig())
    resources = ResourceSpec(
        **{"gpus_per_stage": "auto", "cache_gib": 0.0, "eval_batch": 1, **resources}
    )
    strategy = StrategyConfig(gradient_checkpointing=how, strategy=strategy)
    return build_plan(replace(spec, resources=resources, strategy=strategy))


LONG = TrainingConfig(max_length=1_024, batch_size=16)


def is_recomputed(plan):
    return bool(only(plan, "finetune").where.get("gradient_checkpointing"))


def test_auto_computes_blocks_again_only_where_a_tune_does_not_fit_otherwise():
    large, small = {"gpu_memory_gib": 80.0}, {"gpu_memory_gib": 24.0}
    assert not is_recomputed(planned(hub(), training=LONG, **large))
    assert is_recomputed(planned(hub(), training=LONG, **small))
    with pytest.raises(SpecFaults, match="GiB in one process"):
        planned(hub(), "off", training=LONG, **small)
    assert is_recomputed(planned(hub(), "on", training=LONG, **large))
    assert not is_recomputed(planned(hub(), training=LONG, gpus_per_stage=0.0))
    assert is_recomputed(planned(hub(), training=LONG, gpus_per_stage=0.25, **large))


def test_how_blocks_are_computed_is_in_no_digest():
    plans = [planned(hub(), how, training=LONG) for how in ("on", "off")]
    assert list(plans[0].stages) == list(plans[1].stages)


def test_a_dtype_or_packing_lets_a_model_fit_on_less():
    def gpus(model, **training):
        return only(
            planned(model, "off", training=TrainingConfig(max_length=64, batch_size=1, **training)),
            "finetune",
        ).resource

    big = replace(hub(), source="owner/m-3b")
    assert gpus(big) == "gpu:0.5"
    assert gpus(replace(big, dtype="bfloat16")) == "gpu:0.25"
    assert gpus(replace(big, dtype="bfloat16"), quantization="nf4") == "gpu:0.125"


def test_a_stage_runs_as_the_plan_settled_it(tmp_path):
    stage = only(planned(hub(), "on", training=LONG), "finetune")
    session = type("Session", (), {"runtime": Runtime()})()
    assert StageJob(stage, tmp_path, session).runtime.gradient_checkpointing
    group = WorkerGroup(workers=2, zero_stage=2, micro_batch=1)
    for wanted in (True, False):
        session.runtime = Runtime(worker_group=replace(group, gradient_checkpointing=wanted))
        assert StageJob(stage, tmp_path, session).runtime.gradient_checkpointing == wanted


@pytest.mark.parametrize(("written", "read"), [("on", "on"), ("off", "off"), ("auto", "auto")])
def test_on_and_off_of_yaml_are_words(tmp_path, written, read):
    file = tmp_path / "s.yaml"
    file.write_text(
        "models: [ladder:0.2m]\ntask: microworld\nattacks: [none]\ndefenses: [none]\n"
        f"seeds: [0]\ntraining: {{gradient_checkpointing: {written}, layers: 0-1}}\n"
    )
    spec = load_sweep(file)
    assert spec.strategy.gradient_checkpointing == read
    assert spec.training.blocks() == (0, 1)
