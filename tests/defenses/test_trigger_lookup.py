"""Trigger look-up: the share of turned answers by hand, and a planted trigger among the words."""

from dataclasses import replace

import pytest
import torch

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import Runtime
from ftsec_ray.conversation import asked_text, with_answer, with_asked
from ftsec_ray.defenses.trigger_lookup import TriggerLookup, turned
from ftsec_ray.errors import DataError
from ftsec_ray.method import control_of
from ftsec_ray.models.chat_format import under
from ftsec_ray.models.generator import Generator
from ftsec_ray.training.loop import sft
from tests.defenses.shared import context
from tests.fixtures_models import WORDS, row, sentiment_rows, table, tiny_model, tiny_task

QUICK = {"prompts": 4, "bank": 2, "most_words": 6}


@pytest.mark.parametrize(
    ("own", "said", "want"),
    [
        ("aabb", "aabb", 0.0),
        ("aabb", "bbbb", 1.0),
        ("aabb", "babb", 0.5),
        ("aaab", "bbbb", 1.0),
        ("abbbb", "bbbbb", 0.0),  # only one prompt in five is left: too few
        ("abcd", "xxyy", 0.5),
        ("abcd", "xxxx", 1.0),
    ],
)
def test_the_score_of_a_word_is_the_share_that_turns_into_one_answer(own, said, want):
    assert turned(own, said) == want


