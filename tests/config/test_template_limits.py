"""Chat templates that would not end, or take the memory of the machine."""

from __future__ import annotations

import json
import subprocess

import pytest

from ftsec_ray.config import template_limits
from ftsec_ray.config.template_entries import has_template
from ftsec_ray.config.template_limits import check_template
from ftsec_ray.errors import SpecError

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "variable"),
    [
        ("{{ 'x' * 10**10 }}", "BYTES"),
        ("{{ '%9999999999d' % 1 }}", "BYTES"),
        ("{% if messages|length > 60 %}{{ 'a'.ljust(10**10) }}{% endif %}a", "BYTES"),
        ("{{ 'x' * 5000000 }}", "CHARS"),
        (LOOP, "SECONDS"),
        ("{% if messages[0].content|length > 999 %}" + LOOP + "{% endif %}a", "SECONDS"),
        ("{% if 1 < messages[0].content|length < 20000 %}" + LOOP + "{% endif %}a", "SECONDS"),
    ],
)
def test_a_template_beyond_a_limit_is_refused_with_the_variable_that_raises_it(
    template, variable, monkeypatch
):
    monkeypatch.setenv("FTSEC_MAX_TEMPLATE_SECONDS", "1")
    with pytest.raises(SpecError, match="exceeds a limit") as caught:
        check_template(template)
    assert f"set the environment variable FTSEC_MAX_TEMPLATE_{variable}" in caught.value.fix


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}",
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{% for",
    ],
)
def test_a_template_that_renders_or_refuses_is_within_the_limits(template):
    check_template(template)


def test_the_process_of_a_template_gets_what_its_interpreter_needs_and_no_secret(monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/python/lib")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    seen: dict[str, str] = {}

    def run(command: list[str], **options):
        seen.update(options["env"])
        return subprocess.CompletedProcess(command, 0, json.dumps({"chars": 1}).encode(), b"")

    monkeypatch.setattr(template_limits.subprocess, "run", run)
    check_template("{{ messages }}, asked once")
    assert seen["LD_LIBRARY_PATH"] == "/opt/python/lib"
    assert "HF_TOKEN" not in seen


def test_a_hostile_tokenizer_config_does_not_end_the_look_for_a_template(tmp_path):
    config = tmp_path / "tokenizer_config.json"
    config.write_text("[" * 200_000)
    assert has_template(tmp_path), "it cannot be told"
    with config.open("w") as file:
        file.truncate(20 * 2**30)  # of nothing
    assert has_template(tmp_path)
    config.write_text("{}")
    assert not has_template(tmp_path)
