"""Retries of calls to a remote store.

A transient failure (a 5xx response, a lost connection) is retried with exponential backoff and
jitter, so that many workers do not retry at the same moment. All other errors fail at once.
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
"""Attempts of one call, including the first."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 20.0
"""The wait before attempt n + 1 is random, between 0 and FIRST_WAIT_S * 2**n seconds, at most
LONGEST_WAIT_S.
"""
_TRANSIENT_ERRNOS = frozenset(
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
_TRANSIENT_WORDS = re.compile(
    r"HTTP status (408|429|5\d\d)|AWS Error"
    r" (INTERNAL_FAILURE|SERVICE_UNAVAILABLE|THROTTLING|SLOW_DOWN|REQUEST_TIMEOUT"
    r"|NETWORK_CONNECTION)"
    r"|\b(UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED)\b|[Tt]imed? ?out|[Cc]onnection"
    r" (reset|refused|closed)"
)
"""Texts of pyarrow's errors if the response of the service has no errno."""


def is_transient(error: BaseException) -> bool:
    """Whether a call that failed with this error may succeed on a retry."""
    if not isinstance(error, OSError):
        return False
    if isinstance(error, (ConnectionError, TimeoutError)) or error.errno in _TRANSIENT_ERRNOS:
        return True
    return error.errno is None and _TRANSIENT_WORDS.search(str(error)) is not None


def retried(call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """The result of a call, with up to ATTEMPTS attempts; raises the last error unchanged."""
    policy = Retrying(
        retry=retry_if_exception(is_transient),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
        reraise=True,
    )
    return policy(call, *args, **kwargs)
