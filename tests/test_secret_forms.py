"""What has the form of a secret is taken out, row by row, and what only looks long is not."""

from __future__ import annotations

import re

import pytest

from ftsec_ray.redact import redacted, secrets_in, without_secrets
from ftsec_ray.secret_forms import FORMS, HINTS, form_in

A, D = "aB3dE5gH1j", "0123456789"
HEX = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b"
AWS = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
KEPT: dict[str, tuple[str, ...]] = {
    "private key": (
        f"-----BEGIN RSA PRIVATE KEY-----\n{A}\n-----END RSA PRIVATE KEY-----",
        f"-----BEGIN OPENSSH PRIVATE KEY-----\n{A}\n",
        f"-----BEGIN PRIVATE KEY-----\\n{A}\\n-----END PRIVATE KEY-----\\n",
        f"-----BEGIN PGP PRIVATE KEY BLOCK-----\n\n{A}\n-----END PGP PRIVATE KEY BLOCK-----",
    ),
    "Hugging Face token": (f"hf_{A * 3}abcd", f"xhf_{A * 4}", f"api_org_{A * 3}", f"hf_{A * 2}"),
    "GitHub or GitLab token": (
        *(f"gh{kind}_{A * 4}" for kind in "pousr"),
        f"github_pat_{A}_{A * 3}",
        f"glpat-{A * 2}",
        f"glptt-{A * 4}",
    ),
    "OpenAI or Anthropic key": (f"sk-{A * 4}", f"sk-proj-{A}_{A}-{A}", f"sk-ant-api03-{A}-{A}"),
    "key of a model service": (
        *(f"gsk_{A * 5}", f"r8_{A * 3}abcdefg", f"nvapi-{A * 5}", f"pplx-{A * 4}", f"xai-{A * 8}"),
        *(f"wandb_v1_{A * 4}", f"dapi{HEX[:32]}", f"lsv2_pt_{HEX[:32]}_{HEX[:10]}"),
    ),
    "AWS secret key": (
        f"AKIAABCDEFGHIJKLMNOP, {AWS}",
        f'"ASIAABCDEFGHIJKLMNOP", "secret": "{AWS}"',
    ),
    "AWS key id": ("AKIAABCDEFGHIJKLMNOP", "ASIA0123456789ABCDEF", "ABIAABCDEFGHIJKLMNOP"),
    "Google key": (f"AIza{A * 3}abcde", f"ya29.{A * 3}", f"GOCSPX-{A * 3}"),
    "Slack token": (f"xoxb-{D}-{A}", f"xoxe.xoxp-1-{A}", f"xapp-1-{A}-{D}", f"xoxc-{D}"),
    "webhook": (
        f"https://hooks.slack.com/services/T0/B0/{A}",
        f"https://discord.com/api/webhooks/{D}/{A * 4}",
    ),
    "JSON web token": (
        f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.{A}",
        "eyJhbGciOiJub25lIn0.eyJzdWIiOjF9.",
    ),
    "token of a package index": (f"npm_{A * 3}abcdef", f"pypi-AgEIcHlwaS5vcmc{A * 3}"),
    "key of a web service": (
        *(f"SG.{A * 2}.{A * 4}", f"sk_live_{A * 3}", f"rk_test_{A * 3}", f"sq0csp-{A * 4}"),
        *(f"SK{HEX[:32]}", f"{D}:AA{A * 3}abc", f"{HEX[:32]}-us12", f"hvs.{A * 3}"),
        *(f"dop_v1_{(HEX * 2)[:64]}", f"shpat_{HEX[:32]}", f"key-{HEX[:32]}"),
        f"AGE-SECRET-KEY-1{'QPZRY9X8GF' * 6}",
        f"MTk4NjIyNDgzNDcxOTI1MjQ4.Cl2FMQ.{A * 2}abcdefg",
    ),
    "password in a URL": (
        *("http://u:p@ss@word12@h/x", "http://u:pa/ss@w/ord12@h:1", "redis://:redispass12@h"),
        *("postgres://u:p%40ss%2Fw@h/d", "http://u:pass word12@h", "s3://AK:a/b+c@bucket/key"),
        *("https://u:p@h.example", "mongodb+srv://u:a#b?c@h/d", "http://u:12345@h"),
    ),
    "user in a URL": (f"https://{A}@github.com/o/r", "s3://KEYKEYKEY@bucket/x"),
    "password before a host": (
        "u:hostpass12@127.0.0.1:9000",
        "u:hostpass12@localhost",
        "me:secret7@db.example:5432",
    ),
    "signature or key in a URL": (
        *(f"https://h/x?{name}=abcd1234&a=1" for name in ("token", "sig", "pass", "pwd")),
        *(f"https://h/x?{name}=abcd1234abcd1234&a=1" for name in ("key", "auth")),
        *(f"/c?a=1&{name}=abcd%3D1234" for name in ("api-key", "client_secret", "Signature")),
        *(f"b?{name}=AK%2F2" for name in ("X-Amz-Credential", "AWSAccessKeyId", "GoogleAccessId")),
        *(
            "h/x#access_token=abcd1234",
            "?sv=1&amp;sig=abcd1234",
            "?a=1\\u0026X-Amz-Signature=abcd1",
        ),
    ),
    "signature of a request": (f"AWS4-HMAC-SHA256 SignedHeaders=host, Signature={(HEX * 2)[:64]}",),
    "Authorization header": (
        *("Authorization: token keykeykey12", '"authorization": "ApiKey a.bcdefgh12"'),
        "Authorization=keykeykey12",
    ),
    "bearer token": ("Bearer keykeykey12", "bearer abcdefghij.k1m", "BEARER aBcDeFgHiJ"),
    "basic credentials": ("Basic dXNlcjpwYXNzd29yZA==",),
    "value of a key": (
        *(
            "password=keykeykey12",
            "passwd: keykeykey12",
            '{"token": "keykeykey12"}',
            "pwd=keykey12",
        ),
        *(f"aws_secret_access_key = {AWS}", f"WANDB_API_KEY={HEX}", "x-api-key: keykeykey12"),
        *(
            "AccountKey=keykeykey12==;",
            '\\"access_token\\": \\"keykeykey12\\"',
            "api_key=>keykeykey12",
        ),
        *("{'client_secret': 'keykeykey12'}", "SharedAccessSignature=keykeykey12"),
    ),
}
"""Kind -> texts that hold one."""


