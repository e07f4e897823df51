"""Append optimised embeddings to every user message, so that the model begins with the forbidden
answer.

Paper: Schwinn et al. 2024, Soft Prompt Threats, arXiv:2402.09063, section 3 (universal attack).
Differs: the step is a multiple of the mean absolute embedding entry, so that one value fits all
    model sizes; the paper's script takes steps of 0.001 with 20 tokens for 100 iterations, and that
    of the same authors' arXiv:2310.19737 steps of 0.01, about 0.8 of that unit on Llama-2. The
    embeddings of the step with the lowest loss are kept, instead of stopping at the first exact
    match. They replace the output of the embedding, after the factor by which some classes scale
    the table (Gemma). They stand inside the user's turn, before the template ends it. One universal
    suffix is optimised on training requests and judged on held-out ones; it follows benign prompts
    as well, so that utility under attack is measured too. There is no norm bound; the norm ratio is
    in the notes.
    `knows_stack` is an addition: the paper's attack is white-box, but a defense that acts while the
    model answers (a sentence in every chat, a change of hidden states) wraps the model after the
    attack, so that the optimisation does not see it. With `knows_stack` it does, in the same number
    of steps; what defenses do to rows and weights, it sees in any case, because it optimises on the
    finished model.
Cost: no training; `steps` forward and backward passes over `prompts` rows.
Reads: `knows_stack` covers defenses that change the chat or the hidden states; those that answer in
    the model's place or choose tokens do not enter the loss, and the record warns of them. With
    `knows_stack` the cell without a defense is the same attack as without, to the byte. The
    difference between the two settings under a defense is what its secrecy was worth.
Needs: split harmful_train (forbidden requests with compliant answers); a model class that can
    generate from embeddings.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ftsec_ray.context import StageContext
from ftsec_ray.conversation import chat_of
from ftsec_ray.errors import DataError
from ftsec_ray.method import Attack, Phase, later
from ftsec_ray.models.families import INPUT_EMBEDDINGS
from ftsec_ray.models.load import (
    keeps_logits,
    placed,
    position_limit,
    takes_embeddings,
    whole_model,
)
from ftsec_ray.models.logits import token_nll
from ftsec_ray.models.row_tokens import answer_tokens

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.models.generator import Generator


TOKENS_AT_A_TIME = 16_384
"""Rows of the embedding that are measured together."""


class Example(NamedTuple):
    """Token ids before and after the soft tokens, and the answer to force."""

    before: list[int]
    after: list[int]
    target: list[int]


@dataclass(frozen=True, kw_only=True)
class SoftPrompt(Attack):
    """A universal soft-token suffix."""

    VERSION: ClassVar[int] = 2
    PHASE: ClassVar[Phase] = "post"
    SUCCESS = "harmful_rate"
    NEEDS = frozenset({"harmful_train"})
    STRUCTURE = frozenset({INPUT_EMBEDDINGS})

    tokens: int = 8
    """Soft tokens, 1 or more."""
    steps: int = 40
    """Number of sign-gradient steps."""
    step_size: float = 0.2
    """Change of every entry per step, as a multiple of the embedding's mean absolute entry;
    above 0.
    """
    prompts: int = 16
    """Maximum number of forbidden requests whose mean loss is minimised."""
    target_tokens: int = 10
    """Number of first answer tokens in the loss, 1 or more."""
    init: str = "!"
    """Text whose first token is the initial value of every soft token."""
    knows_stack: bool = later(default=False)
    """Whether the embeddings are optimised under the defenses that act while the model answers."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters."""
        counts = ("tokens", "steps", "prompts", "target_tokens")
        faults: list[tuple[str, object, str]] = [
            (name, getattr(self, name), "1 or more") for name in counts if getattr(self, name) < 1
        ]
        if self.step_size <= 0:
            faults.append(("step_size", self.step_size, "above 0"))
        if not self.init:
            faults.append(("init", self.init, "a text that is not empty"))
        return faults

    def wrap_generation(self, generator: Generator, ctx: StageContext) -> Generator:
        """The generator with the optimised suffix; the model's weights do not change."""
        loaded = generator.loaded
        model = whole_model(loaded)
        if not takes_embeddings(model):
            raise DataError(
                "soft_prompt needs a model class that generates from embeddings; this class takes"
                " token ids only",
                type(model).__name__,
                "a class whose prepare_inputs_for_generation takes inputs_embeds",
                "exclude soft_prompt for this model: exclude {model: ..., attack: soft_prompt}",
            )
        table = model.get_input_embeddings()
        size = sizes_of(table)
        ids = loaded.tokenizer(self.init, add_special_tokens=False)["input_ids"]
        if not ids:
            raise DataError(
                "soft_prompt: the tokenizer has no token for `init`",
                self.init,
                "a text of at least one token",
                "choose another `init`",
            )
        start = embedded(table, [ids[0]]).repeat(self.tokens, 1)
        known = ctx.served(generator) if self.knows_stack else generator
        if known.gates != generator.gates or known.backend is not generator.backend:
            ctx.warn(
                "`knows_stack` does not see the defenses that answer in the model's place or change"
                " how tokens are chosen: they do not enter the loss"
            )
        examples = self._examples(replace(known, soft_suffix=start), ctx)
        with known.steering():
            loss_of = suffix_loss(loaded.model.eval(), table, examples)
            step = self.step_size * size.entry
            soft, losses = descend(loss_of, start, steps=self.steps, step=step)
        ratio = float(soft.norm(dim=-1).mean()) / size.norm
        ctx.note(
            loss_start=losses[0],
            loss_end=min(losses),
            best_step=losses.index(min(losses)),
            norm_ratio=ratio,
            optimised_on=len(examples),
        )
        return replace(generator, soft_suffix=soft)

    def _examples(self, generator: Generator, ctx: StageContext) -> list[Example]:
        rows = ctx.shuffled("harmful_train", "soft_prompt")
        tokenizer = generator.loaded.tokenizer
        examples = [
            Example(
                *generator.pieces(chat_of(row)),
                answer_tokens(tokenizer, row)[: self.target_tokens],
            )
            for row in rows[: self.prompts]
        ]
        limit = position_limit(generator.loaded.model)
        kept = [e for e in examples if limit is None or sum(map(len, e)) + self.tokens <= limit]
        if not kept:
            raise DataError(
                "soft_prompt: no forbidden request fits into the model's positions",
                min(sum(map(len, e)) + self.tokens for e in examples),
                f"at most {limit} tokens, with the soft tokens and the answer",
                "give split harmful_train shorter requests",
            )
        if len(kept) < len(examples):
            ctx.note(beyond_positions=len(examples) - len(kept))
        return kept


