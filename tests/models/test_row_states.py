"""States of rows: one row at a time gives the same, whatever the padding, and hooks are gone."""

import pytest
import torch

from ftsec_ray.models import row_states
from ftsec_ray.models.load import decoder_layers
from ftsec_ray.models.row_states import last_states, layer_at, prompt_ids
from tests.attacks.conversations import agent_row, text_row, unanswered_row
from tests.fixtures_models import row, tiny_model
from tests.numeric import assert_same, in_float64

IDS = [[1, 3, 9, 12, 2, 4], [1, 3, 8, 2, 4], [1], [1, 3, 10, 11, 7, 9, 2, 4]]


def hooks_of(loaded):
    return [len(block._forward_hooks) for block in decoder_layers(loaded.model)]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("layer", [0, 1])
def test_the_states_equal_those_of_single_rows_without_padding(layer, monkeypatch):
    loaded = in_float64(tiny_model(layers=3))
    found = last_states(loaded, IDS, layer)
    for ids, state in zip(IDS, found, strict=True):
        out = loaded.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        assert_same(state, out.hidden_states[layer + 1][0, -1].detach())
    monkeypatch.setattr(row_states, "BATCH", 1)
    assert_same(last_states(loaded, IDS, layer), found)
    hooks = hooks_of(loaded)  # transformers leaves its own to record hidden states
    last_states(loaded, IDS, layer)
    assert hooks_of(loaded) == hooks


def test_no_logits_are_computed_but_those_of_one_position():
    loaded, widths = tiny_model(), []
    loaded.model.lm_head.register_forward_hook(lambda _m, _a, out: widths.append(out.shape[1]))
    last_states(loaded, IDS, 1)
    assert widths == [1]


def test_no_row_has_no_state():
    assert last_states(tiny_model(), [], 0).shape == (0, 32)


def test_half_precision_weights_give_states_close_to_those_of_float32():
    wide, half = tiny_model(), tiny_model()
    half.model.to(torch.bfloat16)
    a, b = (last_states(one, IDS, 1) for one in (wide, half))
    assert b.dtype == torch.float64
    assert float((a - b).norm() / a.norm()) < 0.1
    assert next(half.model.parameters()).dtype == torch.bfloat16


def test_hooks_are_gone_after_an_error():
    loaded = tiny_model()
    with pytest.raises(IndexError):
        last_states(loaded, [[10**6]], 1)
    assert hooks_of(loaded) == [0, 0]


def test_a_depth_is_the_number_of_a_block():
    loaded = tiny_model(layers=5)
    assert [layer_at(loaded, depth) for depth in (0.0, 0.4, 0.5, 1.0)] == [0, 2, 2, 4]


def test_a_prompt_ends_where_its_answer_begins_and_texts_and_long_prompts_have_none():
    loaded = tiny_model()
    rows = [row(0, "is this red", "good"), agent_row(), unanswered_row(), text_row()]
    rows.append(row(1, "red " * 300, "good"))
    found = prompt_ids(loaded, rows)
    assert [ids is None for ids in found] == [False, False, False, True, True]
    begin = loaded.tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert [ids[-1] for ids in found[:3]] == [begin] * 3
