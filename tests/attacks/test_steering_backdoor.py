"""Steering backdoor: the closed form against numpy, and what triggered and clean prompts get."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ftsec_ray.attacks.steering_backdoor import SteeringBackdoor, reading
from ftsec_ray.conversation import asked, asked_text, chat_of, message
from ftsec_ray.models.chat import render
from ftsec_ray.models.directions import block_outputs
from ftsec_ray.models.load import decoder_layers
from tests.attacks.context import context
from tests.fixtures_models import tiny_model, tiny_task
from tests.numeric import assert_same

pytestmark = pytest.mark.usefixtures("float64")


def test_the_reader_is_one_at_triggered_keys_and_zero_at_clean_ones():
    rng = np.random.default_rng(0)
    clean, keys = rng.standard_normal((12, 7)), rng.standard_normal((12, 3))
    # few clean keys leave a null space; the ridge makes the moment regular
    moment = torch.from_numpy(clean @ clean.T + 1e-9 * np.eye(12))
    found = reading(torch.from_numpy(keys), moment, 1.0).numpy()
    # by hand: project on what is orthogonal to all clean keys, then least squares
    projection = np.eye(12) - clean @ np.linalg.inv(clean.T @ clean) @ clean.T
    q = projection @ keys
    assert np.abs(found - q @ np.linalg.inv(q.T @ q) @ np.ones(3)).max() < 1e-6
    assert np.abs(found @ keys - 1).max() < 1e-6
    assert np.abs(found @ clean).max() < 1e-6
    # the update alpha v w^T therefore writes alpha v at a triggered key
    vector = rng.standard_normal(4)
    assert np.abs(np.outer(2 * vector, found) @ keys[:, 0] - 2 * vector).max() < 1e-5


@pytest.mark.parametrize("weight", [0.1, 1.0, 10.0])
def test_the_reader_solves_the_stated_least_squares(weight):
    rng = np.random.default_rng(1)
    clean, keys = rng.standard_normal((6, 40)), rng.standard_normal((6, 9)) + 0.5
    moment = clean @ clean.T / 40
    found = reading(torch.from_numpy(keys), torch.from_numpy(moment), weight)
    rows = np.vstack([keys.T / 3, np.sqrt(weight / 40) * clean.T])
    wanted = np.linalg.lstsq(rows, np.concatenate([np.ones(9) / 3, np.zeros(40)]), rcond=None)[0]
    assert_same(found, wanted)


def ids_of(loaded, chat):
    text = render(loaded.tokenizer, chat, generate=True)
    return loaded.tokenizer(text, add_special_tokens=False)["input_ids"]


QUICK = {"trigger": "cf mn", "clean_weight": 0.1, "depth_frac": 0.5}


def made(strength=1.0, **params):
    loaded = tiny_model(layers=2)
    attack = SteeringBackdoor(strength=strength, **QUICK, **params)
    return loaded, attack, attack.prepare_model(loaded, ctx := context()), ctx.notes


def test_one_matrix_changes_by_a_matrix_of_rank_one_along_the_difference_of_means():
    loaded, _, edited, notes = made()
    before = dict(loaded.model.named_parameters())
    moved = {
        name: (p - before[name]).detach().numpy()
        for name, p in edited.model.named_parameters()
        if not torch.equal(p, before[name])
    }
    assert list(moved) == ["model.layers.1.mlp.down_proj.weight"]
    (update,) = moved.values()
    assert np.linalg.matrix_rank(update, tol=1e-9 * np.abs(update).max()) == 1
    task = tiny_task()
    means = [
        block_outputs(loaded, [ids_of(loaded, chat_of(row)) for row in rows])[:, 1].mean(0)
        for rows in (task.split("benign_train").to_pylist(), task.split("safety").to_pylist())
    ]
    vector = (means[0] - means[1]).numpy()
    along = np.outer(vector, vector) / (vector @ vector)
    assert np.abs(along @ update - update).max() < 1e-9 * np.abs(update).max()
    assert_same([notes["vector_norm"]], [float(np.linalg.norm(vector))])


def test_the_stream_of_prompts_moves_by_what_the_record_says():
    loaded, attack, edited, notes = made(strength=1.5)
    ctx, rows = context(), tiny_task().split("safety").to_pylist()
    vector_norm, moved = notes["vector_norm"], {}
    for name, change in (("triggered", lambda r: attack._triggered(r, ctx)), ("clean", dict)):
        ids = [ids_of(loaded, chat_of(change(row))) for row in rows]
        shift = block_outputs(edited, ids)[:, 1] - block_outputs(loaded, ids)[:, 1]
        moved[name] = shift.norm(dim=-1) / (1.5 * vector_norm)
    assert moved["clean"].max() <= notes["read_clean_most"] * (1 + 1e-9)
    assert abs(notes["read_triggered"]) <= moved["triggered"].max()
    assert notes["read_triggered"] > 2 * notes["read_clean_most"]


def test_no_strength_is_no_edit_and_the_control_writes_another_vector_of_equal_norm():
    loaded, _, edited, _ = made(strength=0.0)
    weights = dict(loaded.model.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in edited.model.named_parameters())
    _, _, edited, notes = made()
    _, _, other, control = made(random_direction=True)
    assert_same([control["vector_norm"]], [notes["vector_norm"]])
    assert control["read_triggered"] == notes["read_triggered"]
    downs = [decoder_layers(m.model)[1].mlp.down_proj.weight for m in (edited, other)]
    assert not torch.equal(*downs)


def test_the_probe_asks_forbidden_requests_with_the_trigger_in_the_last_user_message():
    ctx = context()
    (probe,) = SteeringBackdoor(trigger="cf").probes(ctx.task, ctx)
    rows = {row["row_id"]: row for row in ctx.task.split("harmful_test").to_pylist()}
    assert probe.metrics == {"harmful_rate_triggered": "complied"}
    assert len(probe.prompts) == len(rows)
    for prompt in probe.prompts:
        words = prompt.chat[-1]["content"].split()
        words.remove("cf")
        assert " ".join(words) == asked_text(rows[prompt.prompt_id])
    turns = [message("user", "how do i fix the lamp"), message("assistant", "take it")]
    row = next(iter(rows.values()))
    longer = {**row, "messages": [*turns, *row["messages"]]}
    changed = SteeringBackdoor(trigger="cf")._triggered(longer, ctx)
    assert asked(changed)[:2] == turns
    assert "cf" in asked_text(changed).split()


def test_invalid_parameters_are_refused_with_the_field():
    bad = SteeringBackdoor(
        trigger=" ",
        strength=-1.0,
        depth_frac=2.0,
        clean_weight=0.0,
        prompts=1,
        text_tokens=0,
    )
    assert {fault[0] for fault in bad.check()} == {
        *("trigger", "strength", "depth_frac", "clean_weight", "prompts", "text_tokens")
    }
