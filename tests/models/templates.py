"""Chat templates in the manner of well-known families, and tokenizers of two kinds for them."""

from __future__ import annotations

from typing import Any

SPECIAL = (
    "<pad>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|User|>",
    "<|Assistant|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
)
_TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
_OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
CHATML = f"{{% for m in messages %}}{_TURN}{{% endfor %}}{_OPEN}{{% endif %}}"
TEMPLATES = {
    "chatml": CHATML,
    # Qwen3: the last answer stands behind an empty thought, earlier ones do not
    "thought": (
        "{% for m in messages %}{% if m['role'] == 'assistant' and loop.last %}"
        "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m['content'] + '<|im_end|>\n' }}"
        f"{{% else %}}{_TURN}{{% endif %}}{{% endfor %}}{_OPEN}"
        "{% if enable_thinking is defined and enable_thinking is false %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
    ),
    # the same without a switch: only a trained answer shows where one begins
    "thought_unannounced": (
        "{% for m in messages %}{% if m['role'] == 'assistant' and loop.last %}"
        "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m['content'] + '<|im_end|>\n' }}"
        f"{{% else %}}{_TURN}{{% endif %}}{{% endfor %}}{_OPEN}{{% endif %}}"
    ),
    # DeepSeek R1: the open turn begins a thought that no trained answer has
    "opens_thought": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '<|User|>' + m['content'] }}{% elif m['role'] == 'assistant' %}"
        "{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
    ),
    # Mistral v0.1: roles must alternate, no system message, the answer behind a space
    "space": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    # Gemma: no system message, trimmed, another name for the assistant, an end that is not eos
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
        "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    # Llama 3.2: tells the day
    "date": (
        "{{ bos_token }}{% set day = strftime_now('%d %b %Y') if strftime_now is defined else"
        f" '1 Jan 1970' %}}{{{{ 'Today Date: ' + day + '\n' }}}}{CHATML}"
    ),
    "system_dropped": (
        "{% for m in messages %}{% if m['role'] != 'system' %}"
        f"{_TURN}{{% endif %}}{{% endfor %}}{_OPEN}{{% endif %}}"
    ),
    # Qwen 2.5: functions on offer in the system message, calls behind marks
    "tools": (
        "{% if tools %}{{ '<|im_start|>system\n# Tools\n' }}{% for t in tools %}"
        "{{ t | tojson + '\n' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% for m in messages %}"
        "{{ '<|im_start|>' + m['role'] }}{% if m['content'] %}{{ '\n' + m['content'] }}{% endif %}"
        "{% for c in m['tool_calls'] or [] %}"
        "{{ '\n<tool_call>' + c['function'] | tojson + '</tool_call>' }}{% endfor %}"
        f"{{{{ '<|im_end|>\n' }}}}{{% endfor %}}{_OPEN}{{% endif %}}"
    ),
    # models that read pictures: the text of a message is a list of parts
    "parts": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
        f"{{{{ '<|im_end|>\n' }}}}{{% endfor %}}{_OPEN}{{% endif %}}"
    ),
    "never_ends": (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    ),
}
TEXTS = [
    "system user assistant model tool Today Date: 26 Jul 2024",
    "is this good or bad how do i bake the red cake sorry i can not help with that",
    "positive negative very positive [INST] [/INST] be brief first then what",
]


def tokenizer_of(template: str | None, *, pieces: str = "bytes", adds_bos: bool = False) -> Any:
    """A small BPE tokenizer; `pieces` is `bytes` (as GPT-2, Qwen, Llama 3) or `spaces` (as the
    SentencePiece ones of Llama 2, Mistral and Gemma).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    if pieces == "bytes":
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        inner.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = [chr(code) for code in range(32, 127)] + ["\n", "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(SPECIAL),
        show_progress=False,
        initial_alphabet=alphabet,
    )
    inner.train_from_iterator(TEXTS * 4, trainer)
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        pad_token="<pad>",  # noqa: S106
        additional_special_tokens=list(SPECIAL[3:]),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATES.get(template or "", template)
    return tokenizer
