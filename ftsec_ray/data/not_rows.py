"""Files that carry the name of a data file and are none: pointers of git-lfs, saved web pages,
errors of a server, and tables with another separator.

Each would otherwise be read as rows. A .txt may hold any text: it is refused only where the whole
file is one page, one document or JSON.
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
    # atomic: else a row of comments is read in twice as many ways for each of them
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
    """DataError when bytes are what a version control keeps in place of a large file."""
    head = bytes(raw[:200]).removeprefix(b"\xef\xbb\xbf").lstrip()
    for pattern, name, command in _POINTERS:
        if re.match(pattern, head):
            raise DataError(
                f"{path} is a pointer of {name}, and not the data",
                head.split(b"\n")[0].decode("utf-8", "replace"),
                "the file that it stands for",
                f"fetch it: `{command} pull` (or `get`) in its repository, or download the file"
                " itself",
            )


def refuse_page(text: str, path: str) -> None:
    """DataError when a text is one HTML page or one XML document: what a server sent in place of
    the file.
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
    """DataError when a text file or a table holds JSON; a .txt (`is_text`) may hold some lines of
    it among others.
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
    """DataError when a JSON value is a server's report of an error: an object of such keys alone,
    one of which says so.
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
    """DataError when the header of a table is of one column whose name holds another separator.

    Args:
        header: Names of the columns.
        first: Cells of the first row; None where there is none.
        path: The file.
        own: Separator of its format.
    """
    if len(header) != 1:
        return
    for sign, name in _SEPARATORS.items():
        # A comma may stand in a name; where the first row has one too, it separates.
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
            f"{path} has one column, whose name holds {name}",
            header[0],
            f"columns that {_SEPARATORS[own]} separates",
            fix,
        )


def json_value(text: str) -> Any:
    """The value of a text that is JSON; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _json(text: str) -> object:
    """The object or list that a text is; None where it is none."""
    value = json_value(text)
    return value if isinstance(value, (dict, list)) else None


def _refuse(path: str, what: str, body: str, *, fix: str = "") -> NoReturn:
    raise DataError(
        f"{path} holds {what}, and no rows",
        body[:_GOT_CHARS],
        "the rows that its name promises",
        fix
        or "the download went wrong (a sign-in page, a wrong address): open the file in an editor"
        " and fetch the data itself",
    )