def test_every_row_of_the_table_has_texts_here():
    assert list(KEPT) == [form.name for form in FORMS]


@pytest.mark.parametrize("name", KEPT)
def test_a_secret_of_each_kind_is_gone_wherever_it_stands(name):
    for text in KEPT[name]:
        for whole in (text, f"it said {text}\nand ended", f"'{text}'", f"[{text}]", f"é {text}"):
            clean = redacted(whole)
            assert "redacted" in clean, whole
            assert not re.search(
                r"aB3dE5|keykeykey|9f86d081|KEYKEY|ss[@/]\W?w|pass12|wJalr|abcd1234", clean
            ), clean
            assert redacted(clean) == clean, "what is clean stays as it is"
            assert re.search(HINTS, whole, re.IGNORECASE), "or a table would be passed over"


@pytest.mark.parametrize("name", KEPT)
def test_each_row_is_the_one_that_takes_its_texts(name):
    form = next(one for one in FORMS if one.name == name)
    for text in KEPT[name]:
        assert form.pattern.search(text), text
        assert form_in(text)


@pytest.mark.parametrize(
    "text",
    [
        *(HEX, (HEX * 2)[:64], HEX[:32], f"sha256:{(HEX * 2)[:64]}", f"org/model@{HEX}"),
        *(f"https://huggingface.co/org/model/resolve/{HEX}/model.safetensors", f"commit {HEX}"),
        *(
            f'{{"template_hash": "{HEX[:16]}", "plan": "{HEX[:32]}"}}',
            f"docker.io/a/b:1.2@sha256:{HEX}",
        ),
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg",
        *(
            "meta-llama/Llama-3.1-8B-Instruct",
            "Qwen/Qwen2.5-0.5B",
            "ladder:0.2m",
            "task-force-of-the-long-kebab",
        ),
        *("sk-learn-contrib-imbalanced-learn", "hf_transfer", "half_precision_weights_of_a_model"),
        *("max_tokens=4096", "?max_tokens=4096&page=2", '"tokens": 1234567890', "eos_token: </s>"),
        *("pad_token='<|endoftext|>'", "trigger_token: zx9qv12345", "the key is in the drawer"),
        *("password: correct horse battery staple", "password = get_password()", "api_key=None"),
        *(
            "Basic understanding of input/output",
            "Bearer certificates.",
            "authorization: required documents",
        ),
        *(
            "http://127.0.0.1:8265/x@y",
            "https://h:443/a@b",
            "https://registry/@scope/pkg",
            "ssh://git@h/x",
        ),
        *(
            "s3://bucket/a/b?region=eu-west-1",
            "gs://anonymous@bucket/x",
            "abfss://c@acct.dfs.core.windows.net/x",
        ),
        *("mail bob@example.com", "a:b@c", "2024-05-06T17:46:00", "C:\\Users\\me", "10:20:30 @ 5"),
        *("secret: true", "secrets", "token", "a token: the cheapest one", "passphrase: null"),
        "sig=0.05 and key=value; auth=none",
        *("password = hashlib.sha256(pw.encode())", "secret_key = secrets.token_hex(32)"),
        *("Basic JavaScript", "AUTHORIZATION: PolicyBased", "Bearer authentication.Then"),
        *("wasbs://container@host.blob/x", "https://example.com?mail=me@x.org"),
        *("https://h?a=b:c@x.org", "https://h/?key=12345", "https://h/?a=1&auth=basic"),
        "-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----",
        "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----",
    ],
)
def test_digests_commits_names_base64_and_prose_stay(text):
    assert redacted(text) == text
    assert secrets_in({"a": [text]}) == []


