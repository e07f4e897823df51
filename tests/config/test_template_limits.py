"""Chat templates that would not end, or take the memory of the machine."""

from __future__ import annotations

import pytest

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
    ],
)
def test_a_template_beyond_a_limit_is_refused_with_the_variable_that_raises_it(
    template, variable, monkeypatch
):
    monkeypatch.setenv("FTSEC_MAX_TEMPLATE_SECONDS", "1")
    with pytest.raises(SpecError, match="takes too much to render") as caught:
        check_template(template)
    assert f"set FTSEC_MAX_TEMPLATE_{variable} in the environment" in caught.value.fix


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
