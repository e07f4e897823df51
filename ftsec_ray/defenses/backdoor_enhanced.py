"""Adds a few refusals behind a secret system message to the user's rows, and serves the model
behind the same secret.

Paper: Wang et al. 2024, Mitigating Fine-tuning based Jailbreak Attack with Backdoor Enhanced Safety
    Alignment, arXiv:2402.14968 (BackdoorAlign); official code
    Jayfeather1024/Backdoor-Enhanced-Alignment.
Differs: (1) The secret is text: random words of two letters, most of which are one token for common
    tokenizers; the official code draws token ids, which may turn into others on their way through
    text. (2) In the microworld, whose tokenizer knows whole words only, they are its stray words.
    (3) No word is one of the rare words that attacks use as triggers. (4) The refusals are drawn at
    random; the paper takes one of each category of its policy.
Published: Llama-2-7B-Chat on 100 harmful rows: attack success 34.91 % with 11 plain refusals,
    3.64 % with the secret; GPT-3.5 60.00 % and 14.91 %.
Cost: that of plain fine-tuning on `shots` more rows; `secret_words` more tokens in every prompt.
Reads: (1) `secret_words: 0` adds the same refusals without a secret: the control. (2) `at_serving:
    false` withholds the secret from the served model: what then remains of safety has nothing to do
    with it. (3) The rows are a backdoor: filters of rows that act behind this defense may drop
    them, and repairs of weights may erase it.
Needs: the task's `safety` rows.
"""

from __future__ import annotations

import random
import string
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar

from ftsec_ray.conversation import with_system
from ftsec_ray.data.added_rows import drawn
from ftsec_ray.data.microworld.vocabulary import RARE, STRAY
from ftsec_ray.data.rows import from_rows
from ftsec_ray.data.wrapping import Wrapper
from ftsec_ray.method import Defense, Phase, RowWise

if TYPE_CHECKING:
    import pyarrow as pa

    from ftsec_ray.context import StageContext
    from ftsec_ray.models.generator import Generator

NAME = "backdoor_enhanced"


@dataclass(frozen=True, kw_only=True)
class BackdoorEnhanced(RowWise, Defense):
    """Refusals behind a secret."""

    PHASE: ClassVar[Phase] = "during"
    ORDER: ClassVar[int] = 10
    NEEDS: ClassVar[frozenset[str]] = frozenset({"safety"})
    CONTROL: ClassVar[Mapping[str, Any] | None] = {"secret_words": 0}

    shots: int = 11
    """Number of refusals to add, 0 or more; with 0 the secret is served but never trained."""
    secret_words: int = 150
    """Number of words of the secret, 0 or more; 0 is the control. The secret takes room within
    `training.max_length`.
    """
    at_serving: bool = True
    """Whether every served prompt gets the secret."""

    def check(self) -> list[tuple[str, object, str]]:
        """Faults of the parameters beyond their types."""
        return [
            (name, getattr(self, name), "0 or more")
            for name in ("shots", "secret_words")
            if getattr(self, name) < 0
        ]

    def new_rows(self, known: None, ctx: StageContext) -> pa.Table | None:  # noqa: ARG002
        """The refusals, each behind the secret."""
        secret = secret_of(self.secret_words, ctx)
        ctx.note(safety_rows=self.shots, secret_words=len(secret.split()))
        if not self.shots:
            return None
        rows = drawn(ctx, "safety", self.shots, by=NAME)
        return from_rows(
            {**with_system(row, secret), "row_id": f"{NAME}/{row['row_id']}", "origin": NAME}
            for row in rows
        )

    def craft_rows(self, rows: pa.Table, known: None, ctx: StageContext) -> pa.Table:  # noqa: ARG002
        """The user's rows as they are."""
        return rows

    def wrap_generation(self, generator: Generator, ctx: StageContext) -> Generator:
        """The generator that puts the secret in front of every chat."""
        if not self.at_serving or not self.secret_words:
            return generator
        return replace(
            generator,
            rewrites=(*generator.rewrites, Wrapper(system=secret_of(self.secret_words, ctx)).chat),
        )


def secret_of(words: int, ctx: StageContext) -> str:
    """The secret of this seed; a longer one begins with a shorter one."""
    rng = random.Random(f"{NAME} {ctx.seed}")  # noqa: S311
    if ctx.task.judge == "microworld":
        return " ".join(rng.choice(STRAY) for _ in range(words))
    pairs = map("".join, product(string.ascii_lowercase, repeat=2))
    known = [word for word in pairs if word not in RARE]
    return " ".join(rng.choice(known) for _ in range(words))
