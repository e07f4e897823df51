"""One table of model classes, each a tiny random model over the tokenizer of `fixtures_models`: what
the project claims to work on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ftsec_ray.context import LoadedModel, ModelInfo
from tests.fixtures_models import tiny_tokenizer

VOCABULARY = 64
"""More rows than the tokenizer has tokens, as published models have."""
LAYERS = 2
POSITIONS = 128
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
    **IDS,
}
"""Grouped queries, and a feed-forward width that no other size equals."""
GEMMA = {**LLAMA, "head_dim": 16}


def _llama_like(name: str, **values: Any) -> Callable[..., Any]:
    def build(*, tied: bool) -> Any:
        import transformers

        config = getattr(transformers, f"{name}Config")(
            **{**LLAMA, "tie_word_embeddings": tied, **values}
        )
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return build


def _gemma3_text(*, tied: bool) -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA, tie_word_embeddings=tied, sliding_window=8))


def _gemma3_pictures(*, tied: bool) -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    text = {**GEMMA, "sliding_window": 8, "tie_word_embeddings": tied}
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=1,
        image_token_index=VOCABULARY - 1,
        boi_token_index=VOCABULARY - 2,
        eoi_token_index=VOCABULARY - 3,
        tie_word_embeddings=tied,
        **IDS,
    )
    return Gemma3ForConditionalGeneration(config)


def _gpt2(*, tied: bool) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=LAYERS,
            n_head=4,
            n_inner=48,
            n_positions=POSITIONS,
            tie_word_embeddings=tied,
            initializer_range=0.2,
            **IDS,
        )
    )


def _opt(*, tied: bool) -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
            word_embed_proj_dim=32,
            tie_word_embeddings=tied,
            init_std=0.2,
            **IDS,
        )
    )


FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": _llama_like("Llama"),
    "mistral": _llama_like("Mistral", sliding_window=8),
    "qwen2": _llama_like("Qwen2"),
    "qwen3": _llama_like("Qwen3", head_dim=16),
    "gemma": _llama_like("Gemma", head_dim=16),
    "gemma2": _llama_like("Gemma2", head_dim=16, sliding_window=8),
    "gemma3": _gemma3_text,
    "gemma3_pictures": _gemma3_pictures,
    "phi3": _llama_like("Phi3"),
    "olmo2": _llama_like("Olmo2"),
    "granite": _llama_like(
        "Granite",
        residual_multiplier=0.5,
        embedding_multiplier=3.0,
        attention_multiplier=0.3,
        logits_scaling=2.0,
    ),
    "smollm3": _llama_like("SmolLM3"),
    "gpt2": _gpt2,
    "gpt_neox": _llama_like("GPTNeoX"),
    "opt": _opt,
}
NORM_BEHIND = ("gemma2", "gemma3", "gemma3_pictures", "olmo2")
"""Families with an RMSNorm between a writer and the residual stream."""
NO_EMBEDDINGS = ("gemma3_pictures",)
"""Families whose generate() takes no embeddings."""
SCALED = ("gemma", "gemma2", "gemma3", "gemma3_pictures")
"""Families whose embedding module scales its table by the root of the width."""


def family_model(name: str, *, tied: bool = False, seed: int = 0) -> LoadedModel:
    """A random model whose gains and biases are random too."""
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FAMILIES[name](tied=tied).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
    count = sum(p.numel() for p in model.parameters())
    info = ModelInfo(name=name, family="tiny", parameters=count, aligned=True)
    return LoadedModel(model, tiny_tokenizer(), info)
