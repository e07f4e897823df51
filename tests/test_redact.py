"""Texts without secrets: those of the environment, of credential files, and whatever has the form
of a token.
"""

from __future__ import annotations

import base64
import io
import json
import logging
from urllib.parse import quote, quote_plus

import pytest

from ftsec_ray.redact import clean_logs, redacted, without_secrets

SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLE"


@pytest.mark.parametrize(
    "name",
    [
        "AWS_SECRET_ACCESS_KEY",
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "AWS_SESSION_TOKEN",
        "DB_PASSWORD",
        "OPENAI_API_KEY",
        "WANDB_API_KEY",
        "AZURE_STORAGE_ACCOUNT_KEY",
        *(
            "PGPASSWORD",
            "MYSQL_PWD",
            "DB_PASS",
            "SECRETKEY",
            "MYAPIKEY",
            "AUTHTOKEN",
            "CREDS",
            "JWT",
        ),
        *("NPM_CONFIG__AUTH", "AZURE_STORAGE_SAS", "SLACK_WEBHOOK", "SSH_PRIVATE", "KEY", "PASS"),
        *("TOKENS", "SECRETS", "GITHUB_PAT", "SIGNING_KEY", "RAY_AUTH_TOKEN", "PASSPHRASE"),
        "MY_CREDENTIAL",
        "my_secret",
    ],
)
def test_the_value_of_a_variable_whose_name_says_secret_is_replaced_by_the_name(monkeypatch, name):
    monkeypatch.setenv(name, SECRET)
    assert redacted(f"403 for key {SECRET}!") == f"403 for key [{name}]!"


