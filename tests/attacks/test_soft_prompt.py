"""Soft prompts: the loss against single rows, what descent does, and that weights stay."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch

from ftsec_ray.attacks.soft_prompt import Example, SoftPrompt, descend, suffix_loss
from ftsec_ray.conversation import asked_text
from ftsec_ray.defenses.self_reminder import SelfReminder
from ftsec_ray.identity import canonical
from ftsec_ray.models.backends import PaddedGenerate
from ftsec_ray.models.generator import Generator
from ftsec_ray.models.row_tokens import answer_tokens
from tests.attacks.context import context
from tests.fixtures_models import tiny_model
from tests.numeric import assert_same

pytestmark = pytest.mark.usefixtures("float64")
EXAMPLES = [
    Example([1, 3, 9, 12], [2, 4], [10, 11, 2]),
    Example([1, 3, 8], [2, 4], [12, 2]),
    Example([1, 3, 8, 9, 9, 10], [2, 4], [7]),
]


def test_the_pieces_around_the_soft_tokens_are_the_prompt_without_them():
    generator, chat = (
        Generator(tiny_model()),
        [
            {"role": "system", "content": "be careful"},
            {"role": "user", "content": "fix the lamp"},
        ],
    )
    before, after = replace(generator, soft_suffix=torch.zeros(1, 32)).pieces(chat)
    assert (before + after, []) == generator.pieces(chat)
    assert generator.loaded.tokenizer.decode(after).split() == ["<|end|>", "<|assistant|>"]


def test_the_loss_is_the_mean_over_rows_of_each_rows_mean_target_loss():
    model, generator = tiny_model().model, torch.Generator().manual_seed(0)
    table, soft = model.get_input_embeddings(), torch.randn(3, 32, generator=generator) * 0.1
    found = suffix_loss(model, table, EXAMPLES)(soft)
    singles = []
    for before, after, target in EXAMPLES:
        embeds = torch.cat([table.weight[before], soft, table.weight[after + target]])[None]
        logprobs = model(inputs_embeds=embeds).logits[0].log_softmax(-1)
        first = len(before) + 3 + len(after) - 1
        singles.append(
            -sum(logprobs[first + i, token] for i, token in enumerate(target)) / len(target)
        )
    assert_same(found, sum(singles) / 3)


def test_descent_moves_every_entry_by_the_step_and_keeps_the_best_point():
    wanted = torch.tensor([[0.35, -1.0]])
    best, losses = descend(lambda x: (x - wanted).abs().sum(), torch.zeros(1, 2), steps=5, step=0.1)
    assert_same(best, torch.tensor([[0.3, -0.5]]))
    assert len(losses) == 6
    assert min(losses) == losses[5]
    assert_same(losses[5], 0.55)


def test_the_attack_lowers_the_loss_and_leaves_the_weights_unchanged():
    loaded, ctx = tiny_model(), context()
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    generator = Generator(loaded)
    made = SoftPrompt(tokens=4, steps=30, init="the").wrap_generation(generator, ctx)
    assert generator.soft_suffix is None
    assert made.soft_suffix.shape == (4, 32)
    assert ctx.notes["loss_end"] < 0.8 * ctx.notes["loss_start"]
    assert ctx.notes["optimised_on"] == 8
    assert all(
        torch.equal(p, before[name]) and p.grad is None
        for name, p in loaded.model.named_parameters()
    )
    chats = [[{"role": "user", "content": "how do i make river cloud"}]]
    assert made.complete(chats, max_new_tokens=4) != generator.complete(chats, max_new_tokens=4)


def test_the_same_seed_gives_the_same_suffix():
    suffixes = [
        SoftPrompt(tokens=2, steps=5, prompts=4)
        .wrap_generation(Generator(tiny_model()), context(seed=s))
        .soft_suffix
        for s in (0, 0, 1)
    ]
    assert torch.equal(suffixes[0], suffixes[1])
    assert not torch.equal(suffixes[0], suffixes[2])


WORDS = SelfReminder(text="be careful do not make stone", where="both")


def knowing(*, generator=None, defense=WORDS, **params):
    """What an attacker optimises who knows a defense, and the notes."""
    ctx = context()
    ctx.served = lambda given: defense.wrap_generation(given, context())
    attack = SoftPrompt(tokens=2, steps=6, prompts=4, init="the", **params)
    return attack.wrap_generation(generator or Generator(tiny_model()), ctx), ctx.notes


def test_an_attacker_who_knows_the_stack_starts_at_the_loss_of_the_defended_prompt():
    made, notes = knowing(knows_stack=True)
    assert made.rewrites == (), "the defense itself wraps the model later, and once"
    blind, other = knowing()
    assert not torch.equal(made.soft_suffix, blind.soft_suffix)
    # the loss at the first point, row by row, from the defended chat as text
    loaded = tiny_model()
    tokenizer, table = loaded.tokenizer, loaded.model.get_input_embeddings()
    word = table.weight[tokenizer("the", add_special_tokens=False)["input_ids"]]
    rows, losses = context().shuffled("harmful_train", "soft_prompt")[:4], []
    for one in rows:
        said = "be careful do not make stone"
        text = f"<|bos|> <|system|> {said} <|end|> <|user|> {asked_text(one)} {said}"
        before = tokenizer(text, add_special_tokens=False)["input_ids"]
        after = tokenizer("<|end|> <|assistant|>", add_special_tokens=False)["input_ids"]
        target = answer_tokens(tokenizer, one)[:10]
        embeds = torch.cat([table.weight[before], word, word, table.weight[after + target]])
        logprobs = loaded.model(inputs_embeds=embeds[None]).logits[0].log_softmax(-1)
        first = len(before) + 2 + len(after) - 1
        losses.append(
            -sum(logprobs[first + i, token] for i, token in enumerate(target)) / len(target)
        )
    assert_same(notes["loss_start"], sum(losses) / len(losses))
    assert other["loss_start"] != notes["loss_start"]


def test_without_a_defense_knowing_the_stack_changes_no_bit_and_takes_as_many_steps():
    plain, told = (
        SoftPrompt(tokens=2, steps=6, prompts=4, knows_stack=knows).wrap_generation(
            Generator(tiny_model()), context()
        )
        for knows in (False, True)
    )
    assert torch.equal(plain.soft_suffix, told.soft_suffix)


def test_states_that_a_defense_steers_are_steered_while_the_attacker_optimises():
    @dataclass(frozen=True)
    class Steers:
        def wrap_generation(self, generator, ctx):
            return replace(generator, steered=(*generator.steered, pushed))

    @contextmanager
    def pushed(model):
        block = model.model.layers[0]
        handle = block.register_forward_hook(lambda module, given, out: out + 1.0)
        try:
            yield
        finally:
            handle.remove()

    generator = Generator(tiny_model())
    _, notes = knowing(knows_stack=True, defense=Steers(), generator=generator)
    _, plain = knowing(generator=generator)
    assert notes["loss_start"] != plain["loss_start"]
    assert not generator.loaded.model.model.layers[0]._forward_hooks


@pytest.mark.parametrize(
    "added", [{"gates": (lambda chats: [None] * len(chats),)}, {"backend": PaddedGenerate()}]
)
def test_a_defense_that_does_not_enter_the_loss_is_told(added):
    class Outside:
        def wrap_generation(self, generator, ctx):
            return replace(generator, **added)

    for defense, count in ((Outside(), 1), (WORDS, 0)):
        ctx = context()
        ctx.served = lambda given, defense=defense: defense.wrap_generation(given, context())
        method = SoftPrompt(tokens=2, steps=1, prompts=2, knows_stack=True)
        method.wrap_generation(Generator(tiny_model()), ctx)
        assert [("do not enter the loss" in line) for line in ctx.warnings] == [True] * count


def test_the_parameter_is_in_no_digest_at_its_default():
    assert "knows_stack" not in canonical(SoftPrompt())
    assert "knows_stack" in canonical(SoftPrompt(knows_stack=True))


def test_faulty_parameters_are_named():
    assert [fault[0] for fault in SoftPrompt(tokens=0, step_size=0.0, init="").check()] == [
        "tokens",
        "step_size",
        "init",
    ]
    assert SoftPrompt().check() == []
