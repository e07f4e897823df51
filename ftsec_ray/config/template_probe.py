"""Renders test conversations with one chat template in a separate process with limits on time and
memory; `template_limits` starts it.

The script imports only the standard library and Jinja, so that it starts in a fraction of a second.
Its Jinja environment is that of transformers, which renders the template later.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
from datetime import datetime
from typing import Any

LONG_CHARS = 20_000
MANY_TURNS = 64
DRAWN = 8
"""Number of random conversations, different in each process."""
_LETTERS = "etaoinshrdlucmfw"


def conversations() -> list[tuple[list[dict[str, Any]], list[dict[str, Any]] | None]]:
    """Test conversations, each with the tools that it offers: short ones of every form, and long
    ones.
    """
    user: dict[str, Any] = {"role": "user", "content": "a"}
    answer: dict[str, Any] = {"role": "assistant", "content": "b"}
    system: dict[str, Any] = {"role": "system", "content": "c"}
    function = {"name": "f", "arguments": {"a": 1}}
    call = {"id": "callid001", "type": "function", "function": function}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "content": "d", "name": "f", "tool_call_id": "callid001"}
    offer: list[dict[str, Any]] = [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    ]
    long = {"role": "user", "content": "word " * (LONG_CHARS // 5)}
    plain: list[list[dict[str, Any]]] = [
        [user],
        [user, answer],
        [system, user, answer],
        [user, called, result, answer],
        [user, user],
        [long, answer],
        [system, *[user, answer] * MANY_TURNS],
    ]
    in_parts = [
        [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in chat]
        for chat in (plain[1], plain[2])
    ]
    unoffered = [(chat, None) for chat in (*plain, *in_parts, *_drawn())]
    return [*unoffered, ([user], offer), (plain[2], offer)]


def _drawn() -> list[list[dict[str, Any]]]:
    """Random conversations of different lengths, so that a template cannot recognize the test and
    behave well only there.
    """
    draw = random.SystemRandom()

    def text() -> str:
        words: list[str] = []
        for _ in range(round(2 ** draw.uniform(0, 11))):
            words.append("".join(draw.choices(_LETTERS, k=draw.randint(1, 9))))
        return " ".join(words).capitalize() + draw.choice("?.!")

    turns = [draw.choice((1, 2, 2, 3, 4, 6)) for _ in range(DRAWN)]
    return [
        [{"role": ("user", "assistant")[i % 2], "content": text()} for i in range(count)]
        for count in turns
    ]


def _environment() -> Any:
    from jinja2 import TemplateError, ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """The tag of transformers around the assistant's text."""

        tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            call = self.call_method("_said")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _said(self, caller: Any) -> Any:
            return caller()

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, **how: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **how})

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = datetime(2024, 7, 26).strftime  # noqa: DTZ001
    return environment


def _limited(seconds: int, memory: int) -> None:
    import resource

    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with contextlib.suppress(OSError, ValueError):  # a system without this limit
            resource.setrlimit(kind, (least, least))


def longest(template: str, values: dict[str, Any], most: int) -> int:
    """Length of the longest text that the template renders, in characters; a conversation that the
    template rejects counts as empty.

    Args:
        template: The template.
        values: Variables of the template.
        most: Stop at the first text that is longer than this.
    """
    made = _environment().from_string(template)
    length = 0
    for chat, tools in conversations():
        for open_turn in (False, True):
            try:
                text = made.render(
                    messages=chat, tools=tools, add_generation_prompt=open_turn, **values
                )
            except MemoryError:
                raise
            except Exception:  # noqa: BLE001 - a template may reject a conversation by any error
                continue
            length = max(length, len(text))
            if length > most:
                return length
    return length


def main() -> None:
    """Read the template and its limits from stdin, and write the result to stdout, as JSON."""
    given = json.load(sys.stdin)
    _limited(given["seconds"], given["memory"])
    try:
        result: dict[str, Any] = {
            "chars": longest(given["template"], given["values"], given["chars"])
        }
    except MemoryError:
        result = {"over": "memory"}
    except Exception as error:  # noqa: BLE001 - the later rendering reports this error in full
        result = {"refused": type(error).__name__}
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
