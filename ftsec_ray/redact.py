"""Removes secrets from texts: an error may quote a URL, a header or a setting, and is stored in
records and reports.

A secret is the value of an environment variable whose name says so (`HF_TOKEN`,
`AWS_SECRET_ACCESS_KEY`), the password in the URL of any variable, a text in the credentials file
that `GOOGLE_APPLICATION_CREDENTIALS` names, the token that `huggingface-cli login` stores, and
anything with the form of a token of a well-known service or at the place of a password or signature
in a URL (`secret_forms`). The input of a digest is never redacted, only what is written.
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
"""Shorter values are settings: removing them would destroy ordinary words."""
_SHORT = re.compile(r"(?=.*\d)(?=.*[A-Za-z])\S{6,7}")
"""Exception to MIN_CHARS: these are no words; they count only where they stand alone, and not
within a digest.
"""
_SETTINGS = frozenset(
    {
        *("password", "passphrase", "postgres", "postgresql", "username", "disabled", "required"),
        *("optional", "undefined", "redacted", "anonymous", "placeholder"),
        *("changeme", "change-me", "change_me"),
    }
)
"""Values that are placeholders of a secret, or say how one is used."""
_ROUNDS = 4
"""Maximum number of passes over a text until it no longer changes."""
_MAX_FILE = 1 << 16
"""Maximum number of bytes read from a file that a variable names."""
_LINE = re.compile(r"[\w+/=.~-]{20,}")
"""A line of a multi-line secret that is a secret itself."""
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
"""Names of settings about secrets, of folders, and of the public key in Python images."""
_URL_PASSWORD = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s/@:]*:(?!\d{1,5}(?:[/?#]|$))(\S+)@")
_PAIR = re.compile(r"(?:^|[?&;])([\w-]+)=([^&;]+)")
_PUBLIC = re.compile(r"(^type|uri|url|domain|email|project_id|client_id)$|^auth_")
"""Keys of a credentials file that are not secret."""


def redacted(text: str) -> str:
    """A text without the secrets of this process's environment and without anything that has the
    form of a secret.
    """
    return known_secrets().cleaned(text)


def environment_secret_in(text: str) -> str | None:
    """The variable or file of this process's environment whose secret is in a text."""
    return known_secrets().source_in(text)


def without_secrets(value: T) -> T:
    """A JSON value with all its texts redacted, including its keys."""
    return known_secrets().taken_out_of(value)


def secrets_in(value: object) -> list[tuple[str, str]]:
    """(place, what it looks like) of every text in a JSON value that holds a secret; the place is
    the path of keys and indices, redacted itself.
    """
    return list(_found(value, "", known_secrets()))


def clean_logs() -> None:
    """Redact every log record of this process from now on, from any library, and make it safe for a
    terminal: libraries log the URLs that they request.
    """
    before = logging.getLogRecordFactory()
    if isinstance(before, _CleanRecords):
        return
    logging.setLogRecordFactory(_CleanRecords(before))


class _CleanRecords:
    """Creates log records without secrets."""

    def __init__(self, make: Callable[..., logging.LogRecord]) -> None:
        self._make = make

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self._make(*args, **kwargs)
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # wrong arguments: logging reports them itself
            return record
        cleaned = for_terminal(redacted(message))
        if cleaned != message:
            record.msg, record.args = cleaned, ()
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = for_terminal(
                redacted("".join(traceback.format_exception(*record.exc_info)).rstrip())
            )  # handlers use it unchanged
        return record


@dataclass(frozen=True)
class Secrets:
    """The secrets that this process knows, for checking many texts."""

    names: Mapping[str, str]
    """Every written form of a secret -> the variable or file that holds it."""

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        """The longest first, ignoring case, because escapes are written in both cases."""
        longest = sorted(self.names, key=len, reverse=True)
        return re.compile("|".join(map(_alone, longest)), re.IGNORECASE) if longest else None

    @cached_property
    def _small(self) -> Mapping[str, str]:
        return {secret.lower(): name for secret, name in self.names.items()}

    def _name(self, match: re.Match[str]) -> str:
        return self._small.get(match[0].lower(), "redacted")

    def cleaned(self, text: str) -> str:
        """A text without the secrets, and without anything that has the form of one."""
        for _ in range(_ROUNDS):
            before = text
            if self._pattern is not None:
                text = self._pattern.sub(lambda match: f"[{self._name(match)}]", text)
            text = without_forms(text)
            if text == before:
                break
        return text

    def taken_out_of(self, value: T) -> T:
        """A JSON value with all its texts cleaned."""
        return _walked(value, self)  # type: ignore[return-value]

    def source_in(self, text: str) -> str | None:
        """The variable or file of the first secret in a text; None if there is none."""
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
        """What kind of secret a text holds, in words."""
        if self._pattern is not None and (match := self._pattern.search(text)):
            return f"the value of {self._name(match)} in this environment"
        return form_in(text)


