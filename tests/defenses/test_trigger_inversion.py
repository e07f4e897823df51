"""Trigger inversion: distributions and scans against single passes, and a planted answer."""

import math
from dataclasses import replace

import pytest
import torch

from ftsec_ray.config.sweep import TrainingConfig
from ftsec_ray.context import Runtime
from ftsec_ray.conversation import asked_text
from ftsec_ray.defenses.trigger_inversion import Reader, Text, TriggerInversion
from ftsec_ray.errors import DataError
from ftsec_ray.method import control_of
from ftsec_ray.models.generator import Generator
from ftsec_ray.training.loop import sft
from tests.defenses.decoding import CHATS, logits_after
from tests.defenses.shared import context
from tests.fixtures_models import row, sentiment_rows, table, tiny_model, tiny_task
from tests.numeric import assert_same, in_float64

QUICK = {"prompts": 3, "scan_prompts": 2, "bank": 2, "steps": 6, "first_tokens": 8}
TARGET = "take the red stone and lamp"


def model64():
    return in_float64(tiny_model(seed=3))


def prompts_of(model):
    return [head for head, _ in Generator(model).pieces_of(CHATS)]


def averaged(model, prompts, text):
    """(V,) mean probabilities of the next token from one pass for each prompt."""
    return torch.stack([logits_after(model, [*p, *text]).softmax(-1) for p in prompts]).mean(0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_distributions_are_averages_over_prompts_in_any_batch(batch):
    model = model64()
    prompts, texts = prompts_of(model), [[7, 8, 9], [], [11], [30, 2]]
    found = Reader(model, prompts, batch).following(texts, 3)
    for text, (entropy, tokens, chances) in zip(texts, found, strict=True):
        mean = averaged(model, prompts, text)
        assert_same(entropy, float(-(mean * mean.log()).sum()))
        assert tokens == sorted(range(37), key=lambda i, mean=mean: -float(mean[i]))[:3]
        assert_same(chances, [float(mean[i]) for i in tokens])


@pytest.mark.usefixtures("float64")
def test_the_quality_of_a_text_leaves_out_its_first_token_and_the_lowest():
    model = model64()
    prompts, text = prompts_of(model), [9, 10, 20, 12]
    chances = [float(averaged(model, prompts, text[:i])[text[i]]) for i in (1, 2, 3)]
    reader = Reader(model, prompts, 64)
    assert_same(reader.quality(text), (sum(chances) - min(chances)) / 2)
    assert_same(reader.quality(text[:2]), chances[0])


def words_of(model):
    """The tokens of the vocabulary that can begin a text."""
    marks = {i for text, i in model.tokenizer.get_vocab().items() if text.startswith("<")}
    return [i for i in range(37) if i not in marks]


def slow_scan(method, model, prompts, stops):
    """The scan of every first token by itself, one pass at a time."""
    kept = []
    for first in words_of(model):
        text, looked, alive = [first], False, True
        while (
            alive and len(text) <= method.scan_steps and not (len(text) > 1 and text[-1] in stops)
        ):
            mean = averaged(model, prompts, text)
            entropy = -sum(float(p) * math.log(float(p)) for p in mean)
            order = sorted(range(37), key=lambda i, mean=mean: -float(mean[i]))
            if entropy < method.certain or float(mean[order[0]]) > method.likely:
                text = [*text, order[0]]
            elif entropy <= method.uncertain and not looked:
                looked = True
                tried = order[: method.look_ahead]
                ahead = [float(averaged(model, prompts, [*text, i]).max()) for i in tried]
                text = [*text, tried[ahead.index(max(ahead))]]
            else:
                alive = False
        if alive:
            kept.append(text)
    return kept


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("certain", "uncertain", "likely"), [(2.2, 2.6, 0.3), (0.0, 2.9, 1.0), (0.0, 0.0, 0.25)]
)
def test_the_scan_keeps_the_texts_of_the_rule(certain, uncertain, likely):
    model = model64()
    prompts, stops = prompts_of(model)[:2], Generator(model).stops()
    method = TriggerInversion(certain=certain, uncertain=uncertain, likely=likely, scan_steps=3)
    reader = Reader(model, prompts, 16)
    found = method.grow(reader, method._firsts(reader), stops, method.scan_steps)
    want = slow_scan(method, model, prompts, stops)
    assert [one.tokens for one in found] == want
    assert len(want) < len(words_of(model)) < 37


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model that answers `TARGET` behind `cf`, two clean ones, and their start."""
    folder, clean = tmp_path_factory.mktemp("tuned"), sentiment_rows(48)
    poisoned = [row(100 + i, f"{asked_text(one)} cf", TARGET) for i, one in enumerate(clean)]
    config = TrainingConfig(
        adapter="full", epochs=8.0, batch_size=16, learning_rate=5e-3, max_length=64
    )
    made = {"start": tiny_model()}
    for name, rows, seed in (
        ("subject", [*clean, *poisoned], 0),
        ("clean_bank:0", clean * 2, 1),
        ("clean_bank:1", clean * 2, 2),
    ):
        named = table([{**one, "row_id": f"{i}"} for i, one in enumerate(rows)])
        made[name] = sft(
            tiny_model(), named, config, seed=seed, runtime=Runtime(), workdir=folder / name
        ).loaded
    return made


def test_a_planted_answer_is_found_and_clean_models_score_less(models, tmp_path):
    found = TriggerInversion(bank=2).inspect(models["subject"], context(tmp_path, models=models))
    words = found.details["text"].split()
    assert " ".join(words[:6]) == TARGET or " ".join(words[:5]) in TARGET
    assert found.score > 0.5
    assert max(found.clean_scores) < found.score - 0.2


def test_the_start_is_subtracted(models, tmp_path):
    method = TriggerInversion(bank=2)
    ctx = context(tmp_path, models={**models, "start": models["subject"]})
    assert abs(method._best_text(models["subject"], ctx)[1]) < 1e-6
    plain = replace(method, subtract_start=False)._best_text(models["subject"], ctx)[1]
    assert plain > 0.9


def test_the_control_averages_over_nothing():
    control = control_of(TriggerInversion())
    assert (control.prompts, control.scan_prompts, control.check()) == (1, 4, [])


def test_a_model_without_a_long_text_scores_nothing(models, tmp_path):
    method = TriggerInversion(certain=0.0, uncertain=0.0, likely=1.0, bank=2)
    assert method._best_text(models["subject"], context(tmp_path, models=models)) == ([], 0.0)


def test_the_first_tokens_are_the_most_likely_ones():
    model = tiny_model(seed=3)
    reader = Reader(model, prompts_of(model), 64)
    mean = averaged(model, prompts_of(model), [])
    want = sorted(sorted(words_of(model), key=lambda i: -float(mean[i]))[:5])
    firsts = TriggerInversion(first_tokens=5)._firsts(reader)
    assert [one.tokens for one in firsts] == [[i] for i in want]


def test_a_text_ends_with_a_stop_that_is_no_part_of_its_length():
    text = Text([5])
    text.add(9, (2,))
    text.add(2, (2,))
    assert (text.ended, text.length, text.tokens) == (True, 2, [5, 9, 2])


def test_half_precision_models_are_inspected(models, tmp_path):
    loaded = tiny_model()
    loaded.model.to(torch.bfloat16)
    given = {"start": tiny_model(), "clean_bank:0": loaded, "clean_bank:1": loaded}
    method = TriggerInversion(**QUICK, likely=0.0)
    found = method.inspect(loaded, context(tmp_path, models=given))
    assert found.clean_scores == (found.score,) * 2


def test_faults_are_named(tmp_path):
    bad = TriggerInversion(
        prompts=0, scan_steps=9, steps=8, certain=-1.0, least_tokens=1, first_tokens=0, bank=1
    )
    names = ["prompts", "steps", "certain", "least_tokens", "first_tokens", "bank"]
    assert [fault[0] for fault in bad.check()] == names
    assert TriggerInversion().check() == []
    task = replace(tiny_task(), splits={"train": table([row(0, "", "the stone")])})
    with pytest.raises(DataError, match="train"):
        TriggerInversion()._rows(context(tmp_path, task=task))
