r"""The forms of secrets of well-known services, as a table: one row per kind, with the text that
replaces it.

No row matches a digest, a commit, a base64 file or the name of a model: a value without a prefix of
its own counts only after a name that says what it is. No pattern can run long: each repetition is
bounded, or ends at a character that its own beginning contains.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

GONE = "[redacted]"


@dataclass(frozen=True)
class Form:
    """One kind of secret."""

    name: str
    """Name of the kind in warnings."""
    pattern: re.Pattern[str]
    instead: str = GONE
    r"""Replacement text; `\1` and `\2` are the text kept around the secret."""
    words: tuple[str, ...] = ()
    """Each text with such a secret contains one of these, in lower case; empty if not known."""
    hint: re.Pattern[str] | None = None
    """Matches each text with such a secret, and is faster than the pattern."""

    def taken_out_of(self, text: str, small: str) -> str:
        """A text without secrets of this kind; `small` is the text in lower case."""
        if self.words and not any(word in small for word in self.words):
            return text
        if self.hint is not None and self.hint.search(text) is None:
            return text
        return self.pattern.sub(self.instead, text)


def _form(
    name: str,
    pattern: str,
    instead: str = GONE,
    *,
    words: tuple[str, ...] = (),
    hint: str | None = None,
) -> Form:
    return Form(name, re.compile(pattern), instead, words, re.compile(hint) if hint else None)


_START = r"(?<![A-Za-z0-9])"
_MIXED = r"(?=[a-z_-]{0,40}[A-Z0-9])"
"""Not only lower-case letters, as in names in kebab case."""
_KEY_NAME = (
    r"(?:pass(?:word|wd|phrase)|secret|credentials?|(?:api|access|private|account|encryption|signing"
    r"|license|master|service|secret|wandb|comet|openai|anthropic|google|gemini|azure|hf|face|ray)"
    r"[-_ ]?key|shared[-_ ]?access[-_ ]?signature|(?<![a-z])pwd"
    r"|(?:(?:access|auth|api|bearer|refresh|session|security|hf|hub|bot|user|github|gitlab)[-_ ]?"
    r"|(?<![a-z_-]))token)"
)
_QUERY_NAME = (
    r"(?:[\w.%-]{0,40}(?:token(?!s)|secret|signature|passw(?:or)?d|pwd|credential|access_?(?:key|id)"
    r"|api[-_]?key)[\w-]{0,20}|sig|pass)"
)
_QUERY_VALUE = r"[^&\s'\"<>\[\\#;]"
_RANDOM = r"(?=[\w.~+/:-]{0,200}\d|(?:[\w.~+/:-]{0,40}?[a-z][A-Z]){4})"
"""A digit, or more changes of case than a name in camel case has."""
_VALUE_START = r"(?::|=>?)\s{0,4}\\?[\"']?"
_VALUE = r"(?=[^\s\"'\\]{0,200}\d)(?!\[|https?:)[^\s\"'\\&,;<>(){}\[\]]{8,}"
_NO_CALL = r"(?:(?<=[\"'])|(?![A-Za-z_][\w.]{0,100}\())"

FORMS = (
    _form(
        "private key",
        r"-----BEGIN ([A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?)-----"
        r"(?:(?:[^-]++|-(?!----))*+-----END \1-----|(?:[A-Za-z0-9+/=\s:]|\\[nr])*+)",
    ),
    _form(
        "Hugging Face token",
        rf"{_START}hf_[A-Za-z0-9]{{16,}}|hf_[A-Za-z0-9]{{30,}}|{_START}api_org_[A-Za-z0-9]{{30,}}",
        words=("hf_", "api_org_"),
    ),
    _form(
        "GitHub or GitLab token",
        rf"{_START}(?:gh[pousr]_[A-Za-z0-9]{{20,}}|github_pat_\w{{20,}}|gl[a-z]{{2,5}}-[\w-]{{20,}})",
    ),
    _form("OpenAI or Anthropic key", rf"{_START}sk-{_MIXED}[A-Za-z0-9_-]{{20,}}"),
    _form(
        "key of a model service",
        rf"{_START}(?:gsk_[A-Za-z0-9]{{40,}}|r8_[A-Za-z0-9]{{30,}}|nvapi-[\w-]{{40,}}"
        r"|pplx-[A-Za-z0-9]{40,}|xai-[A-Za-z0-9]{40,}|tgp_v1_[\w-]{30,}|lsv2_[a-z]{2}_[0-9a-f_]{32,}"
        r"|wandb_v1_\w{30,}|dapi[0-9a-f]{32}(?:-\d)?(?![0-9a-f]))",
    ),
    _form(
        "AWS secret key",
        r"(?<![A-Za-z0-9])((?:AKIA|ASIA)[A-Z0-9]{16}[\s\"',:;=\\]{1,12}(?:[A-Za-z_]{3,40}"
        r"[\s\"',:;=\\]{1,12})?)(?![0-9a-f]{40})[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+=])",
        rf"\1{GONE}",
    ),
    _form(
        "AWS key id", rf"{_START}(?:AKIA|ASIA|ABIA|ACCA|A3T[A-Z0-9])[A-Z0-9]{{16}}(?![A-Za-z0-9])"
    ),
    _form(
        "Google key",
        rf"{_START}(?:AIza[\w-]{{35}}|ya29\.[\w.-]{{20,}}|GOCSPX-[\w-]{{20,}}|1//0[\w-]{{30,}})",
    ),
    _form(
        "Slack token",
        rf"{_START}(?:xox[abceoprs](?:\.xox[a-z])?-[\w-]{{10,}}|xapp-[\w-]{{10,}})",
    ),
    _form(
        "webhook",
        r"(hooks\.slack\.com/(?:services|workflows)/|discord(?:app)?\.com/api/webhooks/)[\w/-]{8,}",
        rf"\1{GONE}",
    ),
    _form(
        "JSON web token",
        r"(?<![\w-])eyJ[\w-]{8,}\.eyJ[\w-]{4,}\.[\w-]*",
        words=("eyj",),
    ),
    _form(
        "token of a package index",
        rf"{_START}(?:npm_[A-Za-z0-9]{{36}}|pypi-{_MIXED}[\w-]{{40,}})",
    ),
    _form(
        "key of a web service",
        rf"{_START}(?:SG\.[\w-]{{16,}}\.[\w-]{{16,}}|(?:sk|rk)_(?:live|test)_[0-9A-Za-z]{{16,}}"
        r"|sq0[a-z]{3}-[\w-]{20,}|SK[0-9a-f]{32}(?![0-9a-f])|\d{8,10}:AA[\w-]{33}"
        r"|[MNO][\w-]{23,25}\.[\w-]{6}\.[\w-]{27,38}|shp[a-z]{2}_[0-9a-fA-F]{32}"
        r"|do[opr]_v1_[0-9a-f]{64}|[0-9a-f]{32}-us\d{1,2}\b|hv[sbr]\.[\w-]{20,}"
        r"|AGE-SECRET-KEY-1[A-Z0-9]{50,}|key-[0-9a-f]{32}(?![0-9a-f]))",
    ),
    _form(
        "password in a URL",
        r"([A-Za-z][A-Za-z0-9+.-]{0,30}://)[^\s/@:'\"<>\[?#]{0,100}:(?!\d{1,5}(?:[/?#\s]|$))"
        r"(?:[^\s'\"<>]{0,200}|[^\s@'\"<>]{1,60}(?: (?!\S{0,60}://)[^\s@'\"<>]{1,60}){1,2})@(?=[\w.\[-])",
        rf"\1{GONE}@",
        words=("://",),
    ),
    _form(
        "user in a URL",
        r"([A-Za-z][A-Za-z0-9+.-]{0,30}://)(?<!abfs://)(?<!abfss://)(?<!wasb://)(?<!wasbs://)"
        r"(?!anonymous@|git@)[^\s/@'\"<>\[\]?#]{1,200}@",
        rf"\1{GONE}@",
        words=("://",),
    ),
    _form(
        "password before a host",
        r"(?<![\w/.-])([\w.-]{1,40}:)[^\s/@'\"<>\[\]]{6,100}"
        r"@(?=(?:\d{1,3}\.){3}\d|localhost\b|[\w.-]{1,80}:\d{2,5}\b)",
        rf"\1{GONE}@",
        words=("@",),
    ),
    _form(
        "signature or key in a URL",
        rf"(?i)((?:[?&#;]|\\u0026)(?:{_QUERY_NAME}=|(?:key|auth)=(?={_QUERY_VALUE}{{16}})))"
        rf"{_QUERY_VALUE}{{4,}}",
        rf"\1{GONE}",
        words=("=",),
    ),
    _form(
        "signature of a request",
        r"(AWS4-HMAC-SHA256[^\r\n'\"]{0,400}?Signature=)[0-9a-f]{8,}",
        rf"\1{GONE}",
    ),
    _form(
        "Authorization header",
        r"((?i:authorization)[\"']?\s{0,4}[:=]\s{0,4}[\"']?(?:[A-Za-z][A-Za-z0-9-]{1,30} {1,4})?)"
        rf"{_RANDOM}[\w.~+/=:-]{{8,}}",
        rf"\1{GONE}",
        words=("authorization",),
    ),
    _form(
        "bearer token",
        rf"((?i:\bBearer) {{1,4}}){_RANDOM}[\w.~+/=-]{{8,}}",
        rf"\1{GONE}",
        words=("bearer",),
    ),
    _form(
        "basic credentials",
        r"(\bBasic {1,4})(?=[A-Za-z0-9+/]{0,200}=|[A-Za-z+/]{0,200}\d[A-Za-z0-9+/]{0,200}[a-z][A-Z]"
        r"|[A-Za-z0-9+/]{0,200}[a-z][A-Z][A-Za-z0-9+/]{0,200}\d|(?:[A-Za-z+/]{0,40}?[a-z][A-Z]){4})"
        r"[A-Za-z0-9+/_-]{8,}={0,2}",
        rf"\1{GONE}",
        words=("basic ",),
    ),
    _form(
        "value of a key",
        rf"(?i)({_KEY_NAME}\\?[\"']?\s{{0,4}}{_VALUE_START}){_NO_CALL}"
        rf"(?=[^\s\"'\\]{{0,200}}[a-z]){_VALUE}",
        rf"\1{GONE}",
        words=("pass", "secret", "credential", "key", "signature", "pwd", "token"),
        hint=_VALUE_START + _VALUE,
    ),
)
"""In this order: a row may leave text that a later row would remove, but never the reverse."""


HINTS = (
    r"://|@|-----BEGIN|hf_|api_org_|gh[pousr]_|github_pat_|gl[a-z]+-|sk-|gsk_|r8_|nvapi-|pplx-|xai-"
    r"|tgp_v1|lsv2_|wandb_v1|dapi|AKIA|ASIA|ABIA|ACCA|A3T|AIza|ya29|GOCSPX|1//0|xox|xapp-"
    r"|hooks\.slack|webhooks|eyJ|npm_|pypi-|SG\.|[sr]k_(live|test)|sq0|SK[0-9a-f]{32}|:AA|\.[\w-]{6}\."
    r"|shp[a-z]{2}_|_v1_|-us\d|hv[sbr]\.|AGE-SECRET|key-[0-9a-f]{32}|[?&#;][\w.%-]+=|u0026"
    r"|AWS4-HMAC|authorization|bearer|basic |(pass|secret|credential|key|signature|pwd|token)[\w-]*"
    r"[\\\"']*\s*[:=]"
)
"""Matches each text with one of the forms, also in the syntax of RE2: a fast first check of many
texts.
"""


def without_forms(text: str) -> str:
    """A text without anything that has one of the forms."""
    small = text.casefold()
    for form in FORMS:
        text = form.taken_out_of(text, small)
    return text


def form_in(text: str) -> str | None:
    """The name of the first form that matches a text; None if none does."""
    small = text.casefold()
    return next((form.name for form in FORMS if form.taken_out_of(text, small) != text), None)
