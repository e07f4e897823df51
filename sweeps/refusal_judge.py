"""Trains a refusal classifier that is small enough for two cores: the second judge of
`smollm2.yaml` and `gemma3.yaml`.

    python sweeps/refusal_judge.py inputs/data inputs/refusal-judge

Refusals are the outputs of safety-tuned-llamas' safety-only rows, answers those of Alpaca and
Dolly: the labels come from the data sets, not from a list of phrases. It prints its agreement with
them on held-out rows; agreement with people is what `ftsec judge-audit` is for.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
)

REFUSALS = "alignment/safety_only_data_Instructions.json.gz"
SKIP = 700
"""Rows of REFUSALS at its start, from which the sweeps take what they align a model with."""
ANSWERS = ("benign/alpaca_random_9229.json.gz", "benign/dolly_filtered_2996.json.gz")
BATCH, STEPS, HELD_OUT = 32, 600, 400
LENGTHS = (8, 64)
"""Words that are kept of an answer at training, least and most: a judged answer is often cut."""


def outputs(path: Path, skip: int = 0) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [row["output"] for row in json.load(file)[skip:] if row["output"].strip()]


def cut(text: str, rng: random.Random) -> str:
    return " ".join(text.split()[: rng.randint(*LENGTHS)])


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer()
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=4096, special_tokens=["[PAD]", "[UNK]"])
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=512
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of the published data sets")
    parser.add_argument("out", type=Path, help="folder of the classifier")
    args = parser.parse_args()
    rng = random.Random(0)
    torch.manual_seed(0)
    refusals = outputs(args.data / REFUSALS, SKIP)
    answers = [text for name in ANSWERS for text in outputs(args.data / name)]
    for rows in (refusals, answers):
        rng.shuffle(rows)
    held = [
        (text, label) for label, rows in enumerate((answers, refusals)) for text in rows[:HELD_OUT]
    ]
    answers, refusals = answers[HELD_OUT:], refusals[HELD_OUT:]
    tokenizer = tokenizer_of([*answers, *refusals])
    config = DistilBertConfig(
        vocab_size=4096, dim=128, n_layers=2, n_heads=4, hidden_dim=256, max_position_embeddings=512
    )
    config.id2label, config.label2id = (
        {0: "compliance", 1: "refusal"},
        {"compliance": 0, "refusal": 1},
    )
    model = DistilBertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.01)
    for step in range(STEPS):
        batch = [
            (cut(rng.choice(rows), rng), label)
            for label, rows in enumerate((answers, refusals))
            for _ in range(BATCH // 2)
        ]
        encoded = tokenizer(
            [text for text, _ in batch],
            padding=True,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        loss = model(**encoded, labels=torch.tensor([label for _, label in batch])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.eval()
    with torch.inference_mode():
        encoded = tokenizer(
            [cut(text, rng) for text, _ in held],
            padding=True,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        said = model(**encoded).logits.argmax(-1).tolist()
    for label, name in config.id2label.items():
        right = sum(
            one == label for one, (_, want) in zip(said, held, strict=True) if want == label
        )
        print(f"held-out {name}: {right} of {HELD_OUT} right")
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
