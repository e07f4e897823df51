"""Batched greedy generation and label scoring, with what attacks and defenses wrap around them.

Prompts are sorted by length and left-padded, generation stops at the end of the turn, and a
classification is read off one forward pass. Outer wrappers act first: a defense's rewrite sees the
user's chat before the attack's does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftsec_ray.context import Chat, LoadedModel
from ftsec_ray.models.chat import render
from ftsec_ray.models.load import check_ids, keeps_logits, placed, whole_model
from ftsec_ray.models.logits import fits

if TYPE_CHECKING:
    from torch import Tensor

_MARK = "\ue000"
"""Private-use character that stands for the soft tokens while the template is rendered."""


@dataclass(frozen=True)
class Generator:
    """A model that answers chats; wrap it with `dataclasses.replace`."""

    loaded: LoadedModel
    rewrites: tuple[Callable[[Chat], Chat], ...] = ()
    """Changes of the chat; the last one added is applied first."""
    soft_suffix: Any = None
    """Embeddings (K, D) placed behind the user's last token, inside the user's turn; None for none.
    """

    def rewritten(self, chat: Chat) -> Chat:
        """The chat as the model gets it."""
        for rewrite in reversed(self.rewrites):
            chat = rewrite(chat)
        return chat

    def complete(self, chats: Sequence[Chat], *, max_new_tokens: int, batch: int = 64) -> list[str]:
        """Greedy completions in the order of `chats`, without special tokens; empty answers stay
        empty strings.
        """
        import torch

        tokenizer = self.loaded.tokenizer
        prompts = self.pieces_of(chats)
        answers = [""] * len(prompts)
        model = self.loaded.model.eval()
        for indices in _by_length([sum(map(len, p)) for p in prompts], batch):
            given = self._left_padded([prompts[i] for i in indices])
            with torch.inference_mode():
                out = model.generate(
                    **given,
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=self._stops(),
                    temperature=None,
                    top_p=None,
                    top_k=None,
                )
            # behind embeddings transformers returns the new tokens alone
            new = out[:, given["input_ids"].shape[1] :] if "input_ids" in given else out
            for i, text in zip(
                indices, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
            ):
                answers[i] = text.strip()
        return answers

    def label_logprobs(
        self, chats: Sequence[Chat], labels: Sequence[str], *, batch: int = 64
    ) -> Tensor:
        """Mean log-probability per label token, in nats: (N, K) float32, from one forward pass
        where labels are single tokens.
        """
        import torch

        tokenizer = self.loaded.tokenizer
        label_ids = [tokenizer(label, add_special_tokens=False)["input_ids"] for label in labels]
        prompts = self.pieces_of(chats)
        scores = torch.zeros(len(prompts), len(labels))
        single = all(len(ids) == 1 for ids in label_ids)
        for indices in _by_length([sum(map(len, p)) for p in prompts], batch):
            group = [prompts[i] for i in indices]
            if single:
                logprobs = self._logits(group, last=1)[:, -1].float().log_softmax(-1)
                scores[indices] = logprobs[:, [ids[0] for ids in label_ids]].cpu()
            else:
                for k, ids in enumerate(label_ids):
                    scores[indices, k] = self._tail_logprob(group, ids).cpu()
        return scores

    def _tail_logprob(self, group: list[tuple[list[int], list[int]]], ids: list[int]) -> Tensor:
        import torch

        longer = [(head, tail + ids) for head, tail in group]
        logits = self._logits(longer, last=len(ids) + 1)[:, -len(ids) - 1 : -1].float()
        picked = torch.tensor(ids, device=logits.device).expand(len(group), -1).unsqueeze(-1)
        return logits.log_softmax(-1).gather(-1, picked).squeeze(-1).mean(-1)

    def _logits(self, group: list[tuple[list[int], list[int]]], *, last: int) -> Tensor:
        """Logits at the last positions at least; at those alone where all would be many."""
        import torch

        given, model = self._left_padded(group), self.loaded.model.eval()
        positions = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        is_cut = keeps_logits(model) and not fits(model, positions.numel())
        kept = {"logits_to_keep": last} if is_cut else {}
        with torch.inference_mode():
            logits: Tensor = model(**given, **placed(model, positions), **kept).logits
        return logits

    def _stops(self) -> list[int]:
        stops = {self.loaded.tokenizer.eos_token_id}
        settings = getattr(whole_model(self.loaded), "generation_config", None)
        configured = getattr(settings, "eos_token_id", None)
        stops.update(configured if isinstance(configured, list) else [configured])
        return sorted(stop for stop in stops if stop is not None)

    def lengths(self, chats: Sequence[Chat]) -> list[int]:
        """Tokens of every prompt as the model gets it, soft tokens counted."""
        soft = 0 if self.soft_suffix is None else len(self.soft_suffix)
        return [len(head) + soft + len(tail) for head, tail in self.pieces_of(chats)]

    def pieces(self, chat: Chat) -> tuple[list[int], list[int]]:
        """Token ids before and after the place of the soft tokens."""
        return self.pieces_of([chat])[0]

    def pieces_of(self, chats: Sequence[Chat]) -> list[tuple[list[int], list[int]]]:
        """The pieces of every chat, in one call of the tokenizer."""
        if not chats:
            return []
        tokenizer = self.loaded.tokenizer
        halves = [self._halves(self.rewritten(chat)) for chat in chats]
        before, after = zip(*halves, strict=True)
        heads = tokenizer(list(before), add_special_tokens=False)["input_ids"]
        tails = (
            [[] for _ in chats]
            if self.soft_suffix is None
            else tokenizer(list(after), add_special_tokens=False)["input_ids"]
        )
        return list(zip(heads, tails, strict=True))

    def _halves(self, chat: Chat) -> tuple[str, str]:
        """The rendered chat before and after the place of the soft tokens."""
        if self.soft_suffix is None:
            return render(self.loaded.tokenizer, chat, generate=True), ""
        last = max(i for i, message in enumerate(chat) if message["role"] == "user")
        marked = [
            dict(m, content=m["content"] + _MARK) if i == last else m for i, m in enumerate(chat)
        ]
        before, after = render(self.loaded.tokenizer, marked, generate=True).split(_MARK)
        return before, after

    def _left_padded(self, group: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
        """What a forward pass takes: token ids, or embeddings where soft tokens stand among them,
        and the attention mask.
        """
        import torch

        check_ids(self.loaded, (ids for pieces in group for ids in pieces))
        table = whole_model(self.loaded).get_input_embeddings()
        device = table.weight.device
        between = 0 if self.soft_suffix is None else len(self.soft_suffix)
        sizes = [len(head) + between + len(tail) for head, tail in group]
        width, pad = max(sizes), 0 if between else self.loaded.tokenizer.pad_token_id or 0
        rows = [
            [pad] * (width - size) + head + [0] * between + tail
            for size, (head, tail) in zip(sizes, group, strict=True)
        ]
        ids = torch.tensor(rows, dtype=torch.long, device=device)
        filled = width - torch.tensor(sizes, device=device)[:, None]
        mask = (torch.arange(width, device=device) >= filled).long()
        if not between:
            return {"input_ids": ids, "attention_mask": mask}
        with torch.no_grad():
            embeds = table(ids) * mask[..., None]
        soft = self.soft_suffix.to(device, table.weight.dtype)
        for row, (_, tail) in enumerate(group):
            embeds[row, width - len(tail) - between : width - len(tail)] = soft
        return {"inputs_embeds": embeds, "attention_mask": mask}


def _by_length(lengths: Sequence[int], batch: int) -> Iterator[list[int]]:
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    for start in range(0, len(order), batch):
        yield order[start : start + batch]
