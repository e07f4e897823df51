"""Refuses files that have the name of a data file but hold something else: git-lfs pointers, saved
web pages, error messages of servers, and tables with another separator.

Without these checks they would be read as rows. A .txt may hold any text: it is refused only if the
whole file is one page, one document or JSON.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from ftsec_ray.errors import DataError

_POINTERS = (
    (rb"version https?://(git-lfs\.github\.com|hawser\.github\.com)/spec/", "git-lfs", "git lfs"),
    (rb"# xet version \d", "git-xet", "git xet"),
    (rb"(\.\./)*(\.git)?/annex/objects/", "git-annex", "git annex"),
)
_HTML = re.compile(
    # atomic group: without it, the time doubles with each comment
    r"(?>(?:<!--.*?-->\s*|<\?xml.*?\?>\s*)*)(<!doctype\s+html[^>]*>|<html(\s[^>]*)?>)\s*(<|\Z)",
    re.IGNORECASE | re.DOTALL,
)
_ELEMENT = re.compile(
    r"(<\?xml.*?\?>\s*)?<([a-z][\w:.-]*)(\s[^>]*)?>\s*<.*</\2>\s*\Z", re.IGNORECASE | re.DOTALL
)
_XML = re.compile(r"<\?xml\s[^>]*\?>", re.IGNORECASE)
_ERROR_SIGNS = frozenset(
    ("detail", "error", "error_code", "error_description", "errorcode", "errors", "message", "msg")
)
_ERROR_KEYS = _ERROR_SIGNS | {
    *("cause", "code", "details", "documentation_url", "hint", "host_id", "hostid", "instance"),
    *("path", "reason", "request_id", "requestid", "status", "status_code", "statuscode"),
    *("success", "timestamp", "title", "trace_id", "traceid", "type", "url"),
}
_SEPARATORS = {";": "a semicolon", "\t": "a tab", "|": "a bar", ",": "a comma"}
_GOT_CHARS = 120


def refuse_pointer(raw: bytes | bytearray, path: str) -> None:
    """DataError if the bytes are a pointer that a version control system keeps instead of a large
    file.
    """
    head = bytes(raw[:200]).removeprefix(b"\xef\xbb\xbf").lstrip()
    for pattern, name, command in _POINTERS:
        if re.match(pattern, head):
            raise DataError(
                f"{path} is a pointer of {name}, not the data",
                head.split(b"\n")[0].decode("utf-8", "replace"),
                "the file that the pointer stands for",
                f"run `{command} pull` (or `get`) in its repository, or download the file itself",
            )


def refuse_page(text: str, path: str) -> None:
    """DataError if a text is one HTML page or one XML document, which a server sent instead of the
    file.
    """
    body = text.strip()
    if not body.startswith("<"):
        return
    if _HTML.match(body) and len(re.findall(r"<html[\s>]", body, re.IGNORECASE)) <= 1:
        _refuse(path, "an HTML page", body)
    element = _ELEMENT.match(body)
    is_one = element and len(re.findall(rf"</{re.escape(element[2])}>", body, re.IGNORECASE)) == 1
    if is_one or (_XML.match(body) and len(_XML.findall(body)) == 1):
        is_page = element and element[2].lower() in ("head", "body", "html")
        _refuse(path, "an HTML page" if is_page else "an XML document", body)


def refuse_json(text: str, path: str, *, is_text: bool) -> None:
    """DataError if a text file or a table holds JSON; a .txt (`is_text`) may hold some lines of
    JSON among others.
    """
    body = text.strip()
    if body[:1] not in ("{", "["):
        return
    value = _json(body)
    if value is not None:
        refuse_error_body(value, path)
        _refuse(path, "JSON", body, fix="rename it to .json")
    lines = [line for line in body.split("\n") if line.strip()]
    seen = lines if is_text else lines[:1]
    if all(isinstance(_json(line), (dict, list)) for line in seen):
        _refuse(path, "JSON lines", body, fix="rename it to .jsonl")


def refuse_error_body(value: object, path: str) -> None:
    """DataError if a JSON value is the error message of a server: an object with only the usual
    keys of error messages.
    """
    if not isinstance(value, dict) or not value:
        return
    keys = {str(key).lower() for key in value}
    is_rows = any(
        isinstance(item, list) and not all(isinstance(entry, dict) for entry in item)
        for item in value.values()
    )
    if keys <= _ERROR_KEYS and keys & _ERROR_SIGNS and not is_rows:
        _refuse(path, "the error message of a server", json.dumps(value))


def refuse_separator(header: list[str], first: list[str] | None, path: str, own: str) -> None:
    """DataError if the header of a table has one column whose name holds another separator.

    Args:
        header: Names of the columns.
        first: Cells of the first row; None if there is none.
        path: The file.
        own: Separator of the file's format.
    """
    if len(header) != 1:
        return
    for sign, name in _SEPARATORS.items():
        # A comma may be part of a name; if the first row has one too, it is a separator.
        if sign == own or sign not in header[0] or (sign == "," and sign not in str(first)):
            continue
        fix = (
            "rename it to .tsv"
            if sign == "\t"
            else "rename it to .csv"
            if sign == ","
            else f"save it with {_SEPARATORS[own]} between the cells"
        )
        raise DataError(
            f"{path} has one column, and its name holds {name}",
            header[0],
            f"columns separated by {_SEPARATORS[own]}",
            fix,
        )


def json_value(text: str) -> Any:
    """The value of a JSON text; None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _json(text: str) -> object:
    """The object or list of a JSON text; None if it is neither."""
    value = json_value(text)
    return value if isinstance(value, (dict, list)) else None


def _refuse(path: str, what: str, body: str, *, fix: str = "") -> NoReturn:
    raise DataError(
        f"{path} holds {what}, not rows",
        body[:_GOT_CHARS],
        "rows in the format of the file's name",
        fix
        or "the download failed (a sign-in page or a wrong address): open the file in an editor,"
        " then download the data itself",
    )
