"""Chat templates of models in a sweep, and the models that one of them becomes."""

from __future__ import annotations

import json

import pytest

import ftsec_ray
from ftsec_ray.errors import SpecError
from ftsec_ray.plan.build import build_plan
from tests.fixtures_models import tiny_model
from tests.models.templates import CHATML


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model with a chat template, one without, and two templates as files."""
    folder = tmp_path_factory.mktemp("world")
    for name in ("chat", "bare"):
        loaded = tiny_model()
        loaded.tokenizer.chat_template = loaded.tokenizer.chat_template if name == "chat" else None
        loaded.model.save_pretrained(folder / name)
        loaded.tokenizer.save_pretrained(folder / name)
    (folder / "chatml.jinja").write_text(CHATML)
    (folder / "broken.jinja").write_text("{% for m in messages %}")
    rows = [{"prompt": "is this red", "response": "good", "label": "good"}]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def sweep(world, **model):
    source = {"path": str(world / "rows.json"), "prompt": "prompt", "response": "response"}
    return {
        "name": "templates",
        "models": [{"path": str(world / "chat"), "family": "tiny", "aligned": True, **model}],
        "task": {"kind": "rows", "splits": {"train": source, "benign_test": source}},
        "attacks": ["none"],
        "defenses": ["none"],
    }


def models(world, **model):
    return ftsec_ray.load(sweep(world, **model)).models


@pytest.mark.parametrize("form", ["text", "absolute"])
def test_a_template_is_a_text_or_a_file_and_changes_what_is_trained(world, form):
    given = CHATML if form == "text" else str(world / "chatml.jinja")
    (model,) = models(world, chat_template=given)
    assert model.chat_template == CHATML
    own, other = (
        build_plan(ftsec_ray.load(sweep(world, **keys))) for keys in ({}, {"chat_template": given})
    )
    assert not own.stages.keys() & {
        digest for digest, stage in other.stages.items() if stage.kind != "task"
    }


def test_an_aligned_model_without_a_template_is_a_fault_before_anything_runs(world):
    with pytest.raises(SpecError, match=r"(?s)aligned model without a chat template.*FILE"):
        models(world, path=str(world / "bare"))
    for keys in ({"aligned": False}, {"chat_template": CHATML}, {"align": True}):
        assert len(models(world, path=str(world / "bare"), **keys)) == 1


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ("broken.jinja", "not a valid Jinja|cannot read"),
        ("no_such_file.jinja", "cannot read"),
        ("{% for m in messages %}", "(?s)not a valid Jinja.*line 1"),
        (7, "not a chat template"),
        ("", "not a chat template"),
    ],
)
@pytest.mark.parametrize("key", ["chat_template", "serve_template"])
def test_what_is_no_template_is_told_with_its_place(world, given, match, key):
    with pytest.raises(SpecError, match=match) as fault:
        models(world, **{key: given})
    assert f"models[0].{key}" in str(fault.value)


def test_a_model_under_several_serve_templates_shares_all_stages_up_to_the_questions(world):
    given = sweep(world, serve_template={"own": "own", "chatml": str(world / "chatml.jinja")})
    spec = ftsec_ray.load(given)
    assert [(m.name, m.family) for m in spec.models] == [
        ("chat", "tiny"),
        ("chat:served-chatml", "tiny:served-chatml"),
    ]
    plan = build_plan(spec)
    kinds = sorted(stage.kind for stage in plan.stages.values())
    assert kinds.count("finetune") == kinds.count("source") == 1
    assert kinds.count("generate") == kinds.count("score") == 2
    assert len({cell.digest for cell in plan.cells}) == 2
    served = [stage.params.get("serve_template") for stage in plan.stages.values()]
    assert served.count(CHATML) == 1


def test_a_list_of_serve_templates_is_named_by_its_files(world):
    given = ["own", str(world / "chatml.jinja"), CHATML]
    names = [m.name for m in models(world, serve_template=given)]
    assert names == ["chat", "chat:served-chatml", "chat:served-text"]
    with pytest.raises(SpecError, match="same name"):
        models(world, serve_template=[CHATML, CHATML])


@pytest.mark.timeout(300)
def test_the_hashes_of_both_templates_stand_in_the_cells(world, tmp_path):
    results = ftsec_ray.run(
        {
            **sweep(world, serve_template=["own", str(world / "chatml.jinja")]),
            "training": {"epochs": 1, "batch_size": 4, "rank": 2},
            "evaluation": {"prompts": 2, "max_new_tokens": 4, "perplexity_rows": 0},
        },
        store=tmp_path / "store",
        results=tmp_path / "results",
        executor="local",
    )
    rows = results.cells.to_pylist()
    assert [row["status"] for row in rows] == ["done", "done"]
    trained, asked = (
        {row["model"]: row[name] for row in rows}
        for name in ("train_template_hash", "serve_template_hash")
    )
    assert len(set(trained.values())) == 1
    assert asked["chat"] == trained["chat"] != asked["chat:served-chatml"]
    said = {row["template_hash"] for row in results.generations.to_pylist()}
    assert said == set(asked.values())