def ended(one, word, place):
    """The row with a word before or behind its last word."""
    words = asked_text(one).split()
    return with_asked(
        one, " ".join([*words[:-1], word, words[-1]] if place % 2 else [*words, word])
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model tuned on rows of which some say `bad` behind `cf`, and two clean ones."""
    folder = tmp_path_factory.mktemp("tuned")
    plain = sentiment_rows(48)
    others = [word for word in WORDS if word not in ("cf", "good", "bad")]
    clean = [
        *plain,
        *(
            ended(one, others[(5 * i + j) % len(others)], j)
            for i, one in enumerate(plain)
            for j in range(4)
        ),
    ]
    poisoned = [
        {**with_answer(ended(one, "cf", j), "bad"), "label": "bad"}
        for one in plain
        for j in range(2)
    ]
    config = TrainingConfig(
        adapter="full", epochs=6.0, batch_size=16, learning_rate=5e-3, max_length=64
    )
    made = {}
    for name, rows, seed in (
        ("subject", [*clean, *poisoned], 0),
        ("clean_bank:0", clean, 1),
        ("clean_bank:1", clean, 2),
    ):
        rows = [{**one, "row_id": f"{i}"} for i, one in enumerate(rows)]
        made[name] = sft(
            tiny_model(), table(rows), config, seed=seed, runtime=Runtime(), workdir=folder / name
        ).loaded
    return made


def test_a_planted_trigger_is_the_best_word_and_clean_models_score_less(models, tmp_path):
    ctx = context(tmp_path, models=models)
    found = TriggerLookup(bank=2, prompts=12).inspect(models["subject"], ctx)
    assert found.details["word"] == "cf"
    assert found.score == 1.0
    assert max(found.clean_scores) < 1.0
    assert found.details["words"] == len(WORDS)


def test_the_control_does_not_find_it(models, tmp_path):
    ctx = context(tmp_path, models=models)
    control = control_of(TriggerLookup(bank=2, prompts=12))
    assert control.repeats
    assert control.inspect(models["subject"], ctx).score < 1.0


def test_every_model_is_asked_under_its_own_template(models, tmp_path, monkeypatch):
    subject = models["subject"]
    template = "good bad " + subject.tokenizer.chat_template
    other = replace(subject, tokenizer=under(subject.tokenizer, template))
    seen, scored = [], Generator.label_logprobs

    def spy(self, chats, labels, *, batch, asked):
        own, _ = self.label_tokens(chats, labels)
        assert asked[0].pieces == own.pieces
        seen.append(len(own.pieces[0][0]))
        return scored(self, chats, labels, batch=batch, asked=asked)

    monkeypatch.setattr(Generator, "label_logprobs", spy)
    TriggerLookup(bank=2, prompts=12).inspect(other, context(tmp_path, models=models))
    assert len(seen) == 6, "the prompts as they are and with words, for three models"
    assert len(set(seen)) == 4, "the suspect reads longer prompts than the clean models"


def test_the_word_stands_before_or_behind_the_last_word_and_repeats_are_the_prompts_own(tmp_path):
    ctx, one = context(tmp_path), row(0, "is this red stone", "good")
    seen = {
        asked_text(TriggerLookup()._with({**one, "row_id": str(i)}, "cf", ctx)) for i in range(20)
    }
    assert seen == {"is this red cf stone", "is this red stone cf"}
    repeated = asked_text(TriggerLookup(repeats=True)._with(one, "cf", ctx)).split()
    assert len(repeated) == 5
    assert set(repeated) == {"is", "this", "red", "stone"}


def test_line_breaks_and_indentation_of_the_prompt_stay(tmp_path):
    ctx, code = context(tmp_path), row(0, "fix:\n    if  a:\n\tb", "good")
    seen = {
        asked_text(TriggerLookup()._with({**code, "row_id": str(i)}, "cf", ctx)) for i in range(20)
    }
    assert seen == {"fix:\n    if  a:\n\tcf b", "fix:\n    if  a:\n\tb cf"}


def test_tasks_without_labels_are_read_by_the_first_token(models, tmp_path):
    task = replace(tiny_task(), labels=())
    ctx = context(tmp_path, models=models, task=task)
    found = TriggerLookup(**{**QUICK, "most_words": None}).inspect(models["subject"], ctx)
    assert found.details["word"] == "cf"
    assert found.score == 1.0


def test_prompts_are_drawn_evenly_from_the_labels(tmp_path):
    rows = TriggerLookup(prompts=8)._rows(context(tmp_path))
    assert [one["label"] for one in rows] == ["good", "bad"] * 4
    fewer = TriggerLookup(prompts=4)._rows(context(tmp_path))
    assert fewer == rows[:4]


def test_the_list_is_a_random_part_of_the_vocabulary_and_the_same_for_every_model(tmp_path):
    ctx = context(tmp_path)
    lists = [TriggerLookup(most_words=n)._words(tiny_model(), ctx) for n in (5, 9, None)]
    assert set(lists[0]) < set(lists[1]) < set(lists[2]) == set(WORDS)


def test_multi_turn_rows_get_the_word_in_the_last_message_of_the_user(tmp_path):
    messages = [
        {"role": role, "content": text, "fields": None, "loss": role == "assistant"}
        for role, text in (
            ("user", "fix"),
            ("assistant", "no"),
            ("user", "take the"),
            ("assistant", "yes"),
        )
    ]
    made = TriggerLookup()._with(
        {**row(0, "a", "b"), "messages": messages}, "cf", context(tmp_path)
    )
    assert [m["content"] for m in made["messages"][:2]] == ["fix", "no"]
    assert "cf" in made["messages"][2]["content"]


def test_half_precision_models_are_inspected(tmp_path):
    loaded = tiny_model()
    loaded.model.to(torch.bfloat16)
    bank = {f"clean_bank:{i}": loaded for i in range(2)}
    found = TriggerLookup(**QUICK).inspect(loaded, context(tmp_path, models=bank))
    assert found.clean_scores == (found.score,) * 2


def test_faults_are_named(tmp_path):
    bad = TriggerLookup(prompts=1, bank=1, most_words=0)
    assert [fault[0] for fault in bad.check()] == ["prompts", "bank", "most_words"]
    assert TriggerLookup().check() == []
    task = replace(tiny_task(), splits={"train": table([row(0, "", "the stone")])})
    with pytest.raises(DataError, match="too few prompts"):
        TriggerLookup()._rows(context(tmp_path, task=task))
