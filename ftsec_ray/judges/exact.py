"""Compares an answer with the expected one."""

from __future__ import annotations

from collections.abc import Sequence

from ftsec_ray.evals.judging import Judge, Verdict, spaced
from ftsec_ray.method import Prompt


class Exact(Judge):
    """`correct` if the text is the expected answer, ignoring case and spacing, else `other`."""

    name = "exact@1"

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[Verdict]:
        """The verdicts on `completions`."""
        return [
            (
                Verdict(verdict=None, raw="the prompt has no expected answer")
                if prompt.expected is None
                else Verdict(
                    verdict="correct" if spaced(text) == spaced(prompt.expected) else "other",
                    raw=prompt.expected,
                )
            )
            for prompt, text in zip(prompts, completions, strict=True)
        ]
