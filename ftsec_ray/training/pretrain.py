"""A plain training loop for whole conversations, which trains the ladder's models from random
weights.

Conversations are sorted into batches of nearly equal length, so that there is little padding and no
conversation attends to another.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from ftsec_ray.context import Chat

POOL_BATCHES = 8
"""Batches that are drawn together and sorted by length."""


class Encoded(NamedTuple):
    """A conversation as token ids, and whether each of them is the assistant's."""

    ids: list[int]
    said: list[bool]


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """How a model is trained on conversations."""

    steps: int
    batch_tokens: int
    """Tokens per step, including padding."""
    learning_rate: float
    """Peak of the schedule: linear warm-up, then cosine to a tenth."""
    prompt_weight: float = 0.1
    """Weight of a token that is not the assistant's; the assistant's tokens weigh 1 over the square
    root of their number, so that a label still counts next to a long answer.
    """
    weight_decay: float = 0.05
    warmup_frac: float = 0.06
    clip_norm: float = 1.0


def encode_chats(tokenizer: PreTrainedTokenizerFast, chats: Sequence[Chat]) -> list[Encoded]:
    """Token ids from the chat template, with a mark on the assistant's tokens (its end token
    included).
    """
    special = tokenizer.convert_tokens_to_ids
    texts = [message["content"] for chat in chats for message in chat]
    contents = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    encoded = []
    for chat in chats:
        ids, said = [tokenizer.bos_token_id], [False]
        for message in chat:
            content = next(contents)
            ids += [special(f"<|{message['role']}|>"), *content, tokenizer.eos_token_id]
            said += [False] + [message["role"] == "assistant"] * (len(content) + 1)
        encoded.append(Encoded(ids, said))
    return encoded


def batches(rows: Sequence[Encoded], batch_tokens: int, seed: int) -> Iterator[list[Encoded]]:
    """Endless batches of at most `batch_tokens` padded tokens; every row occurs once per pass,
    shuffled by `seed`.
    """
    rng = random.Random(seed)
    mean = sum(len(row.ids) for row in rows) / len(rows)
    pool_rows = max(1, round(POOL_BATCHES * batch_tokens / mean))
    while True:
        order = rng.sample(range(len(rows)), len(rows))
        for start in range(0, len(order), pool_rows):
            pool = sorted(
                (rows[i] for i in order[start : start + pool_rows]), key=lambda row: len(row.ids)
            )
            made: list[list[Encoded]] = [[]]
            for row in pool:
                if made[-1] and (len(made[-1]) + 1) * len(row.ids) > batch_tokens:
                    made.append([])
                made[-1].append(row)
            rng.shuffle(made)
            yield from made


def _tensors(
    batch: list[Encoded], pad: int, prompt_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded ids (B, T) int64 and the weight of each target (B, T - 1) float32."""
    import torch

    length = max(len(row.ids) for row in batch)
    ids = torch.full((len(batch), length), pad)
    weights = torch.zeros(len(batch), length)
    for i, row in enumerate(batch):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        weight = max(1, sum(row.said)) ** -0.5
        weights[i, : len(row.ids)] = torch.tensor(
            [weight if said else prompt_weight for said in row.said]
        )
    return ids, weights[:, 1:]


def weighted_nll(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean next-token loss in nats.

    Shapes: ids (B, T) int64; weights (B, T - 1) float32, zero for padding -> () float32.
    """
    from torch.nn.functional import cross_entropy

    assert weights.shape == (ids.shape[0], ids.shape[1] - 1), (ids.shape, weights.shape)
    keep = weights > 0
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[keep]
    nll = cross_entropy(model.lm_head(hidden).float(), ids[:, 1:][keep], reduction="none")
    return (nll * weights[keep]).sum() / weights.sum()


def schedule(step: int, config: PretrainConfig) -> float:
    """Share of the peak learning rate at a step (0-based)."""
    warmup = max(1, round(config.warmup_frac * config.steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    chats: Sequence[Chat],
    config: PretrainConfig,
    *,
    seed: int = 0,
) -> list[float]:
    """Train all weights of `model` in place; returns the loss of every step, in nats.

    Args:
        model: A Llama model without an adapter, on any device.
        tokenizer: Its tokenizer, with the ladder's special tokens.
        chats: Conversations; repeated if the steps need more.
        config: Steps and rates.
        seed: Decides the order of the conversations.
    """
    import torch

    rows = encode_chats(tokenizer, chats)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    losses: list[float] = []
    model.train()
    for step, batch in zip(
        range(config.steps), batches(rows, config.batch_tokens, seed), strict=False
    ):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * schedule(step, config)
        ids, weights = _tensors(batch, tokenizer.pad_token_id, config.prompt_weight)
        loss = weighted_nll(model, ids.to(model.device), weights.to(model.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    model.eval()
    return losses
