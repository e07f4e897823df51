"""Identity of results: canonical JSON, digests, hashes of files, and the lock that checks that code
changes come with a new VERSION.
"""

from ftsec_ray.identity.canonical import (
    DIGEST_CHARS,
    FORMAT_VERSION,
    canonical,
    digest,
    digest_text,
    unit_interval,
)
from ftsec_ray.identity.content import content_hash, sha256

__all__ = [
    "DIGEST_CHARS",
    "FORMAT_VERSION",
    "canonical",
    "content_hash",
    "digest",
    "digest_text",
    "sha256",
    "unit_interval",
]
