"""SaLoRA: against its paper's own form (a third factor and a changed base), the start, the end of
the adapter, and the control.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import Runtime
from ftsec_ray.defenses.freeze_safety_layers import FreezeSafetyLayers
from ftsec_ray.defenses.salora import SaLoRA
from ftsec_ray.errors import StageError
from ftsec_ray.models.load import load_model, merged, save_model
from ftsec_ray.models.lora import attach_lora, linear_paths, lora_modules
from ftsec_ray.models.residual import is_transposed
from ftsec_ray.models.row_tokens import encode_row
from ftsec_ray.models.update import transposed_weights, whole_weights
from ftsec_ray.training.loop import _seed, learning_rate, plain_training
from tests.defenses.during import (
    CONFIG,
    USERS,
    are_equal,
    assert_composes_with_lisa,
    assert_half_precision,
    assert_plain,
    assert_resumes,
    context,
    mixed_task,
    shaped,
    tuned,
    weights,
)
from tests.fixtures_models import sentiment_rows, table, tiny_model
from tests.models.families import family_model
from tests.numeric import assert_same

QUICK = {"rank_s": 4, "rank_t": 6}
ADAPTER = ("lora_A", "lora_B")


def outputs_by_hand(loaded, rows):
    """The outputs of every linear layer without its bias at the answer tokens: path -> (N, out)."""
    found = {path: [] for path in linear_paths(loaded.model)}
    places = []

    def keep(path, module):
        def hook(_, args, output):
            bias = 0.0 if getattr(module, "bias", None) is None else module.bias
            found[path].append((output - bias).detach().reshape(-1, output.shape[-1])[places])

        return module.register_forward_hook(hook)

    handles = [keep(path, loaded.model.get_submodule(path)) for path in found]
    for row in rows:
        ids, labels = encode_row(loaded.tokenizer, row, max_length=64)
        places[:] = [i for i, label in enumerate(labels) if label != -100]
        if places:
            loaded.model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return {path: torch.cat(each).numpy() for path, each in found.items()}


def directions_by_hand(loaded, rows, rank):
    """The top right singular vectors, without those of singular values that are zero."""
    return {
        path: np.linalg.svd(Y)[2][: min(rank, np.linalg.matrix_rank(Y))].T
        for path, Y in outputs_by_hand(loaded, rows).items()
    }


def starts_by_hand(loaded, V, V_t, config):
    """C = I - V V^T, B0 and A0 of every layer, B0 not yet projected."""
    scale = config.alpha / (config.rank**0.5 if config.rslora else config.rank)
    found = {}
    for path in V:
        W = loaded.model.get_submodule(path).weight.detach().numpy()
        U, S, rows = np.linalg.svd(W)
        root = np.diag(np.sqrt(S[: config.rank] / scale))
        B0 = V_t[path] @ V_t[path].T @ U[:, : config.rank] @ root
        found[path] = (np.eye(len(W)) - V[path] @ V[path].T, B0, root @ rows[: config.rank])
    return found


def trained_by_hand(start, config, starts):
    """The weights after a fine-tune in the form of the official code: C B0 A0 is taken off the
    frozen weights, and C stands behind every adapter.
    """
    torch.manual_seed(_seed(0, "adapter"))
    whole = merged(start)
    whole.model.requires_grad_(True)
    model = attach_lora(whole, config).model.train()
    plain, layers = plain_training(start, USERS, config, seed=0, runtime=Runtime()), {}
    for path, (C, B0, A0) in starts.items():
        layer = model.get_base_model().get_submodule(path)
        A, B = (getattr(layer, name)["default"] for name in ADAPTER)
        C, B0, A0 = (torch.from_numpy(x) for x in (C, B0, A0))
        with torch.no_grad():
            layer.base_layer.weight.sub_(layer.scaling["default"] * C @ B0 @ A0)
            A.weight.copy_(A0)
            B.weight.copy_(B0)
        B.register_forward_hook(lambda _, __, output, C=C: output @ C.T)
        layers[path] = (layer, A.weight, B.weight, C)
    factors = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(factors, weight_decay=config.weight_decay)
    for index in range(plain.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(config, index, plain.steps)
        for batch in plain.batch_at(index):
            (plain.objective(model, batch, None) * batch.weight).backward()
        torch.nn.utils.clip_grad_norm_(factors, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return {
        path: (layer.base_layer.weight + layer.scaling["default"] * C @ B @ A).detach().numpy()
        for path, (layer, A, B, C) in layers.items()
    }


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("rslora", [False, True])
def test_it_trains_to_the_weights_of_the_official_form(tmp_path, rslora):
    start, config = tiny_model(), replace(CONFIG, rslora=rslora, alpha=6.0, weight_decay=0.1)
    V = directions_by_hand(start, mixed_task().split("safety").to_pylist(), 5)
    V_t = directions_by_hand(start, USERS.to_pylist(), 7)
    want = trained_by_hand(start, config, starts_by_hand(start, V, V_t, config))
    got = weights(tuned(SaLoRA(rank_s=5, rank_t=7), tmp_path, start=start, config=config))
    before = dict(start.model.named_parameters())
    assert len(want) == 14
    for path, weight in want.items():
        moved = np.abs(weight - before[f"{path}.weight"].detach().numpy()).max()
        assert moved > 1e-3
        # AdamW divides by the root of its second moment, which enlarges rounding
        assert np.abs(got[f"{path}.weight"] - weight).max() < 1e-6 * moved


def delta_of(loaded, start):
    """The update of every layer as a map of columns: path -> (out, in)."""
    turned, after = transposed_weights(start), whole_weights(merged(loaded))
    return {
        name.removesuffix(".weight"): (
            after[name] - weight if name not in turned else (after[name] - weight).T
        ).detach()
        for name, weight in whole_weights(start).items()
    }


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen2"])
@pytest.mark.parametrize("init", ["task", "plain"])
def test_no_layer_of_any_family_writes_to_its_safe_directions(tmp_path, family, init):
    start = family_model(family, tied=True)
    V = directions_by_hand(start, mixed_task().split("safety").to_pylist(), 5)
    method = SaLoRA(rank_s=5, rank_t=6, init=init)
    with_it, without = (tuned(one, tmp_path / str(one), start=start) for one in (method, None))
    sides = [delta_of(report.loaded, start) for report in (with_it, without)]
    for path, delta in sides[0].items():
        if path not in V:
            assert not delta.any()  # embeddings, norms and the head
            continue
        kept = torch.from_numpy(V[path])
        assert delta.norm() > 1e-3
        assert float((kept.T @ delta).norm()) < 1e-9 * float(delta.norm())
        assert float((kept.T @ sides[1][path]).norm()) > 0.05 * float(sides[1][path].norm())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("init", ["task", "plain"])
def test_the_first_step_begins_at_the_start_model_to_the_bit(tmp_path, init, dropout):
    config = replace(CONFIG, dropout=dropout)
    own, plain = (
        tuned(one, tmp_path / str(one), config=config) for one in (SaLoRA(**QUICK, init=init), None)
    )
    assert own.losses[0] == plain.losses[0]
    assert own.losses[-1] != plain.losses[-1]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["task", "plain"])
def test_the_finished_adapter_is_an_ordinary_one_without_hooks(tmp_path, init, rslora):
    start = tiny_model()
    # of 13 / sqrt(3), six times a sixth is another number
    config = replace(CONFIG, rslora=rslora, alpha=13.0, rank=3)
    report = tuned(SaLoRA(**QUICK, init=init), tmp_path / "w", start=start, config=config)
    loaded, folder = report.loaded, tmp_path / "saved"
    folder.mkdir()
    rank = 2 * config.rank if init == "task" else config.rank
    assert {len(m.A) for m in lora_modules(loaded)} == {rank}
    assert {m.B.shape[1] for m in lora_modules(loaded)} == {rank}
    assert loaded.model.peft_config["default"].r == rank
    for module in loaded.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for name, parameter in loaded.model.named_parameters():
        assert not parameter._backward_hooks
        if "lora_" not in name:
            plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            assert torch.equal(parameter, dict(start.model.named_parameters())[plain])
    save_model(loaded, folder)
    again = load_model(folder, base=start)
    assert [m.scale for m in lora_modules(again)] == [m.scale for m in lora_modules(loaded)]
    ids = torch.tensor([[1, 3, 9, 12, 2, 4]])
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, loaded.model(ids).logits)


def test_rank_zero_is_plain_tuning_bit_for_bit(tmp_path):
    assert_plain(SaLoRA(rank_s=0), tmp_path / "zero", dropout=0.3)
    assert_plain(SaLoRA(directions="none", init="plain"), tmp_path / "none", dropout=0.3)


def test_without_directions_the_start_of_the_adapter_remains(tmp_path):
    start = tiny_model()
    ctx = context(start)
    assert SaLoRA(directions="none").needs() == {"start"}
    report = tuned(SaLoRA(directions="none", rank_t=6), tmp_path / "own", start=start, ctx=ctx)
    assert (ctx.notes["directions_most"], ctx.notes["gradient_removed"]) == (0, 0.0)
    assert (ctx.notes["started_layers"], ctx.notes["task_rows"]) == (14, 20)
    assert "safety_rows" not in ctx.notes
    assert not are_equal(weights(report), weights(tuned(None, tmp_path / "plain", start=start)))


def layers_of(method, start=None, **given):
    start = start or tiny_model()
    training, _ = shaped(SaLoRA(rank_s=0), start)
    return method._layers(start, training, context(start, **given))


def test_the_control_differs_in_the_directions_alone(tmp_path, monkeypatch):
    safe, random = (
        layers_of(SaLoRA(rank_s=4, directions=directions)) for directions in ("safety", "random")
    )
    for path, layer in safe.items():
        other = random[path].V
        assert other.shape == layer.V.shape
        assert float((other.T @ other - torch.eye(4)).abs().max()) < 1e-5
        assert float((layer.V.T @ other).norm()) < 0.9 * 2.0  # 2 if they spanned the same
        assert not torch.equal(layer.start.B, random[path].start.B)
        assert torch.equal(layer.start.A, random[path].start.A)
    assert not torch.equal(random["model.layers.0.self_attn.q_proj"].V, other[:32])
    own = weights(tuned(SaLoRA(**QUICK), tmp_path / "own"))
    control = SaLoRA(**QUICK, directions="random")
    assert not are_equal(weights(tuned(control, tmp_path / "control")), own)
    monkeypatch.setattr(SaLoRA, "_random", lambda _, V, __, ___: V)
    assert are_equal(weights(tuned(control, tmp_path / "same")), own)


@pytest.mark.usefixtures("float64")
def test_benign_directions_are_those_of_benign_answers():
    start, split = tiny_model(), "benign_train"
    want = directions_by_hand(start, mixed_task().split(split).to_pylist(), 5)
    method = SaLoRA(rank_s=5, directions="benign", init="plain")
    assert method.needs() == {"start", split}
    for path, layer in layers_of(method, start).items():
        assert layer.start is None
        assert_same(layer.V @ layer.V.T, want[path] @ want[path].T, rel=1e-7)


def test_directions_that_no_safe_output_spans_are_not_used():
    rows = mixed_task().split("safety").slice(0, 1)
    task = replace(mixed_task(), splits={**mixed_task().splits, "safety": rows})
    layers = layers_of(SaLoRA(rank_s=32, init="plain"), task=task)
    tokens = len(outputs_by_hand(tiny_model(), rows.to_pylist())["model.layers.0.mlp.up_proj"])
    assert 0 < tokens < 32
    assert {layer.V.shape[1] for layer in layers.values()} == {tokens}


def test_a_layer_without_outputs_to_write_to_keeps_its_bits_and_is_counted(tmp_path):
    start = family_model("llama")
    ctx = context(start)
    report = tuned(SaLoRA(rank_s=16, rank_t=6), tmp_path, start=start, ctx=ctx)
    # 16 outputs; the answers of the first block have fewer different inputs
    closed = {f"model.layers.1.self_attn.{name}" for name in ("k_proj", "v_proj")}
    changed = {path for path, delta in delta_of(report.loaded, start).items() if delta.any()}
    assert changed == set(linear_paths(start.model)) - closed
    assert (ctx.notes["closed_layers"], ctx.notes["projected_layers"]) == (2, 14)
    assert ctx.notes["directions_least"] < ctx.notes["directions_most"] == 16
    assert any("2 of 14 layers" in text for text in ctx.warnings)
    # not merely too small to move a weight
    assert not any(bool(m.B.any()) for m in lora_modules(report.loaded) if m.name in closed)
    config = replace(CONFIG, targets=("k_proj", "v_proj"), layers=(1,))
    with pytest.raises(StageError, match="16 outputs"):
        shaped(SaLoRA(rank_s=16), start, config=config)


@pytest.mark.usefixtures("float64")
def test_the_record_holds_the_share_of_the_gradient_that_is_taken(tmp_path):
    def removed(rank_s, **given):
        ctx = context()
        method = SaLoRA(rank_s=rank_s, directions="random", **given)
        tuned(method, tmp_path / f"{rank_s}{given}", ctx=ctx, config=replace(CONFIG, epochs=0.2))
        return ctx.notes["gradient_removed"]

    start, seen = tiny_model(), {}
    plain, training = shaped(SaLoRA(rank_s=4, init="plain"), start)
    V = {path: layer.V for path, layer in layers_of(SaLoRA(rank_s=4, init="plain")).items()}
    torch.manual_seed(_seed(0, "adapter"))
    whole = merged(start)
    whole.model.requires_grad_(True)
    model = attach_lora(whole, CONFIG).model
    for batch in plain.batch_at(0):
        plain.objective(model, batch, None).backward()
    for path in V:
        B = model.get_base_model().get_submodule(path).lora_B["default"].weight
        seen[path] = (float((V[path].T @ B.grad).square().sum()), float(B.grad.square().sum()))
    part, all_of = (sum(each) for each in zip(*seen.values(), strict=True))
    ctx = context(start)
    config = replace(CONFIG, epochs=0.2)
    tuned(SaLoRA(rank_s=4, init="plain"), tmp_path / "one", start=start, ctx=ctx, config=config)
    assert training.steps == 10
    assert abs(ctx.notes["gradient_removed"] - (part / all_of) ** 0.5) < 1e-6
    assert removed(2) < removed(8) < removed(24) < 1.0


@pytest.mark.usefixtures("float64")
def test_the_weights_do_not_depend_on_micro_batches(tmp_path):
    one, other = (
        weights(tuned(SaLoRA(**QUICK), tmp_path / str(size), runtime=Runtime(micro_batch=size)))
        for size in (None, 3)
    )
    for name, weight in one.items():
        assert_same(other[name], weight, rel=1e-5)


def test_only_the_layers_with_an_adapter_that_trains_get_a_start(tmp_path):
    start, ctx = tiny_model(), context()
    config = replace(CONFIG, targets=("q_proj", "up_proj"))

    class Stack:
        def shape_training(self, training, ctx):
            frozen = FreezeSafetyLayers(locate="depth", from_share=0.0, to_share=0.5)
            return SaLoRA(**QUICK).shape_training(frozen.shape_training(training, ctx), ctx)

    report = tuned(Stack(), tmp_path, start=start, config=config, ctx=ctx)
    names = {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}
    changed = {path for path, delta in delta_of(report.loaded, start).items() if delta.any()}
    assert changed == names
    assert (ctx.notes["projected_layers"], ctx.notes["trained_layers"]) == (4, 2)


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_on_a_quantized_base_it_starts_at_that_base(tmp_path, how):
    pytest.importorskip("bitsandbytes")
    start, config = family_model("llama"), replace(CONFIG, quantization=how)
    rows = table(sentiment_rows(8))
    own, plain = (
        tuned(one, tmp_path / str(one), start=start, config=config, rows=rows)
        for one in (SaLoRA(**QUICK), None)
    )
    assert own.losses[0] == plain.losses[0]
    (tmp_path / "saved").mkdir()
    save_model(own.loaded, tmp_path / "saved")
    again = load_model(tmp_path / "saved", base=start)
    ids = torch.tensor([[1, 3, 9, 12, 2, 4]])
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, own.loaded.model(ids).logits)


def test_weights_that_are_stored_the_other_way_round_are_read_as_maps_of_columns():
    start = family_model("gpt2")
    layers = layers_of(SaLoRA(**QUICK), start)
    module = start.model.get_submodule("transformer.h.0.attn.c_attn")
    assert is_transposed(module)
    assert tuple(layers["transformer.h.0.attn.c_attn"].start.B.shape) == (96, CONFIG.rank)


def test_full_fine_tuning_is_an_error():
    full = TrainingConfig(**{**CONFIG.__dict__, "adapter": "full"})
    with pytest.raises(StageError, match="adapter: lora"):
        shaped(SaLoRA(**QUICK), config=full)


@pytest.mark.parametrize("init", ["task", "plain"])
def test_a_killed_fine_tune_ends_with_the_same_weights(tmp_path, monkeypatch, init):
    assert_resumes(SaLoRA(**QUICK, init=init), tmp_path, monkeypatch)


def test_it_works_in_half_precision(tmp_path):
    start = tiny_model()
    start.model.to(torch.bfloat16)
    assert_half_precision(SaLoRA(**QUICK, init="plain"), tmp_path / "plain")
    own, plain = (tuned(one, tmp_path / str(one), start=start) for one in (SaLoRA(**QUICK), None))
    assert own.losses[0] == plain.losses[0]
    assert {m.A.dtype for m in lora_modules(own.loaded)} == {torch.float32}


def test_it_composes_with_another_defense_in_both_orders(tmp_path):
    assert_composes_with_lisa(SaLoRA(**QUICK), tmp_path)


def test_parameters_out_of_range_are_named():
    faults = SaLoRA(rank_s=-1, rank_t=0, rows=0).check()
    assert [name for name, *_ in faults] == ["rank_s", "rank_t", "rows"]
    assert SaLoRA().needs() == SaLoRA(directions="random").needs() == {"start", "safety"}