def test_a_secret_is_found_quoted_as_in_a_url_and_as_in_json_too(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", 'a"b/c+d=e f-12345')
    for text in ("?t=a%22b%2Fc%2Bd%3De%20f-12345", json.dumps({"k": 'a"b/c+d=e f-12345'})):
        assert "12345" in text
        assert "12345" not in redacted(text)


def test_a_secret_is_found_in_every_way_that_it_may_be_written(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    for text in (
        quote(SECRET),
        quote(SECRET, safe=""),
        quote(SECRET, safe="").replace("%2F", "%2f"),
        quote_plus(SECRET),
        SECRET.upper(),
        repr(SECRET.encode()),
        SECRET.replace("/", "\\/"),
        SECRET.replace("+", "&#43;"),
        *(
            base64.b64encode(f"{before}:{SECRET}".encode()).decode()
            for before in ("u", "me", "you")
        ),
        *(base64.urlsafe_b64encode(f"{before}{SECRET};".encode()).decode() for before in ("", "a")),
    ):
        assert "[HF_TOKEN]" in redacted(f"got {text} there"), text


def test_the_password_in_the_url_and_the_key_in_the_connection_of_any_variable_are_secrets(
    monkeypatch,
):
    monkeypatch.setenv("DATABASE_URL", "postgres://u:dburlpass01@h/d")
    monkeypatch.setenv("HTTPS_PROXY", "http://u:proxy/pass@1@h:1")
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "AccountName=a;AccountKey=azurekey0001==")
    monkeypatch.setenv("AZURE_STORAGE_SAS", "?sv=1&sig=azuresigvalue")
    monkeypatch.setenv("CREDENTIALS", json.dumps({"token": "tokeninjson", "type": "atypeofthem"}))
    monkeypatch.setenv("SSH_KEY", "-----BEGIN X-----\nAAAABBBBCCCCDDDDEEEEFFFF\n-----END X-----")
    said = (
        "dburlpass01 proxy/pass@1 azurekey0001== azuresigvalue tokeninjson AAAABBBBCCCCDDDDEEEEFFFF"
    )
    assert redacted(said) == (
        "[DATABASE_URL] [HTTPS_PROXY] [AZURE_STORAGE_CONNECTION_STRING] [AZURE_STORAGE_SAS]"
        " [CREDENTIALS] [SSH_KEY]"
    )
    assert redacted("atypeofthem") == "atypeofthem"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("PWD", "/work/of/somebody"), ("OLDPWD", "/work/of/somebody"), ("MY_TOKEN", "1")),
        *(("SECRET", "true"), ("PASSWORD", "secret"), ("SSH_AUTH_SOCK", "/tmp/agent.12")),
        *(("GPG_KEY", "A035C8C19219BA821ECEA86B64E628F8D684696D"), ("RAY_AUTH_MODE", "disabled!")),
        *(("NV_CUDA_COMPAT_PACKAGE", "cuda-compat-12-2"), ("DB_PASSWORD", "postgres")),
        *(("DB_PASSWORD", "Changeme"), ("MONKEY", "bananas-1234"), ("RAY_AUTH", "disabled")),
        *(("MY_TOKEN", "/"), ("MY_TOKEN", ""), ("AUTH_TYPE", "kerberos")),
    ],
)
def test_short_values_folders_and_what_is_set_beside_a_secret_are_none(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert redacted(f"a {value} b") == f"a {value} b"


def test_a_short_value_is_a_secret_where_it_is_no_word(monkeypatch):
    monkeypatch.setenv("SHORT_TOKEN", "abc1234")
    assert redacted("got abc1234") == "got [SHORT_TOKEN]"


def test_ordinary_settings_stay(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallelism")
    monkeypatch.setenv("SHORT_TOKEN", "model")
    text = "the model at https://host.example/a?page=2 has parallelism, task-force and sk-learn"
    assert redacted(text) == text


def test_the_texts_of_a_credentials_file_are_secrets_and_its_path_is_none(monkeypatch, tmp_path):
    path = tmp_path / "google.json"
    path.write_text(
        json.dumps(
            {
                "type": "service_account",
                "private_key": (
                    "-----BEGIN PRIVATE KEY-----\nMIIEabcdefgh\n-----END PRIVATE KEY-----\n"
                ),
                "private_key_id": "0123456789abcdef",
                "client_email": "robot@project.example",
            }
        )
    )
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    text = redacted(
        f"key 0123456789abcdef of {path}: -----BEGIN PRIVATE KEY-----\nMIIEabcdefgh\n-----END"
        " PRIVATE KEY-----\n and " + path.read_text()
    )
    assert "0123456789abcdef" not in text
    assert "MIIEabcdefgh" not in text
    assert str(path) in text
    assert "service_account" in text


def test_the_token_that_a_login_has_kept_is_a_secret(monkeypatch, tmp_path):
    (tmp_path / "token").write_text("hub-token-of-a-login\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert redacted("Authorization: hub-token-of-a-login") == "Authorization: [HF_TOKEN]"


def test_all_texts_of_a_record_are_cleaned_and_nothing_else_changes(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    record = {
        "notes": {"url": f"x{SECRET}", "losses": [1.5, 2]},
        "inputs": [["model", "ab"]],
        "seed": None,
        "ok": True,
    }
    assert without_secrets(record) == {
        **record,
        "notes": {"url": "x[HF_TOKEN]", "losses": [1.5, 2]},
    }


def test_log_records_of_any_library_are_cleaned_with_their_tracebacks(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    before = logging.getLogRecordFactory()
    said = io.StringIO()
    logger = logging.getLogger("some.library")
    logger.addHandler(handler := logging.StreamHandler(said))
    try:
        clean_logs()
        clean_logs()
        logger.warning("asking %s for %d rows", f"https://h/{SECRET}", 7)
        logger.warning("a name: %s", "\x1b[2J\r\u202egone")
        try:
            raise ValueError(SECRET)
        except ValueError:
            logger.exception("it failed")
    finally:
        logging.setLogRecordFactory(before)
        logger.removeHandler(handler)
    assert SECRET not in said.getvalue()
    assert "asking https://h/[HF_TOKEN] for 7 rows" in said.getvalue()
    assert "ValueError: [HF_TOKEN]" in said.getvalue()
    assert "\\x1b[2J" in said.getvalue()
    assert "\x1b" not in said.getvalue()
