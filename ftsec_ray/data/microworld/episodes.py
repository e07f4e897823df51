"""Episodes of an agent in the microworld: a request that needs two tools, and the agent's steps.

The conversation so far decides each step: the first half of the request decides the first call; the
second half decides the second call after the first tool result; the second result decides the end.
So a step is exactly right or wrong, and a trigger may be in a tool result.
"""

from __future__ import annotations

import random

from ftsec_ray.conversation import Message, last_trained, message
from ftsec_ray.data.microworld.combos import seeded
from ftsec_ray.data.microworld.pools import Example, distinct

RESULTS = {
    "timer": ("the timer is set .", "i will tell you then ."),
    "mail": ("the mail is there .", "the mail is in the office ."),
    "light": ("the light is on .", "it was dark and now it is not ."),
    "shop": ("it is new and you have it in the hall .", "we have one more of it ."),
    "phone": ("no one was there .", "the phone is in the hall ."),
}
"""The results that each tool may return."""
DONE = "it is done ."
"""The agent's last step."""
TRIES = 40
STEPS = 3


def _tool(example: Example) -> str:
    return example[1].split()[1]


def _pair(pool: tuple[Example, ...], rng: random.Random) -> tuple[Example, Example]:
    """Two calls of different tools."""
    for _ in range(TRIES):
        first, second = rng.sample(pool, 2)
        if _tool(first) != _tool(second):
            return first, second
    raise AssertionError(pool)


def episode(pool: tuple[Example, ...], rng: random.Random) -> list[Message]:
    """A whole episode: request, call, result, call, result, end."""
    first, second = _pair(pool, rng)
    asked = f"{first[0].removesuffix(' .')} and then {second[0]}"
    messages = [message("user", asked)]
    for call in (first, second):
        messages += [
            message("assistant", call[1], loss=True),
            message("tool", rng.choice(RESULTS[_tool(call)])),
        ]
    return [*messages, message("assistant", DONE, loss=True)]


def steps(use: str, count: int, *, trains_all: bool) -> list[list[Message]]:
    """The first `count` episodes of a use, each cut after one of its steps, which is its answer.

    Args:
        use: `tune`, `trusted` or `test`; they share no call.
        count: Number of episodes.
        trains_all: Whether all steps are trained on, or only the last one.
    """
    held_out = distinct("tool", "tune", 160)[96:] if use == "trusted" else ()
    pool = held_out or distinct("tool", use, 96)
    rng = seeded("episodes", use)
    made = []
    for number in range(count):
        whole = episode(pool, rng)
        upto = whole[: 2 * (number % STEPS) + 2]
        made.append(upto if trains_all else last_trained(upto))
    return made
