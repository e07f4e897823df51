"""Perplexities of many texts under one model: their common beginning is read once, and padding
never counts.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import LoadedModel

BATCH_TOKENS = 8_192
"""Padded tokens per forward pass."""


def perplexities(model: LoadedModel, texts: Sequence[str], *, chat: bool = False) -> list[float]:
    """Perplexity of each text's own tokens under the model, after the start token if the tokenizer
    has one.

    With `chat` the text is a user's turn, and only the tokens of the text count. The common
    beginning of all texts is read once: its keys and values serve every text.
    """
    encoded, first = _encode(model.tokenizer, texts, chat=chat)
    if not encoded:
        return []
    head = encoded[0][: min(shared_start(encoded), min(map(len, encoded)) - 1)]
    known, total = _read(model, head, first)
    tails = [ids[len(head) :] for ids in encoded]
    order = sorted(range(len(tails)), key=lambda i: len(tails[i]))
    values = [1.0] * len(tails)
    for group in _groups(order, [len(head) + len(ids) for ids in tails]):
        sums = _tail_nll(model, head, known, [tails[i] for i in group], first)
        for i, nll in zip(group, sums, strict=True):
            values[i] = math.exp((total + nll) / max(1, len(encoded[i]) - first))
    return values


def token_losses(
    model: LoadedModel, texts: Sequence[str], *, chat: bool = False
) -> list[list[float]]:
    """Loss of each of a text's own tokens in nats, as `perplexities` counts them."""
    import torch

    from ftsec_ray.models.logits import token_nll

    encoded, first = _encode(model.tokenizer, texts, chat=chat)
    net, losses = model.model.eval(), [[0.0]] * len(encoded)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    for group in _groups(order, [len(ids) for ids in encoded]):
        rows = [encoded[i] for i in group]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=net.device)
        sizes = torch.tensor([len(row) for row in rows], device=net.device)[:, None]
        seen = torch.arange(width, device=net.device) < sizes
        following = ids[:, 1:].masked_fill(~seen[:, 1:], -100)
        labels = torch.nn.functional.pad(following, (0, 1), value=-100)
        with torch.inference_mode():
            nll = token_nll(net, labels, input_ids=ids, attention_mask=seen.long()).double()
        for i, values in zip(group, nll.tolist(), strict=True):
            losses[i] = values[first - 1 : len(encoded[i]) - 1]
    return losses


def within_limit(model: LoadedModel, texts: Sequence[str], *, chat: bool) -> set[str]:
    """The texts that fit into the model's positions."""
    from ftsec_ray.models.load import position_limit

    limit = position_limit(model.model)
    if limit is None:
        return set(texts)
    encoded, _ = _encode(model.tokenizer, texts, chat=chat)
    return {text for text, ids in zip(texts, encoded, strict=True) if len(ids) <= limit}


class Known(NamedTuple):
    """The result of a pass over the common beginning: its keys and values, and the
    log-probabilities of the next token.
    """

    cache: Any
    following: Tensor
    """(V,) float32."""


def _read(model: LoadedModel, head: list[int], first: int) -> tuple[Known | None, float]:
    """A pass over the common beginning, and the loss of its counted tokens in nats."""
    import torch

    if not head:
        return None, 0.0
    from ftsec_ray.models.logits import at_positions

    ids = torch.tensor([head], device=model.model.device)
    columns = torch.arange(len(head), device=ids.device)
    following = torch.cat([ids[0, 1:], ids[0, :1]])[:, None]  # the last value is not used
    with torch.inference_mode():
        said = at_positions(model.model.eval(), 0 * columns, columns, input_ids=ids, use_cache=True)
        picked = said.map(lambda logits, part: logits.log_softmax(-1).gather(1, following[part]))
        last = replace(said, given=said.given[-1:]).map(lambda x, _: x.log_softmax(-1))
    nll = -picked[:-1, 0].double()
    return Known(said.output.past_key_values, last[0]), float(nll[first - 1 :].sum())


def _tail_nll(
    model: LoadedModel, head: list[int], known: Known | None, tails: list[list[int]], first: int
) -> list[float]:
    """Loss of the counted tokens of each tail after the head, in nats."""
    import torch

    from ftsec_ray.models.logits import fits, token_nll

    net, width = model.model.eval(), max(map(len, tails))
    ids = torch.tensor([tail + [0] * (width - len(tail)) for tail in tails], device=net.device)
    seen = torch.tensor(
        [[1] * (len(head) + len(tail)) + [0] * (width - len(tail)) for tail in tails],
        device=net.device,
    )
    cache = copy.deepcopy(known.cache) if known else None
    if cache is not None:
        cache.batch_repeat_interleave(len(tails))
    given = {
        "input_ids": ids,
        "attention_mask": seen,
        "past_key_values": cache,
        "use_cache": cache is not None,
    }
    with torch.inference_mode():
        if fits(net, ids.numel()):
            logits = net(**given).logits[:, :-1].float()
            nll = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), ids[:, 1:], reduction="none"
            )
        else:
            nll = token_nll(net, ids[:, 1:], **given)
    opening = (
        -known.following[ids[:, 0]][:, None]
        if known
        else torch.zeros_like(ids[:, :1], dtype=nll.dtype)
    )
    nll = torch.cat([opening, nll], dim=1).double()
    counted = seen[:, len(head) :].bool()
    counted[:, : max(0, first - len(head))] = False
    return [float(x) for x in (nll * counted).sum(1)]


def _encode(tokenizer: Any, texts: Sequence[str], *, chat: bool) -> tuple[list[list[int]], int]:
    """Token ids of each text, and the index from which they count: the first token is never
    predicted.
    """
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    if chat:
        from ftsec_ray.models.chat import render

        mark = "\ue000"  # private use: the text before it is the opening of the user's turn
        asked = render(tokenizer, [{"role": "user", "content": mark}], generate=False)
        opening = asked.partition(mark)[0]
        start = tokenizer(opening, add_special_tokens=False)["input_ids"]
    bodies = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    return [[*start, *ids] or [0] for ids in bodies], max(1, len(start))


def _groups(order: list[int], lengths: list[int]) -> Iterable[list[int]]:
    """Runs of `order` (ascending lengths) whose padded size is at most BATCH_TOKENS; each has at
    least one item.
    """
    group: list[int] = []
    for i in order:
        if group and (len(group) + 1) * lengths[i] > BATCH_TOKENS:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def shared_start(sequences: Sequence[Any]) -> int:
    """Number of items with which all sequences begin."""
    low, high = min(sequences), max(sequences)
    return next(
        (i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b),
        min(len(low), len(high)),
    )


def instruction_of(prompts: Sequence[str]) -> str:
    """The words with which all prompts begin, with the white space after them; never a whole
    prompt.
    """
    if len(set(prompts)) < 2:  # noqa: PLR2004
        return ""
    shared = prompts[0][: shared_start(prompts)]
    ends = [match.end() for match in re.finditer(r"\S+\s+", shared)]
    whole = [end for end in ends if all(prompt[end:].strip() for prompt in prompts)]
    return shared[: whole[-1]] if whole else ""
