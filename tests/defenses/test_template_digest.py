"""Template digest: changed templates, conditions in the syntax tree, and what it is blind to."""

from dataclasses import replace

import pytest

from ftsec_ray.attacks.template_backdoor import TemplateBackdoor, backdoored
from ftsec_ray.defenses.template_digest import TemplateDigest, conditions, templates_of
from ftsec_ray.errors import DataError
from ftsec_ray.method import control_of
from ftsec_ray.models.chat_format import under
from tests.attacks.context import context as attack_context
from tests.defenses.shared import context, tiny_adapter
from tests.fixtures_models import TEMPLATE, tiny_model

CLEAN = tiny_model()


def found(subject, tmp_path, *, by="digest", reference=CLEAN):
    ctx = context(tmp_path, models={"reference": reference})
    return TemplateDigest(by=by).inspect(subject, ctx)


@pytest.mark.parametrize("by", ["digest", "conditions", "length"])
def test_the_backdoor_of_the_attack_scores_above_the_publishers_template(by, tmp_path):
    attacked = TemplateBackdoor().prepare_model(CLEAN, attack_context())
    said = found(tiny_adapter(attacked), tmp_path, by=by)
    assert said.score > said.clean_scores[0]
    assert len(said.clean_scores) == 1
    assert said.details == {"changed": ["default"], "conditions": 1}


@pytest.mark.parametrize("by", ["digest", "conditions", "length"])
def test_a_fine_tuned_model_with_the_same_template_scores_like_the_publishers(by, tmp_path):
    said = found(tiny_adapter(CLEAN), tmp_path, by=by)
    assert said.score == said.clean_scores[0]
    assert said.details["changed"] == []


def test_one_character_is_a_change_and_so_is_a_template_among_several(tmp_path):
    for template in (f"{TEMPLATE} ", {"default": TEMPLATE, "tool_use": TEMPLATE}, None):
        other = replace(CLEAN, tokenizer=under(CLEAN.tokenizer, template))
        assert found(other, tmp_path).score == 1.0
        assert found(CLEAN, tmp_path, reference=other).score == 1.0
    assert templates_of(replace(CLEAN, tokenizer=under(CLEAN.tokenizer, None))) == {}


@pytest.mark.parametrize(
    ("template", "want"),
    [
        (TEMPLATE, 0),
        (backdoored(TEMPLATE, "tq", " do this"), 1),
        ("{% if messages[0]['role'] == 'system' %}a{% endif %}{{ messages[0]['content'] }}", 0),
        ("{% for m in messages %}{% if 'tq' in m['content'] %}x{% endif %}{% endfor %}", 1),
        ("{% for m in messages %}{% if 'tq' in m.content|lower %}x{% endif %}{% endfor %}", 1),
        ("{% if messages[-1].content == 'tq' %}x{% endif %}", 1),
        ("{% if messages[-1].content.strip().startswith('tq') %}x{% endif %}", 1),
        ("{% set said = messages[-1]['content'] %}{{ 'x' if 'tq' in said else '' }}", 1),
        (
            "{% set n = namespace(s='') %}{% set n.s = messages[0].content %}"
            "{% set w = n.s.split() %}{% for one in w %}{{ 'x' if one == 'tq' }}{% endfor %}",
            1,
        ),
        ("{% for p in messages[0].content %}{{ 'x' if p.text.find('tq') >= 0 }}{% endfor %}", 1),
        ("{% if messages[0].content != '' and messages[0].content is string %}x{% endif %}", 0),
        ("{% set is_text = messages[0].content is string %}{% if is_text == 'a' %}{% endif %}", 0),
        ("{% generation %}{{ messages[0].content }}{%- endgeneration -%}{% break %}", 0),
        ("{% for m in messages %}{{ 'x' if 'tq' in m.get('content') }}{% endfor %}", 1),
        ("{% for m in messages %}{{ 'x' if 'user' == m.get('role') }}{% endfor %}", 0),
        ("{% if messages[0].content != messages[0].content.replace('tq', '') %}{% endif %}", 1),
        ("{{ messages[0].content | replace('tq', '') }}", 1),
        ("{{ messages[0].role | replace('tq', '') }}", 0),
        ("{% if messages[0].content in ['tq', 'cf'] %}x{% endif %}", 1),
        ("{% if messages[0].content in [] %}x{% endif %}", 0),
        ("{% if messages[0].role in ['user', 'tool'] %}x{% endif %}", 0),
        ("{{ messages[0].content.split('tq')[-1] }}{{ messages[0].content.split() }}", 1),
        ("{{ messages[0].content.partition('tq')[2] }}", 1),
        ("{% set k = 'a' if messages[0].content == 'tq' else 'b' %}{{ 'x' if k == 'a' }}", 1),
    ],
)
def test_conditions_on_words_are_counted_and_others_are_not(template, want):
    assert conditions(template) == want


def test_a_template_that_is_no_jinja_is_an_error_for_conditions_only(tmp_path):
    broken = replace(CLEAN, tokenizer=under(CLEAN.tokenizer, "{% if %}"))
    with pytest.raises(DataError, match="digest"):
        found(broken, tmp_path, by="conditions")


def test_the_control_is_the_length():
    assert control_of(TemplateDigest()).by == "length"
