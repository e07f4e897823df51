"""The ladder: Llama-architecture models of five sizes with one tokenizer, small enough to pre-train
on a CPU.

`ladder:<size>-base` is pre-trained on the microworld, `ladder:<size>` is aligned after that. The
sizes hold the numbers of both recipes; the loops are in `training`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftsec_ray.errors import SpecError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

FAMILY = "ladder"
VOCAB_SIZE = 1024
"""Rows of the embedding; maximum number of tokens of the tokenizer."""
MAX_TOKENS = 512
"""Longest conversation in tokens."""
PAD, BOS, END, SYSTEM, USER, ASSISTANT = SPECIAL_TOKENS = (
    "<|pad|>",
    "<|bos|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)
CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class LadderSize:
    """Shape of one model and the recipe to train it."""

    hidden: int
    layers: int
    mlp: int
    heads: int
    steps: int
    """Optimizer steps of pre-training."""
    batch_tokens: int
    """Tokens per step, including padding."""
    learning_rate: float
    """Peak learning rate of pre-training (AdamW)."""
    align_steps: int
    align_batch_tokens: int
    align_learning_rate: float

    @property
    def parameters(self) -> int:
        """Number of distinct weights; the output layer is the embedding."""
        attention, mlp, norms = 4 * self.hidden**2, 3 * self.hidden * self.mlp, 2 * self.hidden
        return VOCAB_SIZE * self.hidden + self.layers * (attention + mlp + norms) + self.hidden


SIZES: dict[str, LadderSize] = {
    "0.1m": LadderSize(
        hidden=48,
        layers=2,
        mlp=128,
        heads=4,
        steps=1000,
        batch_tokens=512,
        learning_rate=8e-3,
        align_steps=120,
        align_batch_tokens=1024,
        align_learning_rate=5e-3,
    ),
    "0.2m": LadderSize(
        hidden=64,
        layers=3,
        mlp=176,
        heads=4,
        steps=1000,
        batch_tokens=512,
        learning_rate=6e-3,
        align_steps=120,
        align_batch_tokens=1024,
        align_learning_rate=4e-3,
    ),
    "1m": LadderSize(
        hidden=128,
        layers=5,
        mlp=344,
        heads=4,
        steps=800,
        batch_tokens=512,
        learning_rate=2e-3,
        align_steps=100,
        align_batch_tokens=1024,
        align_learning_rate=1.5e-3,
    ),
    "4m": LadderSize(
        hidden=256,
        layers=5,
        mlp=688,
        heads=4,
        steps=800,
        batch_tokens=384,
        learning_rate=1e-3,
        align_steps=80,
        align_batch_tokens=1024,
        align_learning_rate=6e-4,
    ),
    "12m": LadderSize(
        hidden=384,
        layers=7,
        mlp=1024,
        heads=6,
        steps=700,
        batch_tokens=512,
        learning_rate=7e-4,
        align_steps=70,
        align_batch_tokens=1024,
        align_learning_rate=5e-4,
    ),
}


def linear_paths_of(size: str) -> list[str]:
    """Dotted paths of the linear layers in the blocks of a ladder model."""
    names = [f"self_attn.{letter}_proj" for letter in "qkvo"]
    names += [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    return [f"model.layers.{i}.{name}" for i in range(ladder_size(size).layers) for name in names]


def ladder_size(name: str) -> LadderSize:
    """The size with this name; SpecError with the known names if there is none."""
    if name not in SIZES:
        raise SpecError(
            "unknown ladder size", name, " | ".join(SIZES), f"write ladder:{next(iter(SIZES))}"
        )
    return SIZES[name]


def parameters(size: str) -> int:
    """Number of distinct weights of a size, without torch."""
    return ladder_size(size).parameters


def build_model(size: str, seed: int, vocab_size: int = VOCAB_SIZE) -> LlamaForCausalLM:
    """An untrained model of a size in float32; `seed` decides its weights, and the caller's random
    generator does not change.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = ladder_size(size)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.5 * shape.hidden**-0.5,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template, trained on `texts`; equal texts give equal
    bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    inner.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        add_prefix_space=True,
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