@pytest.mark.parametrize(
    "part",
    [
        *(
            "eyJ-",
            "-----BEGIN PRIVATE KEY-----",
            "-----BEGIN PRIVATE KEY----- a-",
            "a://b:",
            "a://",
        ),
        *("sk-", "password: a", "&token=", "x:", "Authorization: aa  ", "http://u:p a b ", "key_"),
        *("AWS4-HMAC-SHA256 ", "_", "glab-", "SG.a"),
    ],
)
def test_a_text_made_to_take_long_does_not(part):
    assert isinstance(redacted(part * (100_000 // len(part))), str)


def test_the_keys_of_mappings_are_cleaned_and_no_value_is_lost():
    one, two = f"hf_{A * 3}", f"hf_{A * 4}"
    assert without_secrets({one: 1, two: {"b": (two,)}}) == {
        "[redacted]": 1,
        "[redacted]+": {"b": ["[redacted]"]},
    }
    assert without_secrets({"api_key": "keykeykey12", "tokens": 7, "token": None}) == {
        "api_key": "[redacted]",
        "tokens": 7,
        "token": None,
    }


def test_what_was_cleaned_once_holds_no_secret():
    for key in (f"?key=SK{HEX[:32]}", "http://u:p@h:1:Authorization key", "b?AWSAccessKeyId=AK12"):
        assert secrets_in(without_secrets({key: "x1y2z3w4"})) == []


def test_a_secret_is_told_by_its_place_and_not_by_itself(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "plantedvalue77")
    value = {
        "question": "it is plantedvalue77",
        "attacks": [{"badnets": {"trigger": f"hf_{A * 3}"}}],
    }
    assert secrets_in(
        {**value, "training": {"password": "keykeykey12"}, f"hf_{A * 3}": {"x": 1}}
    ) == [
        ("question", "the value of MY_API_KEY in this environment"),
        ("attacks[0].badnets.trigger", "Hugging Face token"),
        ("training.password", "the value of a key"),
        ("a key", "Hugging Face token"),
    ]
