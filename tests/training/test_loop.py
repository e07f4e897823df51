from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import Runtime
from ftsec_ray.errors import DataError, StageError
from ftsec_ray.models.load import save_model
from ftsec_ray.training.encode import batcher, encode_table, epoch_batches
from ftsec_ray.training.loop import learning_rate, sft
from ftsec_ray.training.losses import masked_nll, response_nll
from tests.fixtures_models import row, sentiment_rows, table, tiny_model
from tests.numeric import assert_same

CONFIG = TrainingConfig(epochs=2, batch_size=8, learning_rate=5e-3, rank=4)


def bytes_of(loaded, folder):
    folder.mkdir()
    save_model(loaded, folder)
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def tune(tmp_path, config=CONFIG, *, seed=0, name="work", runtime=None, shape=None):
    return sft(
        tiny_model(),
        table(sentiment_rows(48)),
        config,
        seed=seed,
        runtime=runtime or Runtime(),
        workdir=tmp_path / name,
        shape=shape,
        base_digest="b" * 32,
    )


@pytest.mark.usefixtures("float64")
def test_the_loss_equals_a_numpy_loop():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(3, 5, 7)), rng.integers(0, 7, size=(3, 5))
    labels[0, :3] = -100
    labels[2] = -100
    terms = [
        math.log(np.exp(logits[b, t]).sum()) - logits[b, t, labels[b, t + 1]]
        for b in range(3)
        for t in range(4)
        if labels[b, t + 1] != -100
    ]
    assert_same(masked_nll(torch.tensor(logits), torch.tensor(labels)), sum(terms) / len(terms))


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("constant", 0, 0.5),
        ("constant", 1, 1.0),
        ("constant", 9, 1.0),
        ("cosine", 11, 0.5),
        ("cosine", 20, 0.0),
        ("linear", 11, 0.5),
        ("linear", 15.5, 0.25),
        ("cosine", 6.5, 0.5 + 0.5 * math.cos(math.pi / 4)),
    ],
)
def test_the_learning_rate_is_as_computed_by_hand(schedule, step, expected):
    config = TrainingConfig(schedule=schedule, learning_rate=1.0, warmup_frac=0.1)
    assert learning_rate(config, step, 20) == pytest.approx(
        expected if schedule != "cosine" or step != 6.5 else 0.5 * (1 + math.cos(math.pi * 0.25))
    )


def test_every_row_comes_once_per_epoch_and_groups_are_of_like_length():
    lengths = [3 + (i * 7) % 20 for i in range(100)]
    for grouped in (True, False):
        batches = epoch_batches(lengths, 8, grouped=grouped, seed=1, epoch=0)
        assert sorted(i for batch in batches for i in batch) == list(range(100))
    spread = {
        g: np.mean(
            [
                np.ptp([lengths[i] for i in b])
                for b in epoch_batches(lengths, 8, grouped=g, seed=1, epoch=0)
            ]
        )
        for g in (True, False)
    }
    assert spread[True] < spread[False] / 2
    assert epoch_batches(lengths, 8, grouped=True, seed=1, epoch=0) != epoch_batches(
        lengths, 8, grouped=True, seed=1, epoch=1
    )


