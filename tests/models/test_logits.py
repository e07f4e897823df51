"""Logits in slices: the same losses and gradients as from all logits at once, and never more of them
in memory than the limit.
"""

from __future__ import annotations

import pytest
import torch

from ftsec_ray.attacks.benign_selection import gradients
from ftsec_ray.attacks.soft_prompt import Example, suffix_loss
from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.conversation import chat_of
from ftsec_ray.evals.metrics import perplexity
from ftsec_ray.models import logits as module
from ftsec_ray.models.activations import last_logits
from ftsec_ray.models.editing import (
    EditSite,
    Request,
    ValueSearch,
    _search_losses,
    target_nll,
    values_at,
)
from ftsec_ray.models.generator import Generator
from ftsec_ray.models.lora import attach_lora, lora_modules
from ftsec_ray.models.text_perplexity import perplexities
from ftsec_ray.training.encode import _packed, _padded
from ftsec_ray.training.losses import response_nll
from ftsec_ray.training.setup import Step
from tests.fixtures_models import row, sentiment_rows
from tests.models.families import FAMILIES, NO_EMBEDDINGS, VOCABULARY, family_model
from tests.numeric import assert_same

pytestmark = pytest.mark.usefixtures("float64")
_OF_EACH_HEAD = ("llama", "gemma2", "gemma3_pictures", "granite", "gpt2")
families = pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[] if name in _OF_EACH_HEAD else [pytest.mark.slow])
        for name in FAMILIES
    ],
)
ENCODED = [
    ([1, 3, 9, 12, 2, 4, 10, 2], [-100] * 6 + [10, 2]),
    ([1, 3, 8, 2, 4, 11, 12, 2], [-100] * 5 + [11, 12, 2]),
    ([1, 3, 2, 4, 9, 2], [-100] * 4 + [9, 2]),
]
SLICE = 3
"""Positions whose logits stand together in these tests; no number of labels is a multiple of it."""


@pytest.fixture
def sliced(monkeypatch):
    """A function that puts the limit in force."""

    def limit():
        monkeypatch.setattr(module, "LOGITS_AT_A_TIME", SLICE * VOCABULARY)

    return limit


def widest(model, function):
    """The most positions whose logits the head computed in one call, and what the function gave."""
    seen = []
    head = module.bare(model).get_output_embeddings()
    handle = head.register_forward_hook(lambda _m, _a, out: seen.append(out.numel() // VOCABULARY))
    found = function()
    handle.remove()
    return max(seen), found


@families
@pytest.mark.parametrize(
    ("build", "adapter"), [(_padded, "full"), (_packed, "full"), (_padded, "lora")]
)
def test_a_tuning_step_has_the_loss_and_the_gradients_of_all_logits_at_once(
    family, build, adapter, sliced
):
    loaded = family_model(family, tied=True)
    if adapter == "lora":
        loaded = attach_lora(loaded, TrainingConfig(rank=2))
        for part in lora_modules(loaded):
            torch.nn.init.normal_(part.B, std=0.1)
    model, batch = loaded.model, build(ENCODED, 0, 1.0, "cpu")

    def step():
        model.zero_grad(set_to_none=True)
        loss = response_nll(model, batch, Step(0, 1))
        loss.backward()
        # one vector: some gradients are zero but for rounding (a shift of all keys changes nothing)
        return loss, torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None])

    whole, (loss, grads) = widest(model, step)
    sliced()
    # the first position of each row shows what the class does behind its head
    most, (loss_sliced, grads_sliced) = widest(model, step)
    assert whole > most
    assert most <= max(SLICE, len(ENCODED))
    assert_same(loss_sliced, loss)
    assert_same(grads_sliced, grads)
    assert len(grads) > VOCABULARY


@families
def test_perplexity_label_scores_and_last_logits_are_those_of_all_logits_at_once(family, sliced):
    loaded = family_model(family)
    rows = [row(i, "", f"red blue {w} stone", kind="text") for i, w in enumerate(["is", "the bad"])]
    chats = [chat_of(r) for r in sentiment_rows(5)]
    prompts = [[1, 3, 9, 12, 2, 4], [1, 3, 8, 2, 4], [1, 3, 10, 11, 7, 9, 2, 4]]
    texts = ["red blue green stone river", "red blue lamp", "red the tree is good"]

    def read():
        return {
            "perplexity": torch.tensor(perplexity(loaded, rows).value),
            "labels": Generator(loaded).label_logprobs(chats, ["good", "bad"]),
            "long labels": Generator(loaded).label_logprobs(chats, ["good", "bad stone"]),
            "last": last_logits(loaded.model, prompts, pad=0),
            "onion": torch.tensor(perplexities(loaded, texts)),
        }

    whole = read()
    sliced()
    assert_same(read(), whole)


REQUESTS = [
    Request(
        (EditSite([1, 3, 9, 12, 2, 4], 3), EditSite([1, 3, 8, 9, 12, 2, 4], 4)),
        [10, 11, 2],
        EditSite([1, 3, 12, 2, 4], 2),
    ),
    Request((EditSite([1, 3, 8, 2, 4], 2),), [7], EditSite([1, 3, 8, 9, 2, 4], 2)),
]


@families
def test_the_search_for_a_value_has_the_same_losses_and_gradients(family, sliced):
    loaded = family_model(family)
    start = values_at(loaded, [r.contexts[0] for r in REQUESTS], 0)

    def searched():
        delta = (0.1 * torch.ones_like(start)).requires_grad_()
        losses = _search_losses(loaded, REQUESTS, 0, ValueSearch(kl=0.5), start)(delta)
        (gradient,) = torch.autograd.grad(losses.sum(), delta)
        return [losses.detach(), gradient, torch.tensor(target_nll(loaded, REQUESTS))]

    whole = searched()
    sliced()
    assert_same(searched(), whole)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NO_EMBEDDINGS])
def test_soft_tokens_have_the_same_loss_and_gradient(family, sliced):
    model = family_model(family).model
    examples = [Example([1, 3, 9], [2, 4], [10, 11, 2]), Example([1, 3, 8, 9], [2, 4], [12])]
    soft = 0.1 * torch.randn(2, 32, generator=torch.Generator().manual_seed(0))

    def loss():
        point = soft.clone().requires_grad_()
        found = suffix_loss(model, model.get_input_embeddings(), examples)(point)
        return [found.detach(), torch.autograd.grad(found, point)[0]]

    whole = loss()
    sliced()
    assert_same(loss(), whole)


def test_gradients_of_single_rows_are_the_same(sliced):
    loaded = family_model("gemma2")

    def read():
        return [part.clone() for gradient in gradients(loaded, ENCODED) for part in gradient]

    whole = read()
    sliced()
    assert_same(read(), whole)


def test_a_head_of_unknown_form_gives_its_logits_whole(sliced):
    loaded = family_model("llama")
    forward = loaded.model.forward

    def squared(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits**2
        return out

    loaded.model.forward = squared
    batch = _padded(ENCODED, 0, 1.0, "cpu")
    whole = response_nll(loaded.model, batch, Step(0, 1))
    sliced()
    assert_same(response_nll(loaded.model, batch, Step(0, 1)), whole)
