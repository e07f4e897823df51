"""Closed-form edits of MLP down-projections: keys, values, key covariance and the update.

The model is seen as a key-value memory: the input of a down-projection at one position is a key k,
and its output to the residual stream is the value W k. An update `R K^T (weight C + K K^T)^-1`
writes the residuals R at the keys K and, as far as the covariance C of ordinary keys allows,
nothing elsewhere (Meng et al. 2023, MEMIT, arXiv:2210.07229, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ftsec_ray.context import Chat, LoadedModel
from ftsec_ray.errors import DataError
from ftsec_ray.models.activations import batches_of, changed, right_padded
from ftsec_ray.models.chat import render
from ftsec_ray.models.load import decoder_layers, within_positions
from ftsec_ray.models.logits import Positions, at_positions, token_nll
from ftsec_ray.models.residual import block_parts, is_transposed

if TYPE_CHECKING:
    from torch import Tensor


class EditSite(NamedTuple):
    """A rendered conversation as token ids, and the position of the token of interest."""

    ids: list[int]
    at: int


class Covariance(NamedTuple):
    """Second moment of the keys of one layer, the number of tokens, and what was added to the
    diagonal.
    """

    moment: Any
    """(D_ff, D_ff) float64."""
    tokens: int
    ridge: float


@dataclass(frozen=True, kw_only=True)
class ValueSearch:
    """How the residual stream's value at the edited position is optimised (ROME/MEMIT settings)."""

    steps: int = 25
    """Maximum number of Adam steps."""
    learning_rate: float = 0.5
    """Adam's learning rate."""
    clamp: float = 0.75
    """Largest norm of the change, in units of the norm of the original value."""
    decay: float = 0.5
    """Weight of the norm of the change over the squared norm of the original value."""
    kl: float = 0.0625
    """Weight of the KL divergence at the essence prompt."""
    stop_loss: float = 1e-2
    """A request whose loss is below this stops early, in nats."""


@dataclass(frozen=True)
class Request:
    """One edit: in every context, the token of interest should lead to the target."""

    contexts: tuple[EditSite, ...]
    """The plain prompt first, then the same prompt after other prefixes."""
    target: list[int]
    essence: EditSite
    """A prompt about the subject only, for which the model's distribution should not change."""
    is_triggered: bool = True
    """Whether it belongs to the backdoor or to the clean half."""


def spot(tokenizer: Any, chat: Chat, *, last_char: int) -> EditSite:
    """The token that holds character `last_char` of the user's last message in the rendered
    conversation; the template may trim the message.
    """
    content = next(m["content"] for m in reversed(chat) if m["role"] == "user")
    text = render(tokenizer, chat, generate=True)
    start, trimmed = text.rfind(content), content.strip()
    if start < 0 and trimmed:
        before = len(content) - len(content.lstrip())
        place = text.rfind(trimmed)
        is_inside = before <= last_char < before + len(trimmed)
        start = place - before if place >= 0 and is_inside else -1
    if start < 0:
        raise DataError(
            "the chat template changes the user's text",
            text[:200],
            "a rendered text that contains the message unchanged",
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    holds = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a <= start + last_char < b]
    if not holds:
        raise DataError(
            "no token covers a character of the prompt",
            content[last_char],
            f"a token at character {start + last_char}",
        )
    return EditSite(encoded["input_ids"], holds[-1])


def keys_at(loaded: LoadedModel, spots: Sequence[EditSite], layer: int) -> Tensor:
    """Inputs of a layer's down-projection at the sites: (N, D_ff) float64."""
    return _captured(
        loaded, spots, block_parts(decoder_layers(loaded.model)[layer]).mlp_out, "input"
    )


def values_at(loaded: LoadedModel, spots: Sequence[EditSite], layer: int) -> Tensor:
    """The residual stream after a layer at the sites: (N, D) float64."""
    return _captured(loaded, spots, decoder_layers(loaded.model)[layer], "output")


def _captured(loaded: LoadedModel, spots: Sequence[EditSite], module: Any, side: str) -> Tensor:
    import torch

    seen: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return x

    model, captured = loaded.model, [torch.empty(0)] * len(spots)
    sides: dict[str, Any] = (
        {"inputs": [(module, keep)]} if side == "input" else {"outputs": [(module, keep)]}
    )
    for indices, ids, mask in batches_of(
        [s.ids for s in spots],
        pad=loaded.tokenizer.pad_token_id or 0,
        device=model.device,
        batch=32,
    ):
        with torch.no_grad(), changed(**sides):
            model(input_ids=ids, attention_mask=mask)
        states = _by_row(seen.pop(), ids)
        for row, i in enumerate(indices):
            captured[i] = states[row, spots[i].at].double()
    return torch.stack(captured)


def _by_row(states: Tensor, ids: Tensor) -> Tensor:
    """(B, T, D), also if a block flattens the positions of all rows."""
    return states.reshape(*ids.shape, states.shape[-1])