class AllLogits(torch.nn.Module):
    """A model whose forward knows no `logits_to_keep`."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None):
        return self.inner(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
        )


def model_of(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=37,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return getattr(transformers, f"{family}ForCausalLM")(config)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("batching", ["shuffled", "packed"])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_logits_at_responses_alone_give_the_loss_and_gradients_of_all_logits(family, batching):
    model, tokenizer = model_of(family), tiny_model().tokenizer
    made = []
    model.lm_head.register_forward_pre_hook(lambda _, given: made.append(given[0].shape[1]))
    encoded = encode_table(tokenizer, table(sentiment_rows(16)), max_length=64)
    (batch,) = batcher(tokenizer, encoded, batch_size=16, batching=batching, seed=0)(0)
    results = []
    for loss_of in (
        lambda: response_nll(model, batch, None),
        lambda: response_nll(AllLogits(model), batch, None),
        lambda: masked_nll(model(**batch.inputs()).logits, batch.labels),
    ):
        model.zero_grad()
        loss = loss_of()
        loss.backward()
        results.append((loss, [p.grad.clone() for p in model.parameters()]))
    for loss, gradients in results[:2]:
        assert_same(loss, results[2][0])
        assert_same(gradients, results[2][1])
    positions = int((batch.labels[:, 1:] != -100).any(0).sum())
    assert made == [positions, *[batch.labels.shape[1]] * 2]
    assert positions < batch.labels.shape[1]


@pytest.mark.usefixtures("float64")
def test_packed_rows_do_not_see_one_another():
    loaded = tiny_model()
    encoded = encode_table(loaded.tokenizer, table(sentiment_rows(16)), max_length=64)
    losses = []
    for batching in ("shuffled", "packed"):
        batches = batcher(loaded.tokenizer, encoded, batch_size=16, batching=batching, seed=0)(0)
        losses.append(sum(float(response_nll(loaded.model, b, None)) * b.weight for b in batches))
    assert_same(losses[0], losses[1])


@pytest.mark.usefixtures("float64")
def test_micro_batches_add_up_to_the_gradient_of_the_whole_batch(tmp_path):
    whole = tune(tmp_path, replace(CONFIG, epochs=1), name="w")
    split = tune(tmp_path, replace(CONFIG, epochs=1), name="s", runtime=Runtime(micro_batch=3))
    assert_same(split.losses, whole.losses)


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("batching", ["length_grouped", "packed"])
def test_tuning_learns_and_the_same_seed_gives_the_same_bytes(tmp_path, adapter, batching):
    config = replace(
        CONFIG,
        adapter=adapter,
        batching=batching,
        epochs=3,
        dropout=0.1 if adapter == "lora" else 0.0,
    )
    runs = [tune(tmp_path, config, name=f"w{i}") for i in range(2)]
    assert bytes_of(runs[0].loaded, tmp_path / "a") == bytes_of(runs[1].loaded, tmp_path / "b")
    assert bytes_of(tune(tmp_path, config, seed=1, name="w2").loaded, tmp_path / "c") != bytes_of(
        runs[0].loaded, tmp_path / "d"
    )
    assert np.mean(runs[0].losses[-3:]) < runs[0].losses[0]


class Killed(RuntimeError):
    """Stands for the end of the process."""


def test_a_tune_that_is_cut_off_continues_to_the_same_bytes(tmp_path):
    config = replace(CONFIG, dropout=0.1)
    undisturbed = tune(tmp_path, config, name="whole")
    seen = []

    def dying(training):
        def after(model, step):
            seen.append(step.index)
            if len(seen) == 5:
                raise Killed(str(step.index))

        return replace(training, after_step=(after,))

    often = Runtime(checkpoint_every_s=0.0)
    with pytest.raises(Killed, match="4"):
        tune(tmp_path, config, name="cut", runtime=often, shape=dying)
    continued = tune(tmp_path, config, name="cut", runtime=often, shape=dying)
    assert seen == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10, 11]
    assert bytes_of(continued.loaded, tmp_path / "a") == bytes_of(
        undisturbed.loaded, tmp_path / "b"
    )
    assert continued.losses == undisturbed.losses


def test_the_given_model_is_left_as_it_was(tmp_path):
    loaded = tiny_model()
    before = {name: p.clone() for name, p in loaded.model.state_dict().items()}
    sft(
        loaded,
        table(sentiment_rows(16)),
        replace(CONFIG, adapter="full"),
        seed=0,
        runtime=Runtime(),
        workdir=tmp_path,
    )
    assert all(torch.equal(before[name], p) for name, p in loaded.model.state_dict().items())


def test_only_chosen_weights_train(tmp_path):
    report = tune(
        tmp_path,
        replace(CONFIG, adapter="full"),
        shape=lambda t: replace(t, is_trainable=lambda name: "layers.0" in name),
    )
    start = dict(tiny_model().model.named_parameters())
    changed = {
        name
        for name, p in report.loaded.model.named_parameters()
        if not torch.equal(p, start[name])
    }
    assert changed
    assert all("layers.0" in name for name in changed)


def test_a_diverging_tune_says_at_which_step(tmp_path):
    with pytest.raises(StageError, match="nan at step 0"):
        tune(
            tmp_path,
            shape=lambda t: replace(
                t, objective=lambda m, b, s: response_nll(m, b, s) * float("nan")
            ),
        )


def test_rows_without_an_answer_in_reach_are_refused():
    with pytest.raises(DataError, match="max_length"):
        encode_table(tiny_model().tokenizer, table([row(0, "red", "")]), max_length=16)
