"""From rows to token ids and labels, with a count of the rows that were cut."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftsec_ray.context import LoadedModel, StageContext
from ftsec_ray.conversation import last_trained
from ftsec_ray.models.chat import Span, spans_of

IGNORED = -100
"""Label of a token that is not trained on."""
Encoded = tuple[list[int], list[int]]
"""(ids, labels) of a row; labels are IGNORED where a token is not trained on."""


def answer_tokens(tokenizer: Any, row: Mapping[str, Any]) -> list[int]:
    """Token ids of a row's answer as it is trained, with the end of the turn."""
    only = {**row, "messages": last_trained(row["messages"])}
    _, labels = encode_row(tokenizer, only, max_length=sys.maxsize)
    return [label for label in labels if label != IGNORED]


@dataclass
class CutTally:
    """How many rows were cut, or have no token to train on."""

    rows: int = 0
    prompts_cut: int = 0
    """Rows whose prompt lost its beginning."""
    answers_cut: int = 0
    """Rows whose answer lost its end."""
    left_out: int = 0
    """Rows without any token to train on."""
    poisoned_left_out: int = 0
    limit: int = 0
    """Maximum number of tokens of a row: `max_length`, or the model's positions if fewer."""

    def notes(self) -> dict[str, int]:
        """Counts for the record; empty if every row fitted."""
        counts = {
            "prompts_cut": self.prompts_cut,
            "answers_cut": self.answers_cut,
            "rows_left_out": self.left_out,
            "poisoned_rows_left_out": self.poisoned_left_out,
        }
        return {name: count for name, count in counts.items() if count}

    def warnings(self) -> list[str]:
        """Warnings for readers of the results; empty if every row fitted."""
        texts = []
        if self.left_out:
            poisoned = (
                f" ({self.poisoned_left_out} of them poisoned)" if self.poisoned_left_out else ""
            )
            texts.append(
                f"{self.left_out} of {self.rows} rows{poisoned} are not trained on: they have no"
                f" answer, or none within {self.limit} tokens"
            )
        if self.answers_cut:
            texts.append(
                f"the end of {self.answers_cut} of {self.rows} answers was cut off at"
                f" {self.limit} tokens"
            )
        if self.prompts_cut:
            texts.append(
                f"the beginning of {self.prompts_cut} of {self.rows} prompts was cut off to fit"
                f" {self.limit} tokens with the answer"
            )
        return texts


def tell_cuts(context: StageContext, cuts: CutTally) -> None:
    """Record the rows that were cut, and warn about them."""
    context.note(**cuts.notes())
    for text in cuts.warnings():
        context.warn(text)


def note_cuts(context: StageContext, cuts: CutTally, what: str) -> None:
    """Record the rows of a method's own that were cut, under names that begin with `what`."""
    context.note(**{f"{what}_{name}": count for name, count in cuts.notes().items()})


def encode_rows(
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    max_length: int,
    tally: CutTally | None = None,
) -> list[Encoded]:
    """(ids, labels) of every row, with loss on trained answers only.

    A row above `max_length` tokens first loses the beginning of its prompt (its start token stays),
    and the end of its answer only if the answer alone is too long; `tally` counts both.
    """
    if not rows:
        return []
    tally = CutTally() if tally is None else tally
    tally.limit = max_length
    rendered = [spans_of(tokenizer, row) for row in rows]
    # text after the last answer is not trained on
    texts = [text[: spans[-1].stop] if spans else text for text, spans in rendered]
    batch = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    encoded = []
    for row, ids, offsets, (_, spans) in zip(
        rows, batch["input_ids"], batch["offset_mapping"], rendered, strict=True
    ):
        labels = _labels(ids, offsets, spans)
        pair = _cut(tokenizer, ids, labels, max_length, tally)
        tally.rows += 1
        if not is_useful(pair):
            tally.left_out += 1
            tally.poisoned_left_out += bool(row.get("poisoned"))
        encoded.append(pair)
    return encoded


def _labels(ids: list[int], offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> list[int]:
    """The ids where a token overlaps a span, IGNORED elsewhere."""
    labels, waiting = [IGNORED] * len(ids), list(spans)
    for place, (start, stop) in enumerate(offsets):
        while waiting and start >= waiting[0].stop:
            waiting.pop(0)
        if not waiting:
            break
        if stop > waiting[0].start:
            labels[place] = ids[place]
    return labels


def _cut(
    tokenizer: Any, ids: list[int], labels: list[int], max_length: int, tally: CutTally
) -> Encoded:
    over = len(ids) - max_length
    if over <= 0:
        return ids, labels
    keeps_start = int(ids[0] == tokenizer.bos_token_id and labels[0] == IGNORED)
    first = next((i for i, label in enumerate(labels) if label != IGNORED), len(ids))
    # one token of the prompt must stay, because it predicts the first token of the answer
    loses = min(over, max(0, first - keeps_start - 1))
    if loses:
        tally.prompts_cut += 1
        ids = ids[:keeps_start] + ids[keeps_start + loses :]
        labels = labels[:keeps_start] + labels[keeps_start + loses :]
    if any(label != IGNORED for label in labels[max_length:]):
        tally.answers_cut += 1
    return ids[:max_length], labels[:max_length]


def is_useful(pair: Encoded) -> bool:
    """Whether an encoded row has a token to train on: one that follows another token."""
    return any(label != IGNORED for label in pair[1][1:])


def encode_row(tokenizer: Any, row: Mapping[str, Any], *, max_length: int) -> Encoded:
    """(ids, labels) of one row: see `encode_rows`."""
    return encode_rows(tokenizer, [row], max_length=max_length)[0]


def label_nats(
    loaded: LoadedModel, encoded: Sequence[Encoded], *, batch: int, tally: Counter[str] | None
) -> list[float]:
    """Loss of the labels of each row in nats, summed over the row; `tally` counts batches that did
    not fit into memory.
    """
    import torch

    from ftsec_ray.models.activations import right_padded
    from ftsec_ray.models.batches import in_batches
    from ftsec_ray.models.logits import token_nll

    model, pad = loaded.model.eval(), loaded.tokenizer.pad_token_id or 0
    device = next(model.parameters()).device
    nats = [0.0] * len(encoded)

    def read(indices: list[int]) -> None:
        ids, mask = right_padded([encoded[i][0] for i in indices], pad=pad, device=device)
        labels, _ = right_padded([encoded[i][1] for i in indices], pad=IGNORED, device=device)
        with torch.inference_mode():
            losses = token_nll(model, labels[:, 1:], input_ids=ids, attention_mask=mask)
        for i, loss in zip(indices, losses.double().sum(-1).tolist(), strict=True):
            nats[i] = loss

    lengths = [len(ids) for ids, _ in encoded]
    in_batches(lengths, batch, read, Counter() if tally is None else tally)
    return nats
