"""CleanGen: tokens against drafts that are checked with whole passes, the control, labels."""

from dataclasses import replace

import pytest
import torch

from ftsec_ray.defenses.clean_gen import CleanGen
from ftsec_ray.defenses.safe_decoding import ExpertGuide, SafeDecoding
from ftsec_ray.method import control_of
from ftsec_ray.models.guided import with_guide
from tests.defenses.decoding import CHATS, MOST, logits_after, one_by_one, served
from tests.defenses.shared import context, tiny_full
from tests.fixtures_models import tiny_model
from tests.numeric import in_float64

pytestmark = pytest.mark.usefixtures("float64")
SERVED = served()
CLEAN = tiny_full(SERVED.loaded, size=0.08)
"""The served model with noise: the two agree on most tokens."""
LABELS = ("good", "bad", "yes")


def checked(method, generator=SERVED, tmp="unused", ctx=None):
    ctx = ctx or context(tmp, models={"reference": CLEAN})
    return method.wrap_generation(generator, ctx), ctx


def by_drafts(alpha, k):
    """The paper's loop for every chat: k greedy tokens are drafted, one pass of the reference reads
    them, the first suspect one is replaced and later ones are dropped.
    """
    answers, stops = [], SERVED.stops()
    for chat in CHATS:
        prompt, said = SERVED.pieces(chat)[0], []
        while len(said) < MOST and not (said and said[-1] in stops):
            draft = []
            while len(draft) < k and not (draft and draft[-1] in stops):
                draft.append(int(logits_after(SERVED.loaded, [*prompt, *said, *draft]).argmax()))
            for i, token in enumerate(draft):
                before = [*prompt, *said, *draft[:i]]
                own, other = (logits_after(m, before).softmax(-1) for m in (SERVED.loaded, CLEAN))
                if own[token] / other[token] >= alpha:
                    draft = [*draft[:i], int(other.argmax())]
                    break
            said = [*said, *draft]
        said = said[:MOST]
        ends = [i for i, token in enumerate(said) if token in stops]
        answers.append(said[: ends[0]] if ends else said)
    return answers


@pytest.mark.parametrize("alpha", [1.0, 1.2, 2.0])
@pytest.mark.parametrize("k", [1, 4])
def test_answers_are_those_of_completely_checked_drafts(alpha, k):
    made, ctx = checked(CleanGen(alpha=alpha))
    got = made.complete_ids(CHATS, max_new_tokens=MOST, batch=3)
    assert got == by_drafts(alpha, k)
    assert 0 < ctx.counts["tokens_replaced"] < ctx.counts["tokens_checked"]


def test_a_ratio_of_zero_is_the_reference_alone_and_null_no_defense():
    alone, ctx = checked(CleanGen(alpha=0.0))
    want = replace(SERVED, loaded=CLEAN).complete_ids(CHATS, max_new_tokens=MOST)
    assert alone.complete_ids(CHATS, max_new_tokens=MOST) == want
    assert ctx.counts["tokens_replaced"] == ctx.counts["tokens_checked"]
    assert checked(CleanGen(alpha=None))[0] is SERVED
    assert torch.equal(
        alone.label_logprobs(CHATS, LABELS),
        replace(SERVED, loaded=CLEAN).label_logprobs(CHATS, LABELS),
    )


def test_a_model_is_never_suspect_to_itself():
    ctx = context("unused", models={"reference": SERVED.loaded})
    made, _ = checked(CleanGen(alpha=1.01), ctx=ctx)
    want = SERVED.complete_ids(CHATS, max_new_tokens=MOST)
    assert made.complete_ids(CHATS, max_new_tokens=MOST) == want
    assert (ctx.counts["tokens_replaced"], ctx.counts["answers_checked"]) == (0, len(CHATS))


def test_only_tokens_before_the_end_of_an_answer_count():
    made, ctx = checked(CleanGen(alpha=2.0))
    answers = made.complete_ids(CHATS, max_new_tokens=MOST)
    # an answer that ends itself has one more token: its stop
    assert ctx.counts["tokens_checked"] == sum(min(len(ids) + 1, MOST) for ids in answers)