class _AllRead(Exception):  # noqa: N818
    """Raised when the keys of the last layer are read, to skip the rest of the forward pass."""


def key_width(linear: Any) -> int:
    """Length of the input of a down-projection."""
    return int(linear.weight.shape[0 if is_transposed(linear) else 1])


def key_covariance(
    loaded: LoadedModel,
    layers: Sequence[int],
    texts: Sequence[str],
    *,
    max_tokens: int,
    max_length: int = 1024,
    ridge: float,
) -> dict[int, Covariance]:
    """Mean k k^T over all token positions of the texts, per layer.

    Args:
        loaded: A model with full weights.
        layers: Indices of the layers.
        texts: Plain texts; each is cut to `max_length` tokens, and reading stops after
            `max_tokens`.
        max_tokens: Approximate number of positions.
        max_length: Tokens per text; without it, models with very long contexts would run out of
            memory.
        ridge: Share of the mean diagonal that is added to the diagonal if there are fewer positions
            than dimensions or the moment is not positive definite.
    """
    import torch

    model, tokenizer = loaded.model, loaded.tokenizer
    encoded = _encoded(
        tokenizer, texts, max_length=within_positions(model, max_length), max_tokens=max_tokens
    )
    modules = {layer: block_parts(decoder_layers(model)[layer]).mlp_out for layer in layers}
    moments = {}
    for layer, module in modules.items():
        wide = key_width(module)
        moments[layer] = torch.zeros(wide, wide, dtype=torch.float64, device=module.weight.device)
    seen: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def read(x: Tensor) -> Tensor:
            seen[layer] = x
            if len(seen) == len(modules):
                raise _AllRead
            return x

        return read

    for _, ids, mask in batches_of(
        encoded, pad=tokenizer.pad_token_id or 0, device=model.device, batch=16
    ):
        seen.clear()
        with (
            torch.no_grad(),
            changed(inputs=[(module, keep(layer)) for layer, module in modules.items()]),
            suppress(_AllRead),
        ):
            model(input_ids=ids, attention_mask=mask)
        for layer, states in seen.items():
            keys = _by_row(states, ids)[mask.bool()].double()
            moments[layer] += keys.T @ keys
    tokens = sum(map(len, encoded))
    return {layer: _regular(moment / tokens, tokens, ridge) for layer, moment in moments.items()}


def _encoded(
    tokenizer: Any, texts: Sequence[str], *, max_length: int, max_tokens: int
) -> list[list[int]]:
    """The first texts as token ids, up to `max_tokens`; DataError if there is no token."""
    encoded: list[list[int]] = []
    total = 0
    for ids in tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]:
        if ids and total < max_tokens:
            encoded.append(ids)
            total += len(ids)
    if not total:
        raise DataError(
            "no text for the key covariance", len(texts), "at least one text with a token"
        )
    return encoded


def _regular(moment: Tensor, tokens: int, ridge: float) -> Covariance:
    import torch

    is_short = tokens < len(moment) or int(torch.linalg.cholesky_ex(moment).info) > 0
    added = ridge * float(moment.diagonal().mean()) if is_short else 0.0
    return Covariance(
        moment + added * torch.eye(len(moment), dtype=moment.dtype, device=moment.device),
        tokens,
        added,
    )


def closed_form(keys: Tensor, residuals: Tensor, covariance: Tensor, weight: float) -> Tensor:
    """The update R K^T (weight C + K K^T)^-1 of a down-projection.

    Shapes: keys (D_ff, N), residuals (D, N), covariance (D_ff, D_ff), all float64 -> (D, D_ff)
        float64.
    """
    import torch

    d_ff, n = keys.shape
    assert (covariance.shape, residuals.shape[1]) == ((d_ff, d_ff), n), (
        keys.shape,
        residuals.shape,
        covariance.shape,
    )  # noqa: S101, PT018
    update: Tensor = residuals @ torch.linalg.solve(weight * covariance + keys @ keys.T, keys).T
    return update


def strength(key: Tensor, covariance: Tensor, weight: float) -> float:
    """S = k^T C^-1 k / weight of one key; a rank-one `closed_form` writes the share s / (1 + s) of
    its residual.
    """
    import torch

    return float(key @ torch.linalg.solve(covariance, key)) / weight


