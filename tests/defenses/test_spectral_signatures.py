"""Spectral signatures: scores against a power iteration over single rows, and which rows go."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from ftsec_ray.context import Runtime
from ftsec_ray.conversation import chat_of
from ftsec_ray.defenses.spectral_signatures import SpectralSignatures, spectral
from ftsec_ray.method import control_of
from ftsec_ray.models.chat import render
from tests.attacks.conversations import agent_row, text_row, unanswered_row
from tests.defenses.shared import context
from tests.fixtures_models import row, sentiment_rows, table, tiny_model
from tests.killed_tune import killed_after
from tests.numeric import assert_same, in_float64

QUICK = {"warmup_epochs": 1.0}


def slow_states(loaded, rows):
    """The output of the last block at the last prompt token, one row at a time."""
    seen = []
    hook = loaded.model.model.layers[-1].register_forward_hook(
        lambda _m, _a, out: seen.append((out[0] if isinstance(out, tuple) else out)[0, -1])
    )
    for one in rows:
        text = render(loaded.tokenizer, chat_of(one), generate=True)
        ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            loaded.model(input_ids=torch.tensor([ids]))
    hook.remove()
    return torch.stack(seen).double().numpy()


def slow_scores(states):
    """Squared projections on the direction that a power iteration on the covariance finds."""
    centred = states - states.mean(axis=0)
    v = np.ones(states.shape[1])
    for _ in range(20_000):
        v = centred.T @ (centred @ v)
        v /= np.linalg.norm(v)
    return (centred @ v) ** 2


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_scores_equal_those_of_a_power_iteration():
    states = drawn(30, 8) * torch.linspace(1, 3, 8)
    scores, share = spectral(list(states))
    assert np.allclose(scores, slow_scores(states.numpy()), rtol=1e-6, atol=1e-9)
    centred = (states - states.mean(0)).numpy()
    assert_same(share, np.linalg.eigvalsh(centred.T @ centred)[-1] / (centred**2).sum())


def test_rows_that_share_a_shift_score_highest():
    states = drawn(100, 16)
    states[:12] += 12.0 * drawn(16, seed=1) / drawn(16, seed=1).norm()
    scores, _ = spectral(list(states))
    assert set(np.argsort(scores)[-12:]) == set(range(12))


def test_equal_states_score_zero():
    assert spectral([torch.ones(4, dtype=torch.float64)] * 3) == ([0.0] * 3, 0.0)


@pytest.mark.usefixtures("float64")
def test_the_highest_scores_of_each_label_go_and_the_others_keep_every_byte(tmp_path):
    loaded = in_float64(tiny_model())
    given = sentiment_rows(40)
    rows, kept = table(given), set()
    for label in ("good", "bad"):
        group = [r for r in given if r["label"] == label]
        scores = slow_scores(slow_states(loaded, group))
        count = int(1.5 * 0.2 * len(group) + 1e-9)
        order = np.argsort(-scores, kind="stable")
        assert scores[order[count - 1]] > scores[order[count]] * (1 + 1e-6), "no tie at the cut"
        kept |= {group[i]["row_id"] for i in order[count:]}
    ctx = context(tmp_path, models={"reference": loaded})
    got = SpectralSignatures(epsilon=0.2, warmup_epochs=0.0).craft_data(rows, ctx)
    assert got.equals(rows.filter([r["row_id"] in kept for r in given]))
    assert ctx.notes["dropped_rows"] == 40 - len(kept)


def test_the_record_counts_dropped_rows_by_poisoned_and_clean(tmp_path):
    given = [{**r, "poisoned": i % 4 == 0} for i, r in enumerate(sentiment_rows(40))]
    ctx = context(tmp_path, models={"reference": tiny_model()})
    got = SpectralSignatures(warmup_epochs=0.0).craft_data(table(given), ctx).to_pylist()
    lost = 10 - sum(r["poisoned"] for r in got)
    assert ctx.notes["dropped_poisoned"] == lost
    assert ctx.notes["dropped_clean"] == 40 - len(got) - lost
    assert set(ctx.notes["top_direction_share"]) == {"good", "bad"}


def test_no_epsilon_drops_nothing_and_loads_no_model(tmp_path):
    rows = table(sentiment_rows(20))
    ctx = context(tmp_path)
    assert SpectralSignatures(epsilon=0.0).craft_data(rows, ctx).equals(rows)
    assert ctx.notes["dropped_rows"] == 0


def test_the_control_drops_as_many_random_rows_of_each_label(tmp_path):
    rows = table(sentiment_rows(40))
    method = SpectralSignatures(epsilon=0.3, warmup_epochs=0.0)
    left = [
        one.craft_data(rows, context(tmp_path, models={"reference": tiny_model()}))
        for one in (method, control_of(method))
    ]
    labels = [Counter(one["label"].to_pylist()) for one in left]
    assert labels[0] == labels[1]
    assert not left[0].equals(left[1])


def test_rows_without_a_prompt_or_beyond_the_positions_stay_and_are_counted(tmp_path):
    odd = [agent_row(), unanswered_row(), text_row(), row(99, "red " * 300, "good")]
    rows = table([*[{**r, "label": None} for r in sentiment_rows(20)], *odd])
    ctx = context(tmp_path, models={"reference": tiny_model()})
    got = SpectralSignatures(epsilon=0.5, warmup_epochs=0.0).craft_data(rows, ctx)
    assert ctx.notes["unread_rows"] == 2
    assert {"a/2", "t/0099"} <= set(got["row_id"].to_pylist())
    assert rows.num_rows - got.num_rows == int(0.75 * 22)
    assert list(ctx.notes["top_direction_share"]) == ["none"]


def test_a_killed_warm_up_goes_on_and_drops_the_same_rows(tmp_path, monkeypatch):
    rows, loaded = table(sentiment_rows(32)), tiny_model()

    def run(folder):
        runtime = Runtime(checkpoint_every_s=0.0)
        ctx = context(tmp_path / folder, models={"reference": loaded}, runtime=runtime)
        return SpectralSignatures(warmup_epochs=1.0).craft_data(rows, ctx), ctx.notes

    killed_after(3, lambda: run("killed"), monkeypatch)
    again, whole = run("killed"), run("whole")
    assert again[0].equals(whole[0])
    assert again[1] == whole[1]
    assert whole[1]["warm_up_steps"] == 8


def test_the_warm_up_changes_no_weight_of_the_aligned_model(tmp_path):
    loaded = tiny_model()
    loaded.model.to(torch.bfloat16)
    before = {n: w.clone() for n, w in loaded.model.named_parameters()}
    ctx = context(tmp_path, models={"reference": loaded})
    ctx.training = replace(ctx.training, learning_rate=0.05)
    SpectralSignatures(warmup_epochs=1.0).craft_data(table(sentiment_rows(24)), ctx)
    assert all(torch.equal(w, before[n]) for n, w in loaded.model.named_parameters())
    assert {w.dtype for w in loaded.model.parameters()} == {torch.bfloat16}


def test_parameters_out_of_range_are_named():
    assert [f[0] for f in SpectralSignatures(epsilon=0.7, warmup_epochs=-1.0).check()] == [
        "epsilon",
        "warmup_epochs",
    ]
    assert not SpectralSignatures(epsilon=0.66, warmup_epochs=0.0).check()
