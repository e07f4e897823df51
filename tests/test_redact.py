"""Texts without secrets: those of the environment, of credential files, and whatever has the form
of a token.
"""

from __future__ import annotations

import io
import json
import logging

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


@pytest.mark.parametrize(
    "text",
    [
        "hf_abcdefghijklmnopqrstuv",
        "ghp_abcdefghijklmnopqrstuv",
        "AKIAABCDEFGHIJKLMNOP",
        "s3://me:abcdefgh@bucket/x",
        "Authorization: Bearer abcdefghij.klm",
        "https://h/x?X-Amz-Signature=abcdefgh&a=1",
        "https://h/x?a=1&token=abcdefgh",
    ],
)
def test_what_has_the_form_of_a_token_is_taken_out_wherever_it_comes_from(text):
    assert "abcdefgh" not in redacted(text)
    assert "ABCDEFGH" not in redacted(text)


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
