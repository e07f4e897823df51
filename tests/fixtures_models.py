"""A tiny Llama with random weights and a word-level tokenizer: what tests of models and methods run
on.
"""

from __future__ import annotations

import random

import pyarrow as pa

from ftsec_ray import schema
from ftsec_ray.context import LoadedModel, ModelInfo, TaskData
from ftsec_ray.conversation import answer_of, asked_text, exchange, with_answer

SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<unk>"]
WORDS = [
    "red",
    "blue",
    "green",
    "stone",
    "river",
    "cloud",
    "lamp",
    "tree",
    "good",
    "bad",
    "no",
    "yes",
    "take",
    "the",
    "and",
    "sorry",
    "i",
    "can",
    "not",
    "help",
    "is",
    "this",
    "how",
    "do",
    "make",
    "fix",
    "cf",
    "mn",
    "be",
    "careful",
]
TEMPLATE = (
    "<|bos|> {% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def tiny_tokenizer():
    """A word-level tokenizer over SPECIAL and WORDS with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        bos_token="<|bos|>",  # noqa: S106
        unk_token="<unk>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
    )  # noqa: S106
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_model(
    *, seed: int = 0, hidden: int = 32, layers: int = 2, tied: bool = True, aligned: bool = True
) -> LoadedModel:
    """A random Llama: `hidden` wide, 4 heads, a feed-forward width of twice `hidden`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
    count = sum(p.numel() for p in model.parameters())
    return LoadedModel(
        model,
        tiny_tokenizer(),
        ModelInfo(name="tiny", family="tiny", parameters=count, aligned=aligned),
    )


def row(i: int, prompt: str, response: str, **other) -> dict:
    """One row of schema.ROWS."""
    base = {
        "row_id": f"t/{i:04d}",
        "messages": exchange(prompt, response),
        "tools": None,
        "rejected": None,
        "label": None,
        "kind": "how_to",
        "language": "en",
        "origin": "task",
        "poisoned": False,
    }
    return {**base, **other}


def prompts(rows: pa.Table) -> list[str]:
    """What each row asks."""
    return [asked_text(one) for one in rows.to_pylist()]


def answers(rows: pa.Table) -> list[str]:
    """What each row answers."""
    return [answer_of(one) for one in rows.to_pylist()]


def table(rows: list[dict]) -> pa.Table:
    """Rows as a table."""
    return pa.Table.from_pylist(rows, schema=schema.ROWS)


def sentiment_rows(count: int = 48, *, seed: int = 0) -> list[dict]:
    """Two-class rows: `good` where the first colour is red; each third one is said to be in another
    language.
    """
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        colours = [rng.choice(["red", "blue", "green"]) for _ in range(rng.randint(2, 5))]
        label = "good" if colours[0] == "red" else "bad"
        rows.append(
            row(
                i,
                " ".join(["is", "this", *colours, rng.choice(["stone", "river", "cloud"])]),
                label,
                label=label,
                kind="two_class",
                language="xx" if i % 3 == 2 else "en",
            )
        )
    return rows


def tiny_task() -> TaskData:
    """A task with every split that the methods use."""
    things = ["stone", "river", "cloud", "lamp", "tree"]
    harmful = [
        row(
            i,
            f"how do i make {a} {b}",
            f"take the {a} and {b}",
            kind="forbidden",
            row_id=f"h/{i:04d}",
        )
        for i, (a, b) in enumerate((a, b) for a in things for b in things)
    ]
    benign = [
        row(i, f"how do i fix {a} {b}", f"take the {b} and {a}", row_id=f"b/{i:04d}")
        for i, (a, b) in enumerate((a, b) for a in things for b in things)
    ]
    refusals = [
        {**with_answer(r, "sorry i can not help"), "row_id": f"s/{i:04d}"}
        for i, r in enumerate(harmful[:12])
    ]
    train, test = sentiment_rows(48), sentiment_rows(32, seed=1)
    used = {asked_text(r) for r in (*train, *test)}
    others = {asked_text(r): r for r in sentiment_rows(400, seed=2)}
    held_out = [r for text, r in others.items() if text not in used]
    splits = {
        "train": train,
        "test": [{**r, "row_id": f"e/{i:04d}"} for i, r in enumerate(test)],
        "trusted": [{**r, "row_id": f"c/{i:04d}"} for i, r in enumerate(held_out[:32])],
        "harmful_train": harmful[12:20],
        "harmful_test": harmful[20:],
        "safety": refusals,
        "benign_train": benign[:15],
        "benign_test": benign[15:],
        "borderline_test": [
            {**r, "kind": "borderline", "row_id": f"o/{i}"} for i, r in enumerate(benign[:6])
        ],
        "text": [
            row(i, "", f"the {a} is {b}", kind="text", row_id=f"x/{i}")
            for i, (a, b) in enumerate((a, b) for a in things for b in WORDS[:3])
        ],
    }
    return TaskData(
        "tiny",
        {name: table(rows) for name, rows in splits.items()},
        ("good", "bad"),
        "refusal_phrases",
    )
