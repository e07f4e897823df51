"""URIs of stores: which filesystem serves one, and that none carries a secret.

Credentials come from the environment, as the client libraries read it (`AWS_ACCESS_KEY_ID`,
`AWS_PROFILE`, instance roles, `GOOGLE_APPLICATION_CREDENTIALS`, ...). A URI is written into logs,
messages and the settings of workers, so one that holds a password or a key is refused, and shown
without it.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

from ftsec_ray.errors import StoreError

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

OBJECT_STORES = ("s3", "gcs", "abfs")
"""Names of filesystems without folders and renames, where an object appears whole or not at all."""
_PLAIN_KEYS = frozenset(
    {
        "region",
        "endpoint_override",
        "scheme",
        "allow_bucket_creation",
        "tls_ca_file_path",
        "anonymous",
        "project_id",
        "retry_limit_seconds",
        "default_bucket_location",
    }
)
_S3_KEYS = ("region", "endpoint_override", "scheme", "allow_bucket_creation", "tls_ca_file_path")
"""What the query of an s3:// URI may set."""
_S3_REQUEST_S, _S3_CONNECT_S = 60, 10
_BUCKET = re.compile(r"(anonymous@)?[A-Za-z0-9][A-Za-z0-9._-]*")


def redacted_uri(uri: str) -> str:
    """A URI without user, password and all values of its query that are not known to be
    harmless.
    """
    head, _, query = uri.partition("?")
    head = re.sub(r"(?s)^([a-z0-9+.-]*://).*@", r"\1***@", head, flags=re.IGNORECASE)
    if not query:
        return head
    parts = (part.partition("=") for part in query.split("&"))
    return f"{head}?" + "&".join(
        f"{key}={value}" if key in _PLAIN_KEYS and "@" not in value else f"{key}=***"
        for key, _, value in parts
    )


def checked_uri(uri: str) -> str:
    """The URI itself; StoreError when it carries what may be a secret."""
    head, _, query = uri.partition("?")
    scheme, _, rest = head.partition("://")
    place = rest.split("/", 1)[0]
    odd = [
        key
        for key, value in parse_qsl(query, keep_blank_values=True)
        if key not in _PLAIN_KEYS or "@" in value
    ]
    has_user = "@" in rest and not rest.startswith("anonymous@")
    if scheme in ("abfs", "abfss"):  # container@account: a name, unless a key follows it
        has_user = ":" in place.rpartition("@")[0]
    elif scheme in ("s3", "gs", "gcs"):
        has_user = has_user or not _BUCKET.fullmatch(place)
    if has_user or odd:
        what = (
            f"query keys that are not known: {', '.join(odd)}"
            if odd and not has_user
            else "a place that is no bucket, or has a user in front"
        )
        raise StoreError(
            f"a store URI with {what}",
            redacted_uri(uri),
            "scheme://bucket/prefix, with " + " | ".join(sorted(_PLAIN_KEYS)),
            "give credentials in the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE,"
            " GOOGLE_APPLICATION_CREDENTIALS), never in the URI",
        )
    return uri


def filesystem_of(uri: str) -> tuple[FileSystem, str]:
    """The filesystem that serves a URI and the root within it; StoreError when there is none."""
    import pyarrow as pa
    from pyarrow.fs import FileSystem

    checked_uri(uri)
    try:
        filesystem, root = FileSystem.from_uri(uri)
        return (
            _patient_s3(uri, filesystem.region) if filesystem.type_name == "s3" else filesystem
        ), root
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StoreError(
            f"no filesystem for this store: {error}",
            redacted_uri(uri),
            "a local path, s3://, gs:// or hdfs://",
            "an S3 service of your own: AWS_ENDPOINT_URL, or"
            " ?endpoint_override=HOST:PORT&scheme=http",
        ) from error


def _patient_s3(uri: str, region: str) -> FileSystem:
    """S3 as the URI says, small objects in one request, and with the tries left to `retry.py`.

    The default gives a server three seconds and then asks up to thirty times, without a limit that
    can be set in a URI.
    """
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    query = dict(parse_qsl(urlsplit(uri).query))
    odd = sorted(set(query) - set(_S3_KEYS))
    if odd:
        raise ValueError(f"unexpected in the query of an S3 URI: {', '.join(odd)}")
    given = {
        key: value == "true" if value in ("true", "false") else value
        for key, value in query.items()
        if key != "region"
    }
    address = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if (
        address and "endpoint_override" not in given
    ):  # a filesystem made of arguments does not look there
        scheme, _, host = address.rpartition("://")
        given |= {"endpoint_override": host.rstrip("/"), "scheme": scheme or "https"}
    return S3FileSystem(
        region=region,
        request_timeout=_S3_REQUEST_S,
        connect_timeout=_S3_CONNECT_S,
        allow_delayed_open=True,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=1),
        **given,
    )
