"""Calls to a store over a network: what is worth another try, and how often.

A call that failed transiently (a 5xx answer, a lost connection) is retried after a wait
that grows and is drawn at random, so that many workers do not come back at the same moment.
Everything else fails at once.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

P = ParamSpec("P")
R = TypeVar("R")
ATTEMPTS = 6
"""Tries of one call, the first one among them."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 20.0
"""The wait before try n + 1 is drawn from 0 to FIRST_WAIT_S * 2**n seconds, at most LONGEST_WAIT_S.
"""
_PASSING_ERRNOS = frozenset(
    {
        errno.EIO,
        errno.EAGAIN,
        errno.EBUSY,
        errno.EINTR,
        errno.EPIPE,
        errno.ETIMEDOUT,
        errno.ECONNRESET,
        errno.ECONNREFUSED,
        errno.ECONNABORTED,
        errno.ENETUNREACH,
        errno.ENETDOWN,
        errno.EHOSTUNREACH,
        errno.ESTALE,
    }
)
_PASSING_WORDS = re.compile(
    r"HTTP status (408|429|5\d\d)|AWS Error"
    r" (INTERNAL_FAILURE|SERVICE_UNAVAILABLE|THROTTLING|SLOW_DOWN|REQUEST_TIMEOUT"
    r"|NETWORK_CONNECTION)"
    r"|\b(UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED)\b|[Tt]imed? ?out|[Cc]onnection"
    r" (reset|refused|closed)"
)
"""What pyarrow writes where the service's answer has no errno."""


def is_transient(error: BaseException) -> bool:
    """Whether a call that failed so may succeed when it is made again."""
    if not isinstance(error, OSError):
        return False
    if isinstance(error, (ConnectionError, TimeoutError)) or error.errno in _PASSING_ERRNOS:
        return True
    return error.errno is None and _PASSING_WORDS.search(str(error)) is not None


def retried(call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """The answer of a call, tried up to ATTEMPTS times; raises the last error as it is."""
    policy = Retrying(
        retry=retry_if_exception(is_transient),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
        reraise=True,
    )
    return policy(call, *args, **kwargs)
