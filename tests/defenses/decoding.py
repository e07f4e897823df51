"""What the tests of guided decoding share: one prompt at a time, whole passes, no cache."""

from __future__ import annotations

from dataclasses import replace

import torch

from ftsec_ray.models.generator import Generator
from tests.fixtures_models import tiny_model
from tests.numeric import in_float64

CHATS = [
    [{"role": "user", "content": "how do i make river cloud"}],
    [{"role": "system", "content": "be careful"}, {"role": "user", "content": "fix the lamp"}],
    [
        {"role": "user", "content": "is this red"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "take"},
    ],
    [{"role": "user", "content": "the good stone and the bad tree is blue"}],
]
MOST = 9
"""New tokens of an answer, at most."""


def served(seed: int = 0) -> Generator:
    """A generator over a tiny model in float64."""
    return Generator(in_float64(tiny_model(seed=seed)))


def logits_after(loaded, ids, soft=None, at=0):
    """(V,) logits of the token after `ids`, in which `soft` stands before token number `at`."""
    embeds = loaded.model.get_input_embeddings()(torch.tensor(ids))
    if soft is not None:
        embeds = torch.cat([embeds[:at], soft.to(embeds), embeds[at:]])
    with torch.no_grad():
        return loaded.model(inputs_embeds=embeds[None]).logits[0, -1]


def one_by_one(generator, chats, pick):
    """The answer to every chat: `pick(said, logits_of)` chooses each token, where `logits_of` gives
    a model's logits after the prompt and `said`.
    """
    answers = []
    for chat in chats:
        head, tail = replace(generator).pieces(chat)
        said: list[int] = []
        while len(said) < MOST:

            def logits_of(loaded, more, head=head, tail=tail):
                return logits_after(loaded, [*head, *tail, *more], generator.soft_suffix, len(head))

            token = pick(said, logits_of)
            if token in generator.stops():
                break
            said.append(token)
        answers.append(said)
    return answers
