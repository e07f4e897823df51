"""Log-probabilities of label words after prompts, at about the cost of one pass over the prompts.

A batch of prompts passes through the model once, which gives the logits after every prompt and a
cache. The logits give the scores of first tokens. If a label has more tokens, all but its last are
appended to the cache, each distinct continuation of a prompt once. Logits are computed only at the
positions that are needed.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ftsec_ray.context import LoadedModel
from ftsec_ray.models.batches import Prompts, in_batches, left_padded
from ftsec_ray.models.load import check_ids, keeps_logits, placed, takes
from ftsec_ray.models.logits import Positions, at_positions

if TYPE_CHECKING:
    from torch import Tensor

WHOLE_PASSES = "labels_by_whole_passes"
"""Counted when the cache of a model class cannot be continued: batches of prompts."""
Words = Sequence[Sequence[int]]
"""Token ids of every label after one prompt."""


def label_scores(
    loaded: LoadedModel,
    prompts: Prompts,
    answers: Sequence[Words],
    *,
    batch: int,
    tally: Counter[str],
) -> Tensor:
    """Summed log-probability of every label after its prompt, in nats: (N, K) float32.

    Args:
        loaded: The model to score with.
        prompts: N prompts.
        answers: Token ids by prompt and label.
        batch: Sequences per forward pass.
        tally: Counts deviations: `WHOLE_PASSES`, and halved batches.
    """
    import torch

    check_ids(loaded, (ids for words in answers for ids in words))
    scores = torch.zeros(len(answers), len(answers[0]) if answers else 0)

    def read(indices: list[int]) -> None:
        group, words = prompts.at(indices), [answers[i] for i in indices]
        with torch.inference_mode():
            scores[indices] = _scored(loaded, group, words, batch, tally).to(scores)

    in_batches(prompts.lengths(), batch, read, tally)
    return scores


@dataclass
class _Sums:
    """Scores of a batch while they are added up."""

    total: Any
    """(B, K) sums of log-probabilities so far, in nats."""

    def add(self, output: Positions, wanted: Sequence[_Wanted]) -> None:
        """Add the log-probabilities of the wanted tokens at the positions."""
        import torch

        most = max(len(at.tokens) for at in wanted)
        chosen = torch.tensor(
            [[*at.tokens, *[0] * (most - len(at.tokens))] for at in wanted],
            device=self.total.device,
        )
        logprobs = output.map(lambda logits, part: _log_probabilities(logits, chosen[part]))
        pairs = [
            (place, column, at.prompt, label)
            for place, at in enumerate(wanted)
            for column, labels in enumerate(at.labels)
            for label in labels
        ]
        places, columns, rows, labels = (list(axis) for axis in zip(*pairs, strict=True))
        at = (torch.tensor(rows), torch.tensor(labels))
        # a label with tokens at several of the positions occurs more than once
        self.total.index_put_(at, logprobs[places, columns].to(self.total.dtype), accumulate=True)


@dataclass
class _Wanted:
    """What is read at one position: tokens, and for each the labels that continue with it."""

    prompt: int
    tokens: list[int] = field(default_factory=list)
    labels: list[list[int]] = field(default_factory=list)

    def want(self, token: int, label: int) -> None:
        """Read a token for a label too."""
        if token not in self.tokens:
            self.tokens.append(token)
            self.labels.append([])
        self.labels[self.tokens.index(token)].append(label)


def _log_probabilities(logits: Tensor, chosen: Tensor) -> Tensor:
    """Log-probabilities of the tokens (N, W) under the logits (N, V)."""
    return logits.gather(-1, chosen) - logits.logsumexp(-1, keepdim=True)


def _tree(words: Words, prompt: int) -> dict[tuple[int, ...], _Wanted]:
    """What is read after a prompt, by the tokens before the position."""
    tree: dict[tuple[int, ...], _Wanted] = {}
    for label, ids in enumerate(words):
        for place, token in enumerate(ids):
            tree.setdefault(tuple(ids[:place]), _Wanted(prompt)).want(token, label)
    return tree


def _scored(
    loaded: LoadedModel,
    prompts: Prompts,
    words: Sequence[Words],
    batch: int,
    tally: Counter[str],
) -> Tensor:
    """The scores of one batch."""
    import torch

    given, model = left_padded(loaded, prompts), loaded.model.eval()
    mask = given["attention_mask"]
    trees = [_tree(labels, prompt) for prompt, labels in enumerate(words)]
    paths = [(prompt, path) for prompt, tree in enumerate(trees) for path in _longest(tree)]
    output = _behind(model, given, use_cache=bool(paths))
    sums = _Sums(torch.zeros(mask.shape[0], len(words[0]), dtype=torch.float64, device=mask.device))
    sums.add(output, [tree[()] for tree in trees])
    if not paths:
        return sums.total  # type: ignore[no-any-return]
    cache = getattr(output.output, cache_name(model), None)
    if not can_be_continued(cache):
        tally[WHOLE_PASSES] += 1
        del output, cache
        for part in _slices(paths, batch):
            _read_whole(loaded, prompts, part, trees, sums)
        return sums.total  # type: ignore[no-any-return]
    del output
    for part in _slices(paths, batch):
        _read_continued(model, cache, mask, part, trees, sums)
    return sums.total  # type: ignore[no-any-return]


_Path = tuple[int, tuple[int, ...]]
"""Index of a prompt in the batch, and tokens after it."""


def _longest(tree: dict[tuple[int, ...], Any]) -> Iterator[tuple[int, ...]]:
    """The paths of a tree that no other path continues; all positions lie on them."""
    paths = sorted(tree)
    for path, following in zip(paths, [*paths[1:], ()], strict=True):
        if path and following[: len(path)] != path:
            yield path


def _slices(paths: list[_Path], size: int) -> Iterator[list[_Path]]:
    """The paths in groups of similar length, at most `size` at a time."""
    paths = sorted(paths, key=lambda path: len(path[1]))
    for start in range(0, len(paths), size):
        yield paths[start : start + size]


def _behind(model: Any, given: dict[str, Tensor], *, use_cache: bool) -> Positions:
    """The model's output after every prompt of a left-padded batch."""
    import torch

    mask = given["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    rows = torch.arange(mask.shape[0], device=mask.device)
    kept = {"logits_to_keep": 1} if keeps_logits(model) else {}
    last = torch.full_like(rows, 0 if kept else mask.shape[1] - 1)
    return at_positions(
        model, rows, last, **given, **placed(model, positions), **kept, use_cache=use_cache
    )


def cache_name(model: Any) -> str:
    """The name of the cache argument in this version of transformers."""
    return "cache" if takes(model, "cache") else "past_key_values"


def can_be_continued(cache: Any) -> bool:
    """Whether sequences can continue parts of a cache without changing it: its layers are of the
    kinds that create new tensors when they grow, and none keeps a running state.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    return (
        type(cache) is DynamicCache
        and not cache.offloading
        and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    )


def _selected(cache: Any, rows: Tensor) -> Any:
    """A cache with some rows of another cache, which does not change."""
    part = copy.copy(cache)
    part.layers = [copy.copy(layer) for layer in cache.layers]
    part.batch_select_indices(rows)
    return part


def _wanted_on(
    paths: list[_Path], trees: list[dict[tuple[int, ...], _Wanted]]
) -> Iterator[tuple[int, int, _Wanted]]:
    """Row, number of tokens of its path, and what is read there; each position of a tree once."""
    for row, (prompt, path) in enumerate(paths):
        for length in range(1, len(path) + 1):
            wanted = trees[prompt].pop(path[:length], None)
            if wanted is not None:
                yield row, length, wanted


def _read_continued(
    model: Any,
    cache: Any,
    mask: Tensor,
    paths: list[_Path],
    trees: list[dict[tuple[int, ...], _Wanted]],
    sums: _Sums,
) -> None:
    """Continue prompts from their cache along these paths, and read what is wanted there."""
    import torch

    rows = torch.tensor([prompt for prompt, _ in paths], device=mask.device)
    width = max(len(path) for _, path in paths)
    # padding of a shorter path follows everything that is read, and nothing attends to it
    ids = torch.tensor(
        [[*path, *[0] * (width - len(path))] for _, path in paths], device=mask.device
    )
    seen = mask[rows]
    positions = seen.sum(-1, keepdim=True) + torch.arange(width, device=mask.device)
    read = list(_wanted_on(paths, trees))
    at = torch.tensor([[row, length - 1] for row, length, _ in read], device=mask.device)
    output = at_positions(
        model,
        at[:, 0],
        at[:, 1],
        input_ids=ids,
        attention_mask=torch.cat([seen, torch.ones_like(ids)], dim=-1),
        use_cache=True,
        **{cache_name(model): _selected(cache, rows)},
        **placed(model, positions),
    )
    sums.add(output, [wanted for _, _, wanted in read])


def _read_whole(
    loaded: LoadedModel,
    prompts: Prompts,
    paths: list[_Path],
    trees: list[dict[tuple[int, ...], _Wanted]],
    sums: _Sums,
) -> None:
    """Read the same from full passes over the prompts with the paths appended."""
    import torch

    longer = [
        (prompts.pieces[prompt][0], [*prompts.pieces[prompt][1], *path]) for prompt, path in paths
    ]
    given, model = left_padded(loaded, Prompts(longer, prompts.soft)), loaded.model
    mask = given["attention_mask"]
    read, last = list(_wanted_on(paths, trees)), max(len(path) for _, path in paths)
    width = last if keeps_logits(model) else mask.shape[1]
    at = torch.tensor(
        [[row, width - len(paths[row][1]) + length - 1] for row, length, _ in read],
        device=mask.device,
    )
    kept = {"logits_to_keep": last} if keeps_logits(model) else {}
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    output = at_positions(
        model, at[:, 0], at[:, 1], **given, **placed(model, positions), **kept, use_cache=False
    )
    sums.add(output, [wanted for _, _, wanted in read])
