"""URIs of stores: opens their filesystem, and refuses URIs with secrets.

Credentials come from the environment, where the client libraries read them (`AWS_ACCESS_KEY_ID`,
`AWS_PROFILE`, instance roles, `GOOGLE_APPLICATION_CREDENTIALS`, ...). A URI appears in logs,
messages and the settings of workers. So a URI with a password or a key is refused, and messages
show it redacted.
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
"""pyarrow's names of object storage: no folders, no renames, and atomic writes of objects."""
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
"""Allowed keys in the query of an s3:// URI."""
_S3_REQUEST_S, _S3_CONNECT_S = 60, 10
_BUCKET = re.compile(r"(anonymous@)?[A-Za-z0-9][A-Za-z0-9._-]*")


def redacted_uri(uri: str) -> str:
    """A URI without user, password, and values of its query that may be secrets."""
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
    """The URI itself; StoreError if it may contain a secret."""
    head, _, query = uri.partition("?")
    scheme, _, rest = head.partition("://")
    place = rest.split("/", 1)[0]
    odd = [
        key
        for key, value in parse_qsl(query, keep_blank_values=True)
        if key not in _PLAIN_KEYS or "@" in value
    ]
    has_user = "@" in rest and not rest.startswith("anonymous@")
    if scheme in ("abfs", "abfss"):  # container@account is allowed, container:key@account is not
        has_user = ":" in place.rpartition("@")[0]
    elif scheme in ("s3", "gs", "gcs"):
        has_user = has_user or not _BUCKET.fullmatch(place)
    if has_user or odd:
        what = (
            f"unknown query keys: {', '.join(odd)}"
            if odd and not has_user
            else "a user name, or an invalid bucket name"
        )
        raise StoreError(
            f"the store URI contains {what}",
            redacted_uri(uri),
            "scheme://bucket/prefix, with the query keys " + " | ".join(sorted(_PLAIN_KEYS)),
            "set credentials in the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE,"
            " GOOGLE_APPLICATION_CREDENTIALS), never in the URI",
        )
    return uri


def filesystem_of(uri: str) -> tuple[FileSystem, str]:
    """The filesystem of a URI, and the root path in it; StoreError if the URI is not supported."""
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
            f"cannot open this store: {error}",
            redacted_uri(uri),
            "a local path, s3://, gs:// or hdfs://",
            "check the URI; for a self-hosted S3 service, set AWS_ENDPOINT_URL or add"
            " ?endpoint_override=HOST:PORT&scheme=http",
        ) from error


def _patient_s3(uri: str, region: str) -> FileSystem:
    """The S3 filesystem of a URI, with longer timeouts, single-request uploads of small objects,
    and without its own retries, since `retry.py` retries.

    By default, pyarrow waits three seconds for a response and retries up to thirty times; a URI
    cannot change this.
    """
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    query = dict(parse_qsl(urlsplit(uri).query))
    odd = sorted(set(query) - set(_S3_KEYS))
    if odd:
        raise ValueError(f"unknown keys in the query of an S3 URI: {', '.join(odd)}")
    given = {
        key: value == "true" if value in ("true", "false") else value
        for key, value in query.items()
        if key != "region"
    }
    address = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    # S3FileSystem does not read these environment variables itself.
    if address and "endpoint_override" not in given:
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