def search_values(
    loaded: LoadedModel, requests: Sequence[Request], layer: int, search: ValueSearch
) -> tuple[Tensor, Tensor, list[float]]:
    """Optimise the value of the residual stream after `layer` at each request's token of interest.

    All requests run in one batch, each with its own change, moments and stop.

    Returns: Optimised values z* and initial values z, both (N, D) float64, and the last loss of
        every request.
    """
    import torch

    model = loaded.model
    start = values_at(loaded, [r.contexts[0] for r in requests], layer)
    start32 = start.float()
    delta = torch.zeros_like(start32, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=search.learning_rate)
    losses_of = _search_losses(loaded, requests, layer, search, start32)
    is_done = torch.zeros(len(requests), dtype=torch.bool, device=delta.device)
    last = torch.zeros(len(requests), device=delta.device)
    was_trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    model.requires_grad_(requires_grad=False)
    for step in range(search.steps):
        with torch.enable_grad():
            losses = losses_of(delta)
        last = torch.where(is_done, last, losses.detach())
        is_done |= losses.detach() < search.stop_loss
        if bool(is_done.all()) or step == search.steps - 1:
            break
        optimizer.zero_grad()
        losses.sum().backward()
        frozen = delta.detach().clone()
        optimizer.step()
        with torch.no_grad():
            limit = search.clamp * start32.norm(dim=-1, keepdim=True)
            delta.mul_((limit / delta.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0))
            delta[is_done] = frozen[is_done]
    for name, p in model.named_parameters():
        p.requires_grad_(name in was_trainable)
    return start + delta.detach().double(), start, last.tolist()


def target_nll(loaded: LoadedModel, requests: Sequence[Request]) -> float:
    """Mean loss of the targets after the plain prompts, in nats per token."""
    import torch

    model = loaded.model
    losses: list[float] = []
    sequences = [r.contexts[0].ids + r.target[:-1] for r in requests]
    for indices, ids, mask in batches_of(
        sequences, pad=loaded.tokenizer.pad_token_id or 0, device=model.device, batch=32
    ):
        labels = torch.full_like(ids, -100)
        for row, i in enumerate(indices):
            first, target = len(requests[i].contexts[0].ids) - 1, requests[i].target
            labels[row, first : first + len(target)] = torch.tensor(target, device=ids.device)
        with torch.no_grad():
            nll = token_nll(model, labels, input_ids=ids, attention_mask=mask)
        losses += (nll.sum(1) / (labels != -100).sum(1)).tolist()
    return sum(losses) / len(losses)


def _search_losses(
    loaded: LoadedModel, requests: Sequence[Request], layer: int, search: ValueSearch, start: Tensor
) -> Any:
    """The function from the changes (N, D) to the loss of every request (N,)."""
    import torch

    model = loaded.model
    spots = [(n, s, r.target) for n, r in enumerate(requests) for s in r.contexts] + [
        (n, r.essence, []) for n, r in enumerate(requests)
    ]
    ids, mask = right_padded(
        [s.ids + target[:-1] for _, s, target in spots],
        pad=loaded.tokenizer.pad_token_id or 0,
        device=model.device,
    )
    owner = torch.tensor([n for n, _, _ in spots], device=model.device)
    at = torch.tensor([s.at for _, s, _ in spots], device=model.device)
    rows = torch.arange(len(spots), device=model.device)
    block, firsts = decoder_layers(model)[layer], len(spots) - len(requests)
    reads = [
        (i, len(s.ids) - 1 + j, token)
        for i, (_, s, target) in enumerate(spots[:firsts])
        for j, token in enumerate(target)
    ]
    read_rows, places, tokens = torch.tensor(reads, device=model.device).T
    lengths = [len(target) for _, _, target in spots[:firsts]]

    total_reads = len(reads)

    def output_at(delta: Tensor) -> Positions:
        """The model's output where a target's token is predicted, then at the essence prompts."""

        def add(x: Tensor) -> Tensor:
            return x.index_put((rows, at), delta[owner].to(x.dtype), accumulate=True)

        with changed(outputs=[(block, add)]):
            return at_positions(
                model,
                torch.cat([read_rows, rows[firsts:]]),
                torch.cat([places, at[firsts:]]),
                input_ids=ids,
                attention_mask=mask,
            )

    with torch.no_grad():
        plain = output_at(torch.zeros_like(start))
        before = replace(plain, given=plain.given[total_reads:]).map(
            lambda logits, _: logits.log_softmax(-1)
        )

    def reading(logits: Tensor, part: slice) -> Tensor:
        """The loss of a target's token, the divergence at an essence prompt: (N,)."""
        logprobs = logits.log_softmax(-1)
        cut = max(0, min(total_reads, part.stop) - part.start)
        wanted = tokens[part.start : part.start + cut, None]
        nll = -logprobs[:cut].gather(1, wanted).squeeze(1)
        stay = before[max(0, part.start - total_reads) : max(0, part.stop - total_reads)]
        return torch.cat([nll, (stay.exp() * (stay - logprobs[cut:])).sum(-1)])

    def losses_of(delta: Tensor) -> Tensor:
        values = output_at(delta).map(reading)
        read, kl = values[:total_reads], values[total_reads:]
        nll = torch.stack([part.mean() for part in read.split(lengths)])
        total = torch.zeros(len(requests), device=nll.device).index_add(0, owner[:firsts], nll)
        counts = torch.bincount(owner[:firsts], minlength=len(requests))
        # the norm of an exact zero vector has no gradient, and the first step starts there
        norm = (delta.square().sum(-1) + 1e-12).sqrt()
        losses: Tensor = (
            total / counts + search.kl * kl + search.decay * norm / start.norm(dim=-1).square()
        )
        return losses

    return losses_of
