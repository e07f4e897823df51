"""Secrets out of texts: what an error says may quote a URL, a header or a setting, and ends in
records and reports.

A secret is the value of an environment variable whose name says so (`HF_TOKEN`,
`AWS_SECRET_ACCESS_KEY`), the password in the URL of any variable, a text of the credentials file
that `GOOGLE_APPLICATION_CREDENTIALS` names, the token that `huggingface-cli login` keeps, and
whatever has the form of a token of a well-known service or stands where a URL has a password or a
signature (`secret_forms`). What a digest is made of is never redacted: only what is written.
"""

from __future__ import annotations

import base64
import html
import json
import logging
import os
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, quote_plus

from ftsec_ray.secret_forms import GONE, form_in, without_forms
from ftsec_ray.shown_text import for_terminal

T = TypeVar("T")
MIN_CHARS = 8
"""Shorter values are settings: taking them out would tear ordinary words apart."""
_SHORT = re.compile(r"(?=.*\d)(?=.*[A-Za-z])\S{6,7}")
"""But these are no words; they count where they stand alone, and not within a digest."""
_SETTINGS = frozenset(
    {
        *("password", "passphrase", "postgres", "postgresql", "username", "disabled", "required"),
        *("optional", "undefined", "redacted", "anonymous", "placeholder"),
        *("changeme", "change-me", "change_me"),
    }
)
"""Values that stand in for a secret, or say how one is used."""
_ROUNDS = 4
"""Times that a text is gone through at most, until nothing of it changes."""
_MAX_FILE = 1 << 16
"""Bytes read of a file that a variable names."""
_LINE = re.compile(r"[\w+/=.~-]{20,}")
"""A line of a secret of many lines that is one itself."""
_NAME = re.compile(
    r"(TOKENS?|SECRETS?|PASS|PASSW(OR)?D|PWD|PASSPHRASE|CRED(ENTIAL)?S?|(?:API|ACCESS|SECRET|SIGNING"
    r"|ENCRYPTION|PRIVATE|MASTER)KEYS?|(?<![A-Z])(?:KEYS?|AUTH|SAS|PAT)|WEBHOOK|JWT"
    r"|PRIVATE|COOKIE|CONNECTION_STRING|CONNSTR)(?=_|$)|SECRET|PASSWORD",
    re.IGNORECASE,
)
_NO_SECRET = re.compile(
    r"^(PWD|OLDPWD|GPG_KEY|SSH_AUTH_SOCK)$|_(MODE|TYPE|METHOD|PROVIDER|URI|FILE_MODE|NAME|ENABLED)$",
    re.IGNORECASE,
)
"""Names of settings beside secrets, of folders, and of the public key that Python images carry."""
_URL_PASSWORD = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s/@:]*:(?!\d{1,5}(?:[/?#]|$))(\S+)@")
_PAIR = re.compile(r"(?:^|[?&;])([\w-]+)=([^&;]+)")
_PUBLIC = re.compile(r"(^type|uri|url|domain|email|project_id|client_id)$|^auth_")
"""Keys of a credentials file that are no secret."""


def redacted(text: str) -> str:
    """A text without the secrets of this process's environment and without what has the form of
    one.
    """
    return known_secrets().cleaned(text)


def environment_secret_in(text: str) -> str | None:
    """The variable or file of this process's environment whose secret a text holds."""
    return known_secrets().source_in(text)


def without_secrets(value: T) -> T:
    """A value of JSON, with all its texts redacted, those of its keys too."""
    return known_secrets().taken_out_of(value)


def secrets_in(value: object) -> list[tuple[str, str]]:
    """(place, what it looks like) of every text of a JSON value that holds a secret; the place is
    the way of keys and numbers to it, redacted itself.
    """
    return list(_found(value, "", known_secrets()))


def clean_logs() -> None:
    """Have every log record of this process redacted from now on, whoever writes it, and shown as a
    terminal can show it: libraries log the addresses that they ask.
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
        cleaned = for_terminal(redacted(message))
        if cleaned != message:
            record.msg, record.args = cleaned, ()
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = for_terminal(
                redacted("".join(traceback.format_exception(*record.exc_info)).rstrip())
            )  # handlers take it as it is
        return record


@dataclass(frozen=True)
class Secrets:
    """What this process knows as secrets, for a look through many texts."""

    names: Mapping[str, str]
    """Every way in which one may be written -> the variable or file that holds it."""

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        """The longest first, whatever the case: escapes are written in both."""
        longest = sorted(self.names, key=len, reverse=True)
        return re.compile("|".join(map(_alone, longest)), re.IGNORECASE) if longest else None

    @cached_property
    def _small(self) -> Mapping[str, str]:
        return {secret.lower(): name for secret, name in self.names.items()}

    def _name(self, found: re.Match[str]) -> str:
        return self._small.get(found[0].lower(), "redacted")

    def cleaned(self, text: str) -> str:
        """A text without them, and without what has the form of a secret."""
        for _ in range(_ROUNDS):
            before = text
            if self._pattern is not None:
                text = self._pattern.sub(lambda found: f"[{self._name(found)}]", text)
            text = without_forms(text)
            if text == before:
                break
        return text

    def taken_out_of(self, value: T) -> T:
        """A value of JSON with all its texts cleaned."""
        return _walked(value, self)  # type: ignore[return-value]

    def source_in(self, text: str) -> str | None:
        """Where the first of them that a text holds is from; None where it holds none."""
        return next(
            (
                source
                for secret, source in self.names.items()
                if secret in text
                and (len(secret) >= MIN_CHARS or re.search(_alone(secret), text) is not None)
            ),
            None,
        )

    def kind_of(self, text: str) -> str | None:
        """What in a text is a secret, in words."""
        if self._pattern is not None and (found := self._pattern.search(text)):
            return f"the value of {self._name(found)} in this environment"
        return form_in(text)


def _alone(secret: str) -> str:
    """A pattern of a secret; a short one only where no letter or digit stands beside it."""
    plain = re.escape(secret)
    return plain if len(secret) >= MIN_CHARS else rf"(?<![A-Za-z0-9]){plain}(?![A-Za-z0-9])"


def _walked(value: object, secrets: Secrets) -> object:
    if isinstance(value, str):
        return secrets.cleaned(value)
    if isinstance(value, Mapping):
        found: dict[object, object] = {}
        for key, inner in value.items():
            name = secrets.cleaned(key) if isinstance(key, str) else key
            while name in found:
                name = f"{name}+"  # two secrets as keys: neither value is lost
            is_secret = any(_is_named_secret(one, inner) for one in dict.fromkeys((key, name)))
            found[name] = GONE if is_secret else _walked(inner, secrets)
        return found
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_walked(inner, secrets) for inner in value]
    return value


def _is_named_secret(key: object, value: object) -> bool:
    """Whether a value is a secret by its key alone, as in `{"api_key": "..."}`."""
    if not isinstance(key, str) or not isinstance(value, str):
        return False
    return form_in(f"{key}: {value}") is not None and not (form_in(value) or form_in(key))


def _found(value: object, place: str, secrets: Secrets) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        if what := secrets.kind_of(value):
            yield place, what
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            name = secrets.cleaned(str(key))
            way = f"{place}.{name}" if place else name
            if what := secrets.kind_of(str(key)):
                yield f"a key of {place}" if place else "a key", what
            if _is_named_secret(key, inner):
                yield way, "the value of a key"
            else:
                yield from _found(inner, way, secrets)
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            yield from _found(inner, f"{place}[{number}]", secrets)


def known_secrets() -> Secrets:
    """Those of this process's environment as it is now: files are read, so take them once for many
    texts.
    """
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    kept = _text_of(os.environ.get("HF_TOKEN_PATH") or f"{home}/token").strip()
    told = [pair for pair in os.environ.items() if "://" in pair[1] or _is_secret(pair[0])]
    files = [_text_of(value) if _is_path(value) else None for _, value in told]
    return _written(tuple(told), tuple(files), kept)


@lru_cache(maxsize=1024)
def _is_secret(name: str) -> bool:
    return bool(_NAME.search(name)) and not _NO_SECRET.search(name)


@lru_cache(maxsize=4)
def _written(
    told: tuple[tuple[str, str], ...], files: tuple[str | None, ...], kept: str
) -> Secrets:
    """The secrets of these variables, the texts of the files that they name, and the token of a
    login, in every way in which they may be written.
    """
    found: dict[str, str] = {}
    for (name, value), text in zip(told, files, strict=True):
        secrets = [*(_values(value, text) if _is_secret(name) else ())]
        for secret in (*secrets, *_URL_PASSWORD.findall(value)):
            small = secret.strip().lower()
            if small not in _SETTINGS and small not in name.lower():
                found = dict.fromkeys(_ways(secret), name) | found
    return Secrets(dict.fromkeys(_ways(kept), "HF_TOKEN") | found)


def _values(value: str, text: str | None) -> Iterator[str]:
    """The secrets in the value of a variable: itself and its parts, or those of the text of the
    file that it names.
    """
    try:
        parts = json.loads(value if text is None else text)
    except ValueError:
        parts = None
    if isinstance(parts, dict):
        yield from (
            part for key, part in parts.items() if isinstance(part, str) and not _PUBLIC.search(key)
        )
    elif text is not None:
        yield text
    if text is None:
        yield value
        yield from (part for key, part in _PAIR.findall(value) if _is_secret(_split_words(key)))


def _split_words(key: str) -> str:
    """`AccountKey` -> `Account_Key`."""
    return "SAS" if key == "sig" else re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key)


def _ways(secret: str) -> set[str]:
    """How a secret may stand in a text: as it is and by its lines, quoted as in a URL, in JSON, in
    HTML, in Python, and within base64, as the header of basic credentials has it.
    """
    secret = secret.strip()
    found = {secret, *(line for line in secret.splitlines() if _LINE.fullmatch(line.strip()))}
    plain, raw = json.dumps(secret)[1:-1], secret.encode("utf-8", "surrogateescape")
    found |= {quote(raw, safe=""), quote(raw), quote_plus(raw)}
    found |= {html.escape(secret), html.escape(secret).replace("+", "&#43;")}
    found |= {plain, plain.replace("/", "\\/"), repr(secret)[1:-1]}
    for before in range(3) if len(raw) >= 12 else ():
        # Base64 takes three bytes at a time: its first signs depend on what stands in front.
        text = base64.b64encode(b"\0" * before + raw).decode()
        core = text[-(-before * 8 // 6) : (before + len(raw)) * 8 // 6]
        found |= {core, core.replace("+", "-").replace("/", "_")}
    return {written for written in found if len(written) >= MIN_CHARS or _SHORT.fullmatch(written)}


def _is_path(value: str) -> bool:
    """Whether a value names a file, folder or socket that is there."""
    try:
        return value.startswith(("/", "~", ".")) and Path(value).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, no home
        return False


def _text_of(path: str) -> str:
    try:
        place = Path(path).expanduser()
        if not place.is_file():  # a pipe would be emptied by a look
            return ""
        with place.open(encoding="utf-8") as file:
            return file.read(_MAX_FILE)
    except (OSError, ValueError, RuntimeError):  # no such file, or no path at all
        return ""
