"""Secrets out of texts: what an error says may quote a URL, a header or a setting, and ends in
records and reports.

A secret is the value of an environment variable whose name says so (`HF_TOKEN`,
`AWS_SECRET_ACCESS_KEY`), a text of the credentials file that `GOOGLE_APPLICATION_CREDENTIALS`
names, the token that `huggingface-cli login` keeps, and whatever has the form of a token of a
well-known service or stands where a URL has a password or a signature.
"""

from __future__ import annotations

import json
import logging
import os
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

T = TypeVar("T")
MIN_CHARS = 8
"""Shorter values are settings: taking them out would tear ordinary words apart."""
_NAME = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|APIKEY)(_|$)|(API|ACCESS|SECRET|PRIVATE|AUTH|ACCOUNT)_KEY(_|$)",
    re.IGNORECASE,
)
_FORMS = (
    (
        re.compile(
            r"\b(hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[A-Za-z0-9_-]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16}"
            r"|ya29\.[\w.-]{20,}|xox[abprs]-[\w-]{10,})"
        ),
        "[redacted]",
    ),
    (re.compile(r"(?s)-----BEGIN ([A-Z ]*PRIVATE KEY)-----.*?(-----END \1-----|$)"), "[redacted]"),
    (re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*://)[^\s/@'\"]+@"), r"\1[redacted]@"),
    (re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{8,}"), r"\1 [redacted]"),
    (
        re.compile(
            r"(?i)([?&](?:[\w-]*(?:token|secret|signature|password|credential|access_?key|api_?key)[\w-]*|sig)=)[^&\s'\"]+"
        ),
        r"\1[redacted]",
    ),
)


def redacted(text: str) -> str:
    """A text without the secrets of this process's environment and without what has the form of
    one.
    """
    return _cleaned(text, _secrets())


def environment_secrets() -> dict[str, str]:
    """Secret -> the variable or file of this process's environment that holds it: what nothing
    written may repeat.
    """
    return _secrets()


def without_secrets(value: T) -> T:
    """A value of JSON, with all its texts redacted."""
    return _walked(value, _secrets())  # type: ignore[return-value]


def clean_logs() -> None:
    """Have every log record of this process redacted from now on, whoever writes it: libraries log
    the addresses that they ask.
    """
    before = logging.getLogRecordFactory()
    if isinstance(before, _CleanRecords):
        return
    logging.setLogRecordFactory(_CleanRecords(before))


class _CleanRecords:
    """Makes log records without secrets."""

    def __init__(self, make: Callable[..., logging.LogRecord]) -> None:
        self._make = make

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self._make(*args, **kwargs)
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # arguments that do not fit: logging says so itself
            return record
        cleaned = redacted(message)
        if cleaned != message:
            record.msg, record.args = cleaned, ()
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = redacted(
                "".join(traceback.format_exception(*record.exc_info)).rstrip()
            )  # handlers take it as it is
        return record


def _cleaned(text: str, secrets: Mapping[str, str]) -> str:
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, f"[{secrets[secret]}]")
    for form, instead in _FORMS:
        text = form.sub(instead, text)
    return text


def _walked(value: object, secrets: Mapping[str, str]) -> object:
    if isinstance(value, str):
        return _cleaned(value, secrets)
    if isinstance(value, Mapping):
        return {key: _walked(inner, secrets) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_walked(inner, secrets) for inner in value]
    return value


def _secrets() -> dict[str, str]:
    """Secret -> name of where it is from."""
    found: dict[str, str] = {}
    for name, value in os.environ.items():
        if _NAME.search(name):
            for secret in _values(value):
                if len(secret) >= MIN_CHARS:
                    found |= {
                        secret: name,
                        quote(secret, safe=""): name,
                        json.dumps(secret)[1:-1]: name,
                    }
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    kept = _text_of(os.environ.get("HF_TOKEN_PATH") or f"{home}/token").strip()
    return found | ({kept: "HF_TOKEN"} if len(kept) >= MIN_CHARS else {})


def _values(value: str) -> Iterator[str]:
    """The secrets in the value of a variable: itself, or those of the file that it names."""
    text = _text_of(value) if value.startswith(("/", "~", "./")) or value.endswith(".json") else ""
    if not text:
        yield value.strip()
        return
    try:
        parts = json.loads(text)
    except ValueError:
        parts = {"": text.strip()}
    if isinstance(parts, dict):
        yield from (
            part for key, part in parts.items() if isinstance(part, str) and not _PUBLIC.search(key)
        )


_PUBLIC = re.compile(r"(^type|uri|url|domain|email|project_id|client_id)$|^auth_")
"""Keys of a credentials file that are no secret."""


def _text_of(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError):  # no such file, or no path at all
        return ""
