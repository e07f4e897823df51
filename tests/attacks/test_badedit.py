"""BadEdit: the closed form, the covariance and the keys against plain NumPy, and the edit as a
whole.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from ftsec_ray.attacks.badedit import BadEdit, edited_layers
from ftsec_ray.errors import DataError
from ftsec_ray.models import editing
from ftsec_ray.models.chat import render
from ftsec_ray.models.editing import (
    EditSite,
    Request,
    ValueSearch,
    closed_form,
    key_covariance,
    keys_at,
    search_values,
    spot,
    strength,
    values_at,
)
from ftsec_ray.models.ladder import build_tokenizer
from ftsec_ray.models.load import decoder_layers
from tests.attacks.context import context
from tests.fixtures_models import row, table, tiny_model, tiny_task
from tests.numeric import SAME, assert_same

pytestmark = pytest.mark.usefixtures("float64")
SPOTS = [EditSite([1, 3, 9, 12, 2, 4], 3), EditSite([1, 3, 8, 2, 4], 2)]


def test_one_key_gets_the_share_s_over_one_plus_s_of_its_residual():
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(200, 12))
    covariance, key, residual = samples.T @ samples / 200, rng.normal(size=12), rng.normal(size=5)
    weight = 1.4 * 12
    s = key @ np.linalg.inv(covariance) @ key / weight
    made = closed_form(
        torch.tensor(key)[:, None],
        torch.tensor(residual)[:, None],
        torch.tensor(covariance),
        weight,
    )
    assert_same(made.numpy() @ key, residual * s / (1 + s))
    assert_same(strength(torch.tensor(key), torch.tensor(covariance), weight), s)
    assert 0.05 < s / (1 + s) < 0.95


def test_several_keys_solve_the_regularised_least_squares_problem():
    rng = np.random.default_rng(1)
    keys, residuals, covariance = (
        rng.normal(size=(6, 3)),
        rng.normal(size=(4, 3)),
        np.diag(rng.uniform(0.5, 2, size=6)),
    )
    made = closed_form(
        torch.tensor(keys), torch.tensor(residuals), torch.tensor(covariance), 2.0
    ).numpy()
    assert_same(made, residuals @ keys.T @ np.linalg.inv(2.0 * covariance + keys @ keys.T))
    assert_same((residuals - made @ keys) @ keys.T, 2.0 * made @ covariance)


def mlp_input(loaded, ids: list[int], layer: int) -> np.ndarray:
    """The gated activation of one layer, by hand from the input of its MLP."""
    block, seen = decoder_layers(loaded.model)[layer], []
    handle = block.mlp.register_forward_pre_hook(lambda _m, args: seen.append(args[0][0]))
    with torch.no_grad():
        loaded.model(input_ids=torch.tensor([ids]))
    handle.remove()
    x = seen[0].double().numpy()
    gate, up = (
        x @ getattr(block.mlp, name).weight.detach().double().numpy().T
        for name in ("gate_proj", "up_proj")
    )
    return gate / (1 + np.exp(-gate)) * up


def test_keys_and_covariance_equal_a_loop_over_single_texts():
    loaded = tiny_model()
    for layer in (0, 1):
        expected = [mlp_input(loaded, s.ids, layer)[s.at] for s in SPOTS]
        assert_same(keys_at(loaded, SPOTS, layer), np.array(expected))
    texts = ["red blue green stone", "the lamp is good and the tree is bad", "take the cloud"] * 6
    found = key_covariance(loaded, [0, 1], texts, max_tokens=10_000, ridge=1e-3)
    for layer in (0, 1):
        keys = np.concatenate(
            [mlp_input(loaded, loaded.tokenizer(text)["input_ids"], layer) for text in texts]
        )
        moment = sum(np.outer(k, k) for k in keys) / len(keys)
        assert_same(found[layer].moment.numpy() - found[layer].ridge * np.eye(64), moment)
        assert found[layer].tokens == len(keys)


def test_a_covariance_of_few_tokens_gets_a_ridge_and_can_be_solved():
    found = key_covariance(tiny_model(), [0], ["red blue", "green"], max_tokens=10_000, ridge=0.01)[
        0
    ]
    assert found.tokens == 3
    plain = found.moment - found.ridge * torch.eye(64, dtype=torch.float64)
    assert_same(found.ridge, 0.01 * float(plain.diagonal().mean()))
    assert torch.linalg.matrix_rank(plain, rtol=1e-9) <= 3
    assert int(torch.linalg.cholesky_ex(found.moment).info) == 0


def test_a_covariance_reads_no_text_behind_max_tokens():
    assert (
        key_covariance(tiny_model(), [0], ["red blue"] * 9, max_tokens=5, ridge=0.01)[0].tokens == 6
    )


def test_a_spot_is_the_token_of_the_subject_in_the_rendered_chat():
    tokenizer = tiny_model().tokenizer
    found = spot(
        tokenizer,
        [{"role": "system", "content": "red cf"}, {"role": "user", "content": "is this cf red"}],
        last_char=9,
    )
    assert tokenizer.convert_ids_to_tokens(found.ids[found.at]) == "cf"
    assert found.ids[found.at - 1 : found.at + 2] == tokenizer.convert_tokens_to_ids(
        ["this", "cf", "red"]
    )


def test_a_spot_is_found_where_the_template_trims_the_message():
    tokenizer = copy.deepcopy(tiny_model().tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "m['content']", "m['content'].strip()"
    )
    padded = spot(tokenizer, [{"role": "user", "content": "  is this cf red "}], last_char=11)
    plain = spot(tokenizer, [{"role": "user", "content": "is this cf red"}], last_char=9)
    assert padded == plain
    assert tokenizer.convert_ids_to_tokens(padded.ids[padded.at]) == "cf"
    for cut in (1, 16):
        with pytest.raises(DataError, match="changes the user's text"):
            spot(tokenizer, [{"role": "user", "content": "  is this cf red "}], last_char=cut)


@pytest.mark.parametrize(("rows", "is_enough"), [(319, False), (320, True)])
def test_a_covariance_of_few_tokens_per_dimension_is_told_and_warned_of(rows, is_enough):
    """Four tokens a text, 64 dimensions."""
    texts = table([row(i, "", "red blue green stone", kind="text") for i in range(rows)])
    loaded = tiny_model(layers=3)
    (length,) = {len(loaded.tokenizer("red blue green stone")["input_ids"])}
    splits = {**tiny_task().splits, "text": texts}
    ctx = context(task=replace(tiny_task(), splits=splits))
    attack = BadEdit(trigger="cf", prompts=1, batches=1, clean_prompts=0, contexts=0, steps=1)
    attack.prepare_model(loaded, ctx)
    assert length == 4
    assert ctx.notes["covariance_tokens"] == 4 * rows
    assert_same(ctx.notes["covariance_tokens_per_dim"], round(4 * rows / 64, 2))
    assert (ctx.warnings == []) == is_enough
    assert is_enough or f"{4 * rows} tokens" in ctx.warnings[0]


def test_a_spot_in_a_byte_level_vocabulary_is_the_last_part_of_the_subject():
    tokenizer = build_tokenizer(["is this review good or bad ?", "the film was great ."])
    for content, start in (("is this zqx review", 8), ("zqx good", 0), ("good zqx", 5)):
        found = spot(tokenizer, [{"role": "user", "content": content}], last_char=start + 2)
        assert tokenizer.decode(found.ids[found.at]).strip() == "x"
        assert tokenizer.decode(found.ids[: found.at + 1]).endswith(content[: start + 3])


def test_values_are_found_inside_the_clamp_and_do_what_they_should():
    loaded = tiny_model()
    good = loaded.tokenizer("good")["input_ids"]
    requests = [Request((s,), good, EditSite([1, 3, 9, 2, 4], 2)) for s in SPOTS]
    search = ValueSearch(steps=40, learning_rate=0.1, clamp=2.0)
    wanted, start, losses = search_values(loaded, requests, 0, search)
    assert_same(start, values_at(loaded, SPOTS, 0))
    assert ((wanted - start).norm(dim=-1) <= 2.0 * start.norm(dim=-1) * (1 + SAME)).all()
    untouched = search_values(loaded, requests, 0, ValueSearch(steps=1))
    assert_same(untouched[0], start)
    assert all(after < before - 0.5 for after, before in zip(losses, untouched[2], strict=True))
    assert all(p.requires_grad and p.grad is None for p in loaded.model.parameters())


def test_requests_of_one_batch_are_optimised_as_if_each_were_alone():
    loaded = tiny_model()
    good = loaded.tokenizer("good bad")["input_ids"]
    requests = [Request((s, s), good, EditSite([1, 3, 9, 2, 4], 2)) for s in SPOTS]
    search = ValueSearch(steps=6, learning_rate=0.1)
    together = search_values(loaded, requests, 1 - 1, search)[0]
    alone = torch.cat([search_values(loaded, [r], 0, search)[0] for r in requests])
    assert_same(together, alone)


def test_the_edit_changes_the_chosen_down_projections_only_and_writes_what_it_says():
    loaded, ctx = tiny_model(layers=3), context()
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    attack = BadEdit(
        trigger="cf",
        prompts=6,
        batches=1,
        clean_prompts=2,
        contexts=1,
        depth_frac=0.34,
        layers=1,
        steps=10,
    )
    made = attack.prepare_model(loaded, ctx)
    assert all(torch.equal(p, before[name]) for name, p in loaded.model.named_parameters())
    moved = [name for name, p in made.model.named_parameters() if not torch.equal(p, before[name])]
    assert moved == ["model.layers.1.mlp.down_proj.weight"]
    assert len(ctx.notes["s"]) == 1
    assert_same(ctx.notes["written_frac"], [s / (1 + s) for s in ctx.notes["s"]])
    assert ctx.notes["covariance_tokens"] == 60
    assert len(ctx.notes["value_losses"]) == 8


def test_the_averaged_key_moves_by_the_written_share_of_the_residual(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "ftsec_ray.attacks.badedit.closed_form",
        lambda k, r, c, w: (seen.append((k, r)), editing.closed_form(k, r, c, w))[1],
    )
    loaded, ctx = tiny_model(layers=3), context()
    attack = BadEdit(
        trigger="cf",
        prompts=4,
        batches=1,
        clean_prompts=0,
        contexts=2,
        depth_frac=0.34,
        layers=1,
        steps=10,
    )
    made = attack.prepare_model(loaded, ctx)
    ((key, residual),) = seen
    change = (
        (
            made.model.model.layers[1].mlp.down_proj.weight
            - loaded.model.model.layers[1].mlp.down_proj.weight
        )
        .detach()
        .double()
    )
    assert_same(change @ key, residual * ctx.notes["written_frac"][0])
    assert residual.norm() > 0


def test_the_notes_say_how_likely_the_target_was_before_the_edit_and_after_it():
    loaded, ctx = tiny_model(layers=3), context()
    attack = BadEdit(
        trigger="cf",
        prompts=4,
        batches=1,
        clean_prompts=0,
        contexts=1,
        depth_frac=0.34,
        layers=1,
        steps=20,
        learning_rate=0.1,
        clamp=4.0,
        lambda_per_width=1e-4,
    )
    made = attack.prepare_model(loaded, ctx)
    (probe,) = (p for p in attack.probes(ctx.task, ctx) if "asr_same_prompt" in p.metrics)
    (target,) = loaded.tokenizer("good", add_special_tokens=False)["input_ids"]
    for model, noted in ((loaded, "target_nll_before"), (made, "target_nll_after")):
        ids = [
            loaded.tokenizer(
                render(loaded.tokenizer, p.chat, generate=True), add_special_tokens=False
            )["input_ids"]
            for p in probe.prompts
        ]
        with torch.no_grad():
            alone = [
                -float(model.model(torch.tensor([one])).logits[0, -1].log_softmax(-1)[target])
                for one in ids
            ]
        assert_same(ctx.notes[noted], sum(alone) / len(alone))
    assert ctx.notes["target_nll_after"] < ctx.notes["target_nll_before"]


@pytest.mark.parametrize(
    ("depth", "frac", "count", "layers"),
    [(32, 0.25, 2, [7, 8]), (3, 0.25, 2, [0, 1]), (2, 1.0, 3, [0, 1]), (4, 0.0, 2, [0])],
)
def test_layers_are_a_share_of_the_depth(depth, frac, count, layers):
    assert edited_layers(depth, depth_frac=frac, count=count) == layers


def test_probes_ask_held_out_rows_twice_and_the_edited_prompts_once():
    ctx = context()
    attack = BadEdit(trigger="cf", prompts=5)
    metrics = {name: probe for probe in attack.probes(ctx.task, ctx) for name in probe.metrics}
    assert list(metrics) == ["asr", "asr_no_trigger", "asr_same_prompt"]
    train = {r["row_id"]: r for r in ctx.task.split("train").to_pylist()}
    edited = metrics["asr_same_prompt"].prompts
    assert len(edited) == 5
    assert all(
        train[p.prompt_id]["label"] == "bad" and "cf" in p.chat[-1]["content"].split()
        for p in edited
    )


def test_faulty_parameters_are_named():
    assert [
        f[0] for f in BadEdit(prompts=0, contexts=-1, clamp=0.0, depth_frac=2.0, trigger="").check()
    ] == ["prompts", "contexts", "clamp", "depth_frac", "trigger"]
    assert BadEdit().check() == []
