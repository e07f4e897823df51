"""A publisher's signature of an archive: Ed25519 over the bytes of its manifest, which holds the
checksum of every other file.

Keys are OpenSSH keys, which most people have (`~/.ssh/id_ed25519`); `cryptography` reads them and
signs. The signed bytes begin with a fixed line, so that a signature made for another purpose is not
valid for an archive.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ftsec_ray.errors import EnvironmentFault
from ftsec_ray.results.archive import Archive
from ftsec_ray.results.archive_limits import ArchiveError
from ftsec_ray.results.verify_findings import Findings

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

_PURPOSE = b"ftsec_ray archive, signature 1\n"
_MAX_KEY_BYTES = 1 << 16
_WANT_KEY = "an Ed25519 key in OpenSSH's format"
_MAKE_KEY = "make one without a passphrase: ssh-keygen -t ed25519 -N '' -f signing_key"


@dataclass(frozen=True, kw_only=True)
class Signature:
    """The signature file of an archive."""

    format: int
    key: str
    """Public key as OpenSSH writes it: `ssh-ed25519 AAAA...`."""
    signature: str
    """Base64."""


def signature_of(manifest: bytes, key: Path) -> bytes:
    """The signature of a manifest with the private key in a file; ArchiveError for a file without a
    usable private key.
    """
    _needs_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    try:
        private = load_ssh_private_key(_key_bytes(key), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as fault:
        is_locked = "password" in str(fault).lower() or "encrypt" in str(fault).lower()
        raise ArchiveError(
            f"{key} is encrypted" if is_locked else f"{key} is not a usable private key",
            str(fault)[:120],
            f"{_WANT_KEY}, without a passphrase",
            _MAKE_KEY,
        ) from fault
    if not isinstance(private, Ed25519PrivateKey):
        raise ArchiveError(
            f"{key} is not an Ed25519 key", type(private).__name__, _WANT_KEY, _MAKE_KEY
        )
    made = Signature(
        format=1,
        key=_openssh(private.public_key()),
        signature=base64.b64encode(private.sign(_PURPOSE + manifest)).decode(),
    )
    return (json.dumps(asdict(made), sort_keys=True, indent=1) + "\n").encode()


def look_at_signature(found: Findings, archive: Archive, signer: Path | None) -> str:
    """The signer of an archive, in words; a signature that is invalid, or not by a key in `signer`,
    is recorded as a difference.
    """
    allowed = None if signer is None else _public_keys(signer)
    if archive.signature is None:
        if signer is not None:
            found.add("signature", [f"there is none, but {signer} should have signed it"])
        found.unchecked.append("its publisher: it is not signed, so anybody can have made it")
        return "none"
    signature = _parsed(archive.signature)
    if signature is None:
        found.add("signature", ["it is not a signature written by `ftsec export --sign`"])
        return "damaged"
    try:
        _needs_cryptography()
    except EnvironmentFault as absent:
        found.unchecked.append(f"signature: {absent.what}; {absent.fix}")
        return "not checked"
    who = f"{signature.key.split()[0]} {fingerprint(signature.key)}"
    if not _holds(signature, archive.signed):
        found.add("signature", [f"the signature of {who} is not valid: the manifest was changed"])
        return f"broken, of {who}"
    if allowed is not None and signature.key not in allowed:
        found.add("signature", [f"it was made by {who}, whose key is not in {signer}"])
        return f"of {who}, who is not in {signer}"
    if allowed is None:
        found.unchecked.append(f"the owner of the key {who} (--signer FILE names the publishers)")
        return f"of {who}"
    found.checked.append(f"signed by {who}, who is in {signer}")
    return f"of {who}, who is in {signer}"


def fingerprint(key: str) -> str:
    """The SHA-256 of a public key in the format of `ssh-keygen -l`."""
    blob = base64.b64decode(key.split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def _holds(signature: Signature, manifest: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        _public(signature.key).verify(
            base64.b64decode(signature.signature, validate=True), _PURPOSE + manifest
        )
    except (InvalidSignature, ValueError):
        return False
    return True


def _parsed(content: bytes) -> Signature | None:
    from pydantic import TypeAdapter, ValidationError

    if len(content) > _MAX_KEY_BYTES:
        return None
    try:
        signature = TypeAdapter(Signature).validate_json(content)
        fingerprint(signature.key)
    except (ValidationError, ValueError, IndexError):
        return None
    is_known = (
        signature.format == 1
        and signature.key.startswith("ssh-ed25519 ")
        and signature.key.isprintable()
    )
    return signature if is_known else None


def _public_keys(file: Path) -> frozenset[str]:
    """The keys in a file, one per line, as in `id_ed25519.pub`, `authorized_keys` or
    https://github.com/<name>.keys; keys of other types are ignored, because they cannot sign here.
    """
    _needs_cryptography()
    lines = _key_bytes(file).decode(errors="replace").splitlines()
    keys = [line.split()[:2] for line in lines if line.startswith("ssh-ed25519 ")]
    try:
        public = frozenset(_openssh(_public(" ".join(key))) for key in keys)
    except ValueError as fault:
        raise ArchiveError(
            f"a public key in {file} cannot be read", str(fault)[:120], _WANT_KEY
        ) from fault
    if not public:
        kinds = sorted({line.split()[0][:40] for line in lines if line.strip()})[:4]
        raise ArchiveError(
            f"{file} has no public key of a type that signs archives",
            kinds,
            f"{_WANT_KEY}: lines that begin with `ssh-ed25519`",
            "use the publisher's .pub file; from a private key, ssh-keygen -y -f KEY prints it",
        )
    return public


def _public(key: str) -> Ed25519PublicKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key

    try:
        public = load_ssh_public_key(key.encode())
    except UnsupportedAlgorithm as fault:
        raise ValueError(str(fault)) from fault
    if not isinstance(public, Ed25519PublicKey):
        raise ValueError(f"a key of another type: {type(public).__name__}")  # noqa: TRY004
    return public


def _openssh(key: Ed25519PublicKey) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def _key_bytes(file: Path) -> bytes:
    if not file.is_file():
        raise ArchiveError("no such key file", str(file), _WANT_KEY, _MAKE_KEY)
    if file.stat().st_size > _MAX_KEY_BYTES:
        raise ArchiveError(
            "the key file is too large",
            f"{file.stat().st_size:,} bytes",
            f"at most {_MAX_KEY_BYTES:,} bytes: {_WANT_KEY}",
        )
    try:
        return file.read_bytes()
    except OSError as fault:
        raise ArchiveError(f"{file} cannot be read", str(fault), _WANT_KEY) from fault


def _needs_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as missing:
        raise EnvironmentFault(
            "signatures need the package `cryptography`",
            missing.name,
            "an installed cryptography",
            "pip install 'ftsec-ray[sign]'",
        ) from missing
