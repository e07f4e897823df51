"""The way from probes to metrics in one call, through the files of both stages."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ftsec_ray.evals.ask import ask, read_answers, write_answers
from ftsec_ray.evals.scoring import Evaluation, score


def evaluate(generator, task, probes, config, *, runtime, seed=0) -> Evaluation:
    """What the stages `generate` and `score` do to a finished model."""
    with tempfile.TemporaryDirectory() as folder:
        answers = ask(generator, task, probes, config, runtime=runtime, seed=seed)
        write_answers(answers, Path(folder))
        return score(read_answers(Path(folder)), task, config, device=runtime.device)