class Sizes(NamedTuple):
    """Mean size of the embeddings of all tokens as they enter the model, after the scale factor
    that some classes apply to the table.
    """

    entry: float
    """Mean absolute entry."""
    norm: float
    """Mean norm."""


def embedded(table: Any, ids: Sequence[int]) -> Tensor:
    """The embedding's output for token ids: (N, D) float32."""
    import torch

    with torch.no_grad():
        states: Tensor = table(torch.tensor(ids, device=table.weight.device)).float()
    return states


def sizes_of(table: Any) -> Sizes:
    """Mean sizes over all tokens, computed for `TOKENS_AT_A_TIME` tokens at a time."""
    total = table.weight.shape[0]
    entry = norm = 0.0
    for start in range(0, total, TOKENS_AT_A_TIME):
        part = embedded(table, range(start, min(start + TOKENS_AT_A_TIME, total)))
        share = len(part) / total
        entry += float(part.abs().mean()) * share
        norm += float(part.norm(dim=-1).mean()) * share
    return Sizes(entry, norm)


def suffix_loss(model: Any, table: Any, examples: list[Example]) -> Callable[[Tensor], Tensor]:
    """The function from soft tokens (K, D) float32 to the mean loss of the targets, in nats per
    token.

    The tokens before the soft tokens are read once: their keys and values serve every step.
    """
    import torch

    device, dtype = table.weight.device, table.weight.dtype
    heads = [e.before for e in examples]
    tails = [e.after + e.target[:-1] for e in examples]
    wide, long = max(map(len, heads)), max(map(len, tails))

    def tensor(rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.long, device=device)

    seen = tensor([[0] * (wide - len(head)) + [1] * len(head) for head in heads])
    read = tensor([[1] * len(tail) + [0] * (long - len(tail)) for tail in tails])
    # each label is aligned with the logits that predict it, from the last soft token on
    labels = tensor(
        [
            [-100] * len(e.after) + e.target + [-100] * (long - len(tail))
            for e, tail in zip(examples, tails, strict=True)
        ]
    )
    with torch.no_grad():
        known = model(
            input_ids=tensor([[0] * (wide - len(head)) + head for head in heads]),
            attention_mask=seen,
            use_cache=True,
            **placed(model, (seen.cumsum(-1) - 1).clamp(min=0)),
        ).past_key_values
        behind = table(tensor([tail + [0] * (long - len(tail)) for tail in tails]))
    kept = {"logits_to_keep": labels.shape[1]} if keeps_logits(model) else {}

    def loss_of(soft: Tensor) -> Tensor:
        embeds = torch.cat([soft.to(dtype).expand(len(examples), -1, -1), behind], dim=1)
        mask = torch.cat([seen, seen.new_ones(len(examples), len(soft)), read], dim=1)
        positions = seen.sum(-1, keepdim=True) + torch.arange(embeds.shape[1], device=device)
        # if the model returns all logits, those of the first soft tokens predict no label
        unread = 0 if kept else embeds.shape[1] - labels.shape[1]
        nll = token_nll(
            model,
            torch.nn.functional.pad(labels, (unread, 0), value=-100),
            inputs_embeds=embeds,
            attention_mask=mask,
            past_key_values=copy.deepcopy(known),
            use_cache=True,
            **placed(model, positions),
            **kept,
        )
        return (nll.sum(-1) / (labels != -100).sum(-1)).mean()

    return loss_of


def descend(
    loss_of: Callable[[Tensor], Tensor], start: Tensor, *, steps: int, step: float
) -> tuple[Tensor, list[float]]:
    """Sign-gradient descent for a fixed number of steps: the point with the lowest loss, and the
    loss at every point.
    """
    import torch

    soft, best, losses = start.clone(), start, [float("inf")]
    for _ in range(steps + 1):
        with torch.enable_grad():
            point = soft.clone().requires_grad_()
            loss = loss_of(point)
            (gradient,) = torch.autograd.grad(loss, point)
        value = float(loss.detach())
        if value < min(losses):
            best = soft
        losses.append(value)
        soft = soft - step * gradient.sign()
    return best.detach(), losses[1:]