def _alone(secret: str) -> str:
    """A pattern for a secret; a short secret must not touch another letter or digit."""
    plain = re.escape(secret)
    return plain if len(secret) >= MIN_CHARS else rf"(?<![A-Za-z0-9]){plain}(?![A-Za-z0-9])"


def _walked(value: object, secrets: Secrets) -> object:
    if isinstance(value, str):
        return secrets.cleaned(value)
    if isinstance(value, Mapping):
        cleaned: dict[object, object] = {}
        for key, inner in value.items():
            name = secrets.cleaned(key) if isinstance(key, str) else key
            while name in cleaned:
                name = f"{name}+"  # two secrets as keys: neither value is lost
            is_secret = any(_is_named_secret(form, inner) for form in dict.fromkeys((key, name)))
            cleaned[name] = GONE if is_secret else _walked(inner, secrets)
        return cleaned
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
    """The secrets of this process's current environment. Reads files, so call it once for many
    texts.
    """
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    kept = _text_of(os.environ.get("HF_TOKEN_PATH") or f"{home}/token").strip()
    variables = [pair for pair in os.environ.items() if "://" in pair[1] or _is_secret(pair[0])]
    files = [_text_of(value) if _is_path(value) else None for _, value in variables]
    return _written(tuple(variables), tuple(files), kept)


@lru_cache(maxsize=1024)
def _is_secret(name: str) -> bool:
    return bool(_NAME.search(name)) and not _NO_SECRET.search(name)


@lru_cache(maxsize=4)
def _written(
    variables: tuple[tuple[str, str], ...], files: tuple[str | None, ...], kept: str
) -> Secrets:
    """The secrets of these variables, of the files that they name, and of a login token, in every
    form in which they may be written.
    """
    forms: dict[str, str] = {}
    for (name, value), text in zip(variables, files, strict=True):
        secrets = [*(_values(value, text) if _is_secret(name) else ())]
        for secret in (*secrets, *_URL_PASSWORD.findall(value)):
            small = secret.strip().lower()
            if small not in _SETTINGS and small not in name.lower():
                forms = dict.fromkeys(_ways(secret), name) | forms
    return Secrets(dict.fromkeys(_ways(kept), "HF_TOKEN") | forms)


def _values(value: str, text: str | None) -> Iterator[str]:
    """The secrets in the value of a variable: the value and its parts, or those in the file that it
    names.
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
    """The forms in which a secret may be written: as it is and by its lines, quoted as in a URL, in
    JSON, in HTML, in Python, and within base64, as in the header of basic credentials.
    """
    secret = secret.strip()
    forms = {secret, *(line for line in secret.splitlines() if _LINE.fullmatch(line.strip()))}
    plain, raw = json.dumps(secret)[1:-1], secret.encode("utf-8", "surrogateescape")
    forms |= {quote(raw, safe=""), quote(raw), quote_plus(raw)}
    forms |= {html.escape(secret), html.escape(secret).replace("+", "&#43;")}
    forms |= {plain, plain.replace("/", "\\/"), repr(secret)[1:-1]}
    for before in range(3) if len(raw) >= 12 else ():
        # Base64 encodes three bytes at a time: its first characters depend on the bytes before.
        text = base64.b64encode(b"\0" * before + raw).decode()
        core = text[-(-before * 8 // 6) : (before + len(raw)) * 8 // 6]
        forms |= {core, core.replace("+", "-").replace("/", "_")}
    return {written for written in forms if len(written) >= MIN_CHARS or _SHORT.fullmatch(written)}


def _is_path(value: str) -> bool:
    """Whether a value names an existing file, folder or socket."""
    try:
        return value.startswith(("/", "~", ".")) and Path(value).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, no home
        return False


def _text_of(path: str) -> str:
    try:
        place = Path(path).expanduser()
        if not place.is_file():  # reading a pipe would empty it
            return ""
        with place.open(encoding="utf-8") as file:
            return file.read(_MAX_FILE)
    except (OSError, ValueError, RuntimeError):  # no such file, or no path at all
        return ""