def test_the_control_replaces_as_many_tokens_of_each_answer_at_other_positions(monkeypatch):
    ctx = context("unused", models={"reference": CLEAN})
    real, control = CleanGen(alpha=1.2), control_of(CleanGen(alpha=1.2))
    made, _ = checked(control, ctx=ctx)
    guide, plans = made.backend.guides[0], []
    inner = guide.done
    monkeypatch.setattr(guide, "done", lambda: (inner(), plans.append(guide.planned))[0])
    got = made.complete_ids(CHATS, max_new_tokens=MOST)
    real_made, real_ctx = checked(real)
    flags = real_made.backend.guides[0]
    done, found = flags.done, []
    monkeypatch.setattr(flags, "done", lambda: (found.append(dict(flags.seen)), done())[1])
    real_made.complete_ids(CHATS, max_new_tokens=MOST)
    assert {i: len(steps) for i, steps in plans[0].items()} == {
        i: len(of.flagged) for i, of in found[0].items()
    }
    assert any(plans[0][i] != found[0][i].flagged for i in plans[0])
    numbers = iter(range(len(CHATS)))
    state: dict = {}

    def pick(said, logits_of):
        if not said:
            state["i"] = next(numbers)
        model = CLEAN if len(said) in plans[0][state["i"]] else SERVED.loaded
        return int(logits_of(model, said).argmax())

    assert got == one_by_one(SERVED, CHATS, pick)
    assert ctx.counts["tokens_replaced"] <= real_ctx.counts["tokens_replaced"]


def test_the_control_does_not_depend_on_the_batch():
    answers = [
        checked(CleanGen(alpha=1.2, random_tokens=True))[0].complete_ids(
            CHATS, max_new_tokens=MOST, batch=batch
        )
        for batch in (1, 4)
    ]
    assert answers[0] == answers[1]


def test_a_suspect_label_becomes_the_references():
    guide = checked(CleanGen(alpha=20.0))[0].backend.guides[0]
    own = torch.tensor([[0.9, 0.01], [0.9, 0.01], [0.2, 0.7]]).log()
    other = torch.tensor([[0.04, 0.5], [0.05, 0.5], [0.9, 0.1]]).log()
    got = guide.label(own, other)
    assert torch.equal(got, torch.stack([other[0], own[1], own[2]]))
    control = checked(CleanGen(alpha=20.0, random_tokens=True))[0].backend.guides[0]
    mixed = control.label(own, other)
    assert int((mixed == other).all(-1).sum()) == 1


def test_samples_are_checked_like_greedy_tokens():
    given = {"max_new_tokens": MOST, "temperature": 1.0, "seeds": [3, 4, 5, 6]}
    ctx = context("unused", models={"reference": SERVED.loaded})
    same, _ = checked(CleanGen(alpha=1.01), ctx=ctx)
    assert same.complete_ids(CHATS, **given) == SERVED.complete_ids(CHATS, **given)
    other, ctx = checked(CleanGen(alpha=1.5))
    assert other.complete_ids(CHATS, **given) != SERVED.complete_ids(CHATS, **given)
    assert ctx.counts["tokens_replaced"] > 0


@pytest.mark.parametrize("first", ["safe_decoding", "clean_gen"])
def test_in_a_stack_safe_decoding_owns_the_first_tokens_in_either_order(first):
    expert, tokens = in_float64(tiny_model(seed=5)), 2
    alone = with_guide(SERVED, ExpertGuide(expert, SafeDecoding(tokens=tokens)))
    ctx = context("unused", models={"reference": CLEAN})
    method = CleanGen(alpha=0.0)
    if first == "safe_decoding":
        both = method.wrap_generation(alone, ctx)
    else:
        both = with_guide(
            method.wrap_generation(SERVED, ctx), ExpertGuide(expert, SafeDecoding(tokens=tokens))
        )
    got = both.complete_ids(CHATS, max_new_tokens=MOST)
    begun = alone.complete_ids(CHATS, max_new_tokens=tokens)

    def pick(said, logits_of):
        return int(logits_of(CLEAN, said).argmax())

    for chat, ids, start in zip(CHATS, got, begun, strict=True):
        assert ids[:tokens] == start
        said = list(start)
        while len(start) == tokens and len(said) < MOST:
            token = int(logits_after(CLEAN, [*SERVED.pieces(chat)[0], *said]).argmax())
            if token in SERVED.stops():
                break
            said.append(token)
        assert ids == said


def test_faulty_parameters_are_named():
    assert [fault[0] for fault in CleanGen(alpha=-1.0).check()] == ["alpha"]
    assert CleanGen().check() == []
    assert CleanGen(alpha=None).check() == []
