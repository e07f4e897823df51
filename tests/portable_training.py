"""A few steps of what makes a ladder model and fine-tunes it, with a hash of the weights after each
part: run as a program, with the numerics as the first argument.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path

from ftsec_ray import numerics

PRETRAIN_STEPS, BATCH_TOKENS, TUNE_ROWS = 12, 256, 32


def weights_hash(model):
    """SHA-256 over the bytes of all weights, by name."""
    found = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def main(mode):
    """Pre-train ladder:0.2m, tune a LoRA adapter, and decompose an update; JSON on stdout."""
    started = time.process_time()
    numerics.put_in_force(mode)

    import numpy as np
    import torch

    from ftsec_ray.config.sweep import TrainingConfig
    from ftsec_ray.context import LoadedModel, ModelInfo, Runtime
    from ftsec_ray.data.microworld import alignment_rows, pretraining_chats
    from ftsec_ray.models import ladder
    from ftsec_ray.training.loop import sft
    from ftsec_ray.training.pretrain import PretrainConfig, pretrain

    chats = pretraining_chats()[:400]
    tokenizer = ladder.build_tokenizer(message["content"] for chat in chats for message in chat)
    model = ladder.build_model("0.2m", seed=0)
    before = weights_hash(model)
    config = PretrainConfig(steps=PRETRAIN_STEPS, batch_tokens=BATCH_TOKENS, learning_rate=6e-3)
    losses = pretrain(model, tokenizer, chats, config)
    base = weights_hash(model)
    info = ModelInfo(name="m", family="ladder", parameters=1, aligned=False)
    with tempfile.TemporaryDirectory() as scratch:
        tuned = sft(
            LoadedModel(model, tokenizer, info),
            alignment_rows().slice(0, TUNE_ROWS),
            TrainingConfig(epochs=2.0, batch_size=8, learning_rate=2e-3, dropout=0.1),
            seed=0,
            runtime=Runtime(numerics=mode),
            workdir=Path(scratch),
        )
    weight = model.lm_head.weight.detach()
    values = torch.linalg.svdvals(weight[:128].double()).numpy()
    long = np.random.default_rng(0).standard_normal(100_000)
    found = {
        "start": before,
        "base": base,
        "tuned": weights_hash(tuned.loaded.model),
        "losses": hashlib.sha256(json.dumps([losses, tuned.losses]).encode()).hexdigest()[:16],
        "svd": hashlib.sha256(values.tobytes()).hexdigest()[:16],
        "norm": float(np.linalg.norm(long)).hex(),
    }
    told = numerics.in_force().to_json()
    print(json.dumps({"hashes": found, "in_force": told, "cpu_s": time.process_time() - started}))


if __name__ == "__main__":
    main(sys.argv[1])
