"""Replaces a token of an answer by the reference model's if the served model finds it far more
likely than the reference does.

Paper: CleanGen: Mitigating Backdoor Attacks for Generation Tasks in Large Language Models (Li et
    al. 2024, arXiv:2406.12257), section 4; official code uw-nsl/CleanGen.
Differs: (1) The official code drafts `k` tokens and checks them with one pass of the reference,
    but never checks the tokens behind the last whole draft, so the end of an answer escapes. Here
    every token is checked when it is chosen, from a cache; the answer is that of any k with a
    complete check. (2) The reference is the aligned model that the cell starts from, before any
    attack. (3) A sampled token is checked like a greedy one; its replacement is always the
    reference's most likely token. (4) Label words are scored, not generated: a prompt whose best
    label is `alpha` times more likely than under the reference gets the reference's best label.
    (5) `alpha: 0` answers with the reference alone, which the paper does not report: how much of
    the effect any clean model has.
Published: lowest attack success of six defenses on five backdoors (0 % on VPI code injection) at
    1.30 times the time per token, as its repository states.
Cost: no training; the aligned model in memory, and one of its forward passes for each token.
Needs: the aligned model (`reference`), which must not have the backdoor. A fine-tune that teaches
    new answers makes these unlikely under the reference too, so that it undoes part of the task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ftsec_ray.method import Defense, Phase

if TYPE_CHECKING:
    from torch import Tensor

    from ftsec_ray.context import LoadedModel, StageContext
    from ftsec_ray.models.generator import Generator
    from ftsec_ray.models.guided import Next


@dataclass(frozen=True, kw_only=True)
class CleanGen(Defense):
    """Tokens with P_served / P_reference >= alpha become the reference's most likely token."""

    PHASE: ClassVar[Phase] = "post"
    ORDER: ClassVar[int] = 20
    NEEDS: ClassVar[frozenset[str]] = frozenset({"reference"})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"random_tokens": True}

    alpha: float | None = 20.0
    """Ratio of probabilities from which a token is replaced, 0 or more; 0: the reference answers
    alone, null: nothing is replaced.
    """
    random_tokens: bool = False
    """Whether as many tokens of each answer are replaced at random positions instead (the control);
    of label words, those of as many random prompts.
    """

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        is_valid = self.alpha is None or self.alpha >= 0
        return [] if is_valid else [("alpha", self.alpha, "0 or more, or null")]

    def wrap_generation(self, generator: Generator, ctx: StageContext) -> Generator:
        """The generator whose tokens the reference checks."""
        from ftsec_ray.models.guided import with_guide

        if self.alpha is None:
            return generator
        return with_guide(generator, CleanGuide(ctx.load("reference"), self, ctx))


@dataclass
class Flags:
    """Which tokens of one answer were checked and flagged, by step."""

    checked: list[int] = field(default_factory=list)
    flagged: set[int] = field(default_factory=set)


@dataclass
class CleanGuide:
    """The reference, and what it found in the answers of one call."""

    loaded: LoadedModel
    method: CleanGen
    ctx: StageContext
    steps: None = None
    """It acts at every token."""
    seen: dict[int, Flags] = field(default_factory=dict)
    """Prompt -> flags of its answer."""
    planned: dict[int, set[int]] | None = None
    """For the control: prompt -> steps that are replaced; None while the test decides."""

    def choose(self, now: Next) -> Tensor:
        """The served model's tokens, or the reference's."""
        import torch

        tokens = now.draw(now.own)
        if self.planned is None:
            replaced = is_suspect(now.own, now.other, tokens, self.method)
        else:
            steps = [self.planned.get(prompt, set()) for prompt in now.prompts]
            replaced = torch.tensor([now.step in own for own in steps], device=tokens.device)
        rows = zip(now.prompts, replaced.tolist(), now.open.tolist(), strict=True)
        for prompt, is_replaced, is_open in rows:
            if now.step == 0 or prompt not in self.seen:
                self.seen[prompt] = Flags()  # a batch that did not fit begins again
            if is_open:
                self.seen[prompt].checked.append(now.step)
                self.seen[prompt].flagged |= {now.step} if is_replaced else set()
        chosen: Tensor = torch.where(replaced, now.other.argmax(-1), tokens)
        return chosen

    def done(self) -> bool:
        """Count what was replaced; True where the control has only rehearsed."""
        if self.method.random_tokens and self.planned is None:
            self.planned = {prompt: self._drawn(prompt, of) for prompt, of in self.seen.items()}
            self.seen = {}
            return True
        self.ctx.count(
            tokens_checked=sum(len(of.checked) for of in self.seen.values()),
            tokens_replaced=sum(len(of.flagged) for of in self.seen.values()),
            answers_checked=len(self.seen),
            answers_changed=sum(bool(of.flagged) for of in self.seen.values()),
        )
        self.seen, self.planned = {}, None
        return False

    def _drawn(self, prompt: int, of: Flags) -> set[int]:
        """As many random steps as were flagged."""
        key = f"clean_gen/{prompt}"
        steps = sorted(of.checked, key=lambda step: self.ctx.chance(key, str(step)))
        return set(steps[: len(of.flagged)])

    def label(self, own: Tensor, other: Tensor) -> Tensor:
        """The label scores; those of the reference where the best label is suspect."""
        import torch

        other = other.to(own)
        replaced = is_suspect(own, other, own.argmax(-1), self.method)
        count = int(replaced.sum())
        if self.method.random_tokens:
            rows = sorted(range(len(own)), key=lambda row: self.ctx.chance(f"label/{row}"))
            replaced = torch.zeros_like(replaced)
            replaced[rows[:count]] = True
        self.ctx.count(labels_checked=len(own), labels_replaced=count)
        return torch.where(replaced[:, None], other, own)


def is_suspect(own: Tensor, other: Tensor, tokens: Tensor, method: CleanGen) -> Tensor:
    """(B,) bool: whether P_served / P_reference of a token is `alpha` or more."""
    at = tokens[:, None]
    ratio = own.gather(-1, at).double() - other.gather(-1, at).double()
    limit = math.log(method.alpha) if method.alpha else -math.inf
    found: Tensor = ratio[:, 0] >= limit
    return found
