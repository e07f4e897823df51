"""One function renders a conversation, for training and for evaluation; what differs between the
two is one flag.

A mismatch of the two is the most frequent cause of numbers that nobody can reproduce, so no other
module calls `apply_chat_template`, and the hash of the template is stored with every generation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ftsec_ray.context import Chat
from ftsec_ray.errors import DataError
from ftsec_ray.identity import digest_text


def chat_of(row: Mapping[str, Any]) -> Chat:
    """The conversation that a row asks: its system message, if any, and its prompt."""
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return [*system, {"role": "user", "content": row["prompt"]}]


def render(tokenizer: Any, chat: Chat, *, generate: bool) -> str:
    """The text of a conversation; with `generate` it ends where the assistant starts to answer."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the tokenizer has no chat template",
            getattr(tokenizer, "name_or_path", "?"),
            "a tokenizer with a chat_template",
            "use an instruction-tuned model, or give its base a template",
        )
    text: str = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generate)
    return text


def template_hash(tokenizer: Any) -> str:
    """Digest of the tokenizer's chat template."""
    return digest_text(str(getattr(tokenizer, "chat_template", "") or ""))[:16]


def turn(tokenizer: Any, row: Mapping[str, Any]) -> tuple[str, str]:
    """The rendered prompt of a row, and the rendered answer up to and including the end-of-turn
    token.
    """
    if row["prompt"] == "":
        return "", row["response"]
    chat = chat_of(row)
    prompt = render(tokenizer, chat, generate=True)
    whole = render(
        tokenizer, [*chat, {"role": "assistant", "content": row["response"]}], generate=False
    )
    if not whole.startswith(prompt):
        raise DataError(
            "the chat template renders an answered turn unlike an open one",
            whole[:200],
            "a text that starts with the open turn",
            "use a tokenizer whose template is prefix-stable",
        )
    answer = whole[len(prompt) :]
    end = answer.rfind(tokenizer.eos_token or "\0")
    return prompt, (
        answer[: end + len(tokenizer.eos_token)]
        if end >= 0
        else answer + (tokenizer.eos_token or "")
    )


def encode_rows(
    tokenizer: Any, rows: Sequence[Mapping[str, Any]], *, max_length: int
) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of every row; labels are -100 on the prompt, so that loss falls on the answer
    only; cut to `max_length`.
    """
    if not rows:
        return []
    turns = [turn(tokenizer, row) for row in rows]
    prompts = tokenizer([p for p, _ in turns], add_special_tokens=False)["input_ids"]
    answers = tokenizer([a for _, a in turns], add_special_tokens=False)["input_ids"]
    encoded = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = (prompt + answer)[:max_length]
        labels = ([-100] * len(prompt) + answer)[:max_length]
        encoded.append((ids, labels))
    return encoded


def encode_row(
    tokenizer: Any, row: Mapping[str, Any], *, max_length: int
) -> tuple[list[int], list[int]]:
    """(ids, labels) of one row: see `encode_rows`."""
    return encode_rows(tokenizer, [row], max_length=max_length)[0]
