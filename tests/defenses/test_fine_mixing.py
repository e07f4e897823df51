"""Fine-mixing: which entries come from where, E-PUR by hand, and its control."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import Runtime
from ftsec_ray.defenses.clean_tuning import CleanTuning
from ftsec_ray.defenses.fine_mixing import FineMixing
from ftsec_ray.errors import StageError
from ftsec_ray.models.load import copy_model
from ftsec_ray.models.row_tokens import encode_rows
from ftsec_ray.training.repair import exchanges_of
from tests.defenses.shared import context, tiny_adapter, tiny_full, whole
from tests.fixtures_models import tiny_model
from tests.killed_tune import killed_after
from tests.numeric import in_float64

pytestmark = pytest.mark.usefixtures("float64")
QUICK = {"rows": 8, "epochs": 1.0}
START = in_float64(tiny_model(seed=0))
TUNED = {"adapter": tiny_adapter(START), "full": tiny_full(START)}
CONFIG = TrainingConfig(max_length=64, rank=4)


def made(method, folder, kind="full", *, seed=0, models=None, runtime=None):
    ctx = context(
        folder, training=CONFIG, models=models or {"start": START}, seed=seed, runtime=runtime
    )
    return method.revise_model(copy_model(TUNED[kind]), ctx), ctx


def same(one, other):
    return all(np.array_equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("kind", TUNED)
@pytest.mark.parametrize("keep", [0.2, 0.7])
def test_every_entry_is_the_starts_or_the_tuned_one_at_the_given_share(kind, keep, tmp_path):
    got, ctx = made(FineMixing(keep=keep, purify=0, epochs=0.0), tmp_path, kind)
    got, start, tuned = whole(got), whole(START), whole(TUNED[kind])
    back = changed = 0
    for name in start:
        moved = tuned[name] != start[name]
        assert np.all((got[name] == start[name]) | (got[name] == tuned[name])), name
        back += int((moved & (got[name] == start[name])).sum())
        changed += int(moved.sum())
    # five standard deviations of a share of so many entries
    assert abs(back / changed - (1 - keep)) < 5 * math.sqrt(keep * (1 - keep) / changed)
    assert (ctx.notes["reset_entries"], ctx.notes["changed_entries"]) == (back, changed)


def test_the_ends_are_the_start_and_the_tuned_model(tmp_path):
    got, _ = made(FineMixing(keep=0.0, purify=0, epochs=0.0), tmp_path, "full")
    assert same(whole(got), whole(START))
    got, ctx = made(FineMixing(keep=1.0, purify=0, epochs=0.0), tmp_path, "adapter")
    assert got.has_adapter
    assert same(whole(got), whole(TUNED["adapter"]))
    assert ctx.notes["change_norm"] == 0.0


def test_another_seed_keeps_other_entries(tmp_path):
    method = FineMixing(purify=0, epochs=0.0)
    one, other = (whole(made(method, tmp_path, seed=seed)[0]) for seed in (0, 1))
    assert not same(one, other)
    assert same(one, whole(made(method, tmp_path, seed=0)[0]))


@pytest.mark.parametrize("kind", TUNED)
def test_its_control_is_clean_tuning_bit_for_bit_and_mixing_is_not(kind, tmp_path):
    plain = {"rows": 8, "epochs": 2.0}
    clean, _ = made(CleanTuning(**plain), tmp_path / "clean", kind)
    control, _ = made(FineMixing(keep=1.0, purify=0, **plain), tmp_path / "control", kind)
    mixed, ctx = made(FineMixing(**plain), tmp_path / "mixed", kind)
    assert same(whole(control), whole(clean))
    assert not same(whole(mixed), whole(clean))
    assert ctx.notes["repair_steps"] == 2


def test_purifying_resets_the_tokens_that_moved_most_for_how_rare_they_are(tmp_path):
    rows = exchanges_of(context(tmp_path), "benign_train", 15, by="clean_tuning")
    counts = {}
    for ids, _ in encode_rows(START.tokenizer, rows, max_length=64):
        for token in ids:
            counts[token] = counts.get(token, 0) + 1
    assert max(counts.values()) > 20
    name = "model.embed_tokens.weight"
    start, tuned = whole(START)[name], whole(TUNED["full"])[name]
    scores = [
        math.sqrt(sum((tuned[t] - start[t]) ** 2)) / math.log(max(counts.get(t, 0), 20))
        for t in range(len(start))
    ]
    want = set(sorted(range(len(start)), key=lambda t: -scores[t])[:5])
    got, ctx = made(FineMixing(keep=1.0, purify=5, rows=15, epochs=0.0), tmp_path, "full")
    got = whole(got)
    reset = {t for t in range(len(start)) if np.array_equal(got[name][t], start[t])}
    assert reset == want
    assert all(np.array_equal(got[name][t], tuned[t]) for t in set(range(len(start))) - want)
    assert all(np.array_equal(w, got[n]) for n, w in whole(TUNED["full"]).items() if n != name)
    assert ctx.notes["purified_tokens"] == 5


def test_an_adapter_moves_no_embedding_so_that_nothing_is_purified(tmp_path):
    got, ctx = made(FineMixing(keep=1.0, epochs=0.0), tmp_path, "adapter")
    assert ctx.notes["purified_tokens"] == 0
    assert same(whole(got), whole(TUNED["adapter"]))


def test_a_killed_repair_resumes_to_the_same_weights(tmp_path, monkeypatch):
    def run(folder):
        method = FineMixing(rows=12, epochs=2.0, batch_size=4)
        return made(method, tmp_path / folder, runtime=Runtime(checkpoint_every_s=0.0))[0]

    killed_after(4, lambda: run("killed"), monkeypatch)
    assert same(whole(run("killed")), whole(run("whole")))


def test_a_model_in_bfloat16_keeps_its_dtype(tmp_path):
    start, tuned = tiny_model(seed=0), tiny_full(tiny_model(seed=0))
    for loaded in (start, tuned):
        loaded.model.to(torch.bfloat16)
    ctx = context(tmp_path, training=CONFIG, models={"start": start})
    got = FineMixing(rows=4, epochs=1.0).revise_model(copy_model(tuned), ctx)
    assert {w.dtype for w in got.model.parameters()} == {torch.bfloat16}
    assert "rounding_lost" in ctx.notes


def test_a_start_of_another_shape_is_named_and_parameters_are_checked(tmp_path):
    with pytest.raises(StageError, match="embed_tokens"):
        made(FineMixing(purify=0), tmp_path, models={"start": tiny_model(hidden=48)})
    bad = FineMixing(keep=1.5, purify=-1, rows=0).check()
    assert [fault[0] for fault in bad] == ["rows", "keep", "purify"]
    assert FineMixing(split="trusted").needs() == {"start", "trusted"}
