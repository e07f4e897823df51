"""Detects files with keys, tokens or passwords by their names or first bytes; such files are never
uploaded to a cluster.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from ftsec_ray.errors import SpecError

NAMES = (
    # private keys and key stores
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.pem", "*.key", "*.ppk", "*.p12"),
    *("*.pfx", "*.p8", "*.jks", "*.keystore", "*.kdbx", "*.gpg", "*.pgp", "*.asc", "*.ovpn"),
    *("secring.*", "*.age", "*.kdb", "wallet.dat", "authorized_keys", "known_hosts"),
    # files of programs that contain passwords and tokens
    *(".env", ".env.*", "*.env", "env.local", ".netrc", "_netrc", ".npmrc", ".pypirc"),
    *(".git-credentials", ".pgpass", "pgpass.conf", ".my.cnf", ".htpasswd", "*.htpasswd"),
    *(".dockercfg", ".boto", ".s3cfg", ".vault-token", "rclone.conf", "*.tfstate", "*.tfstate.*"),
    *("*.tfvars", "stored_tokens", "shadow", ".bash_history", ".zsh_history", ".python_history"),
    # credentials of clouds and of Hugging Face
    *("credentials", "credentials.*", "*credentials.json", "*_credentials.*", "client_secret*"),
    *("*service_account*.json", "*service-account*.json", "*serviceaccount*.json"),
    *("kubeconfig*", "*.kubeconfig", "accesskeys.csv", "*_accesskeys.csv", "azureprofile.json"),
    # names that people usually choose
    *("token", "token.txt", "token.json", "*.token", "*_token", "*_token.txt", "*-token.txt"),
    *("hf_token*", "api_key*", "apikey*", "*_api_key", "*_api_key.txt", "secret", "secret.*"),
    *("secrets", "secrets.*", "*.secret", "*.secrets", "*_secret.txt", "password", "password.*"),
    *("passwords", "passwords.*", "passwd"),
)
"""Patterns of names, in lower case."""
FOLDERS = frozenset(
    (
        *(".ssh", ".aws", ".azure", ".gnupg", ".kube", ".docker", ".git", ".hg", ".svn"),
        *(".huggingface", ".password-store", ".config", ".gsutil", ".terraform.d", ".cargo"),
        *(".sigstore", ".oci", ".databricks", ".kaggle", ".local"),
    )
)
"""Folders whose files all count as keys; gcloud and keyrings use two of them."""
_ROWS = re.compile(r"(.+)\.(jsonl|csv|tsv|parquet)(\.gz)?")
_NAMES_OF_ROWS = ("secret", "secrets", "password", "passwords", "credentials")
"""Names (before the suffix) that data files about such topics often have; they do not count as
keys.
"""
_KEY_TABLES = ("credentials.csv",)
"""Exception: the file in which AWS delivers keys."""
_MARKS = (
    *(b"PRIVATE KEY-----", b"PRIVATE KEY BLOCK-----", b"PuTTY-User-Key-File"),
    b"Access key ID,Secret access key",
)
_EXPORTED = re.compile(rb'\W*("?name"?,)?"?url"?,"?username"?,"?password"?\b')
"""First line of a password file exported by a browser."""
_LOOK_BYTES = 4096
_SHOWN = 3


def is_key_name(name: str) -> bool:
    """Whether a path, with `/` between its parts, is that of a file with keys, by its names."""
    parts = PurePosixPath(name.casefold()).parts
    if any(part in FOLDERS for part in parts[:-1]):
        return True
    rows = _ROWS.fullmatch(parts[-1])
    if rows is not None and rows[1] in _NAMES_OF_ROWS and parts[-1] not in _KEY_TABLES:
        return False
    return any(fnmatchcase(parts[-1], pattern) for pattern in NAMES)


def refuse_keys(files: Mapping[str, Path]) -> None:
    """Raise SpecError if one of the files seems to contain a key, a token or a password.

    Args:
        files: Path in the upload -> file; for a link, the name of its target is checked too.
    """
    keys = sorted(name for name, path in files.items() if _is_key(name, path))
    if keys:
        more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
        raise SpecError(
            "files that look like keys or passwords would be uploaded to the cluster",
            " | ".join(keys[:_SHOWN]) + more,
            "only the files of the sweep, its models and its rows",
            "move them out of the folder that the sweep names; if a file is not a key, rename it",
        )


def _is_key(name: str, path: Path) -> bool:
    if is_key_name(name) or is_key_name(path.resolve().name):
        return True
    with path.open("rb") as file:
        head = file.read(_LOOK_BYTES)
    return any(mark in head for mark in _MARKS) or _EXPORTED.match(head) is not None
