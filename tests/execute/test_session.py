"""A session loads a model once, and merges it once for all stages that ask it."""

from __future__ import annotations

import torch

from ftsec_ray.context import Runtime
from ftsec_ray.execute.session import Session
from ftsec_ray.identity import digest
from ftsec_ray.models.load import save_model
from ftsec_ray.models.precision import as_asked
from tests.defenses.shared import tiny_adapter
from tests.execute.crafting import MODEL, filled
from tests.fixtures_models import sentiment_rows, tiny_model

TUNED = digest("tuned")


def session(root, *, cache_gib=1.0):
    """A session on a store with the tiny model and an adapter on it."""
    store = filled(root, sentiment_rows(4))
    tuned = tiny_adapter(tiny_model())
    tuned.base_digest = MODEL
    folder = store.scratch(TUNED)
    save_model(tuned, folder)
    store.publish(TUNED, folder, {})
    return Session(store, Runtime(), cache_gib)


def weights(loaded):
    return {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_an_adapter_is_merged_once_for_all_who_ask(tmp_path):
    made = session(tmp_path)
    asked = made.asked(TUNED)
    assert made.asked(TUNED) is asked
    assert not asked.has_adapter
    assert same(weights(asked), weights(as_asked(made.model(TUNED))))
    assert not same(weights(asked), weights(made.model(MODEL)))
    assert made.model(TUNED).has_adapter


def test_whole_weights_are_asked_as_they_are(tmp_path):
    made = session(tmp_path)
    assert made.asked(MODEL) is made.model(MODEL)


def test_a_small_cache_holds_the_last_model_alone(tmp_path):
    made = session(tmp_path, cache_gib=1e-6)
    first = weights(made.asked(TUNED))
    made.model(MODEL)
    again = made.asked(TUNED)
    assert same(weights(again), first)
    assert made.asked(TUNED) is again
