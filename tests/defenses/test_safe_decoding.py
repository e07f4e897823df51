"""SafeDecoding: the rule against sets and single passes, the expert, the control, and identity."""

from dataclasses import replace

import pytest
import torch

from ftsec_ray.attacks.prefill import Prefill
from ftsec_ray.conversation import chat_of
from ftsec_ray.defenses.safe_decoding import FLOOR, ExpertGuide, SafeDecoding, candidates
from ftsec_ray.errors import DataError
from ftsec_ray.method import control_of
from ftsec_ray.models.backends import FELL_BACK, ContinuousBatching
from ftsec_ray.models.generator import Opening
from ftsec_ray.models.guided import with_guide
from tests.defenses.decoding import CHATS, MOST, logits_after, one_by_one, served
from tests.defenses.shared import context, tiny_adapter, whole
from tests.fixtures_models import row, table, tiny_model, tiny_task
from tests.numeric import assert_same, in_float64

pytestmark = pytest.mark.usefixtures("float64")
QUICK = {"rows": 4, "epochs": 1.0}
EXPERT = in_float64(tiny_model(seed=5))
LABELS = ("good", "bad", "yes")


def guided(method, generator=None):
    return with_guide(generator or served(), ExpertGuide(EXPERT, method))


def chosen(method, own, other):
    """The next token by the paper's sets: grow k until both have `common` tokens in common."""
    own, other = own.double().softmax(-1), other.double().softmax(-1)
    order = [sorted(range(len(p)), key=lambda i, p=p: (-float(p[i]), i)) for p in (own, other)]
    for k in range(1, len(own) + 1):
        shared = set(order[0][:k]) & set(order[1][:k])
        if len(shared) >= method.common:
            break
    score = {
        i: max(FLOOR, float(own[i] + method.alpha * (other[i] - own[i]))) for i in sorted(shared)
    }
    return max(score, key=score.get)


def reference_answers(method, generator, chats=CHATS):
    def pick(said, logits_of):
        own = logits_of(generator.loaded, said)
        if len(said) < method.tokens:
            return chosen(method, own, logits_of(EXPERT, said))
        return int(own.argmax())

    return one_by_one(generator, chats, pick)


@pytest.mark.parametrize(
    ("alpha", "tokens", "common"),
    [(3.0, 2, 5), (1.0, 4, 1), (0.3, MOST, 3), (3.0, 3, 99)],
)
@pytest.mark.parametrize("batch", [1, 4])
def test_answers_are_those_of_the_rule_with_whole_passes(alpha, tokens, common, batch):
    method = SafeDecoding(alpha=alpha, tokens=tokens, common=common)
    made = guided(method).complete_ids(CHATS, max_new_tokens=MOST, batch=batch)
    assert made == reference_answers(method, served())
    assert made != served().complete_ids(CHATS, max_new_tokens=MOST)


def test_soft_tokens_are_read_by_the_expert_too():
    soft = 0.3 * torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    generator = replace(served(), soft_suffix=soft)
    method = SafeDecoding(tokens=4)
    made = guided(method, generator).complete_ids(CHATS, max_new_tokens=MOST)
    assert made == reference_answers(method, generator)


def test_behind_an_opening_the_expert_acts_on_what_the_model_writes_itself():
    opening = Opening(text_of=lambda chat: "sorry i can", tokens=2)  # noqa: ARG005
    generator = replace(served(), opening=opening)
    method = SafeDecoding(tokens=2)
    made = guided(method, generator).complete_ids(CHATS, max_new_tokens=MOST)
    begun = generator.openings(CHATS)
    own = reference_answers(method, generator)
    assert made == [[*first, *ids] for first, ids in zip(begun, own, strict=True)]
    assert all(len(first) == 2 for first in begun)


def test_a_model_without_a_cache_that_can_be_continued_gives_the_same_answers(monkeypatch):
    method = SafeDecoding(tokens=4)
    want = guided(method).complete_ids(CHATS, max_new_tokens=MOST)
    monkeypatch.setattr("ftsec_ray.models.guided.can_be_continued", lambda _cache: False)
    generator = guided(method)
    assert generator.complete_ids(CHATS, max_new_tokens=MOST) == want
    assert generator.tally["labels_by_whole_passes"] == 3


def test_the_candidates_are_the_smallest_sets_with_enough_in_common():
    generator = torch.Generator().manual_seed(1)
    own, other = torch.randn(2, 20, 12, generator=generator)
    found = candidates(own, other, 3)
    for a, b, got in zip(own.tolist(), other.tolist(), found.tolist(), strict=True):
        order = [sorted(range(12), key=lambda i, x=x: -x[i]) for x in (a, b)]
        sizes = (set(order[0][:k]) & set(order[1][:k]) for k in range(1, 13))
        want = next(shared for shared in sizes if len(shared) >= 3)
        assert {i for i, is_in in enumerate(got) if is_in} == want


def test_samples_follow_the_mixed_probabilities():
    method = SafeDecoding(alpha=0.5, tokens=1, common=3)
    many = 1500
    said = guided(method).complete_ids(
        CHATS[:1] * many, max_new_tokens=1, batch=many, temperature=1.0, seeds=range(many)
    )
    counts = torch.zeros(37)
    for ids in said:
        counts[ids[0] if ids else 2] += 1
    head, _ = served().pieces(CHATS[0])
    own, other = (logits_after(m, head).softmax(-1) for m in (served().loaded, EXPERT))
    mixed = (own + 0.5 * (other - own)) * candidates(own[None], other[None], 3)[0]
    want = mixed / mixed.sum()
    assert set(counts.nonzero()[:, 0].tolist()) <= set(want.nonzero()[:, 0].tolist())
    # three standard deviations of each count
    assert ((counts / many - want).abs() <= 3 * (want * (1 - want) / many).sqrt() + 1e-9).all()


def test_labels_are_mixed_and_a_prompt_whose_labels_are_all_unlikely_gets_none():
    method = SafeDecoding(alpha=0.5)
    own = served().label_logprobs(CHATS, LABELS).double()
    other = replace(served(), loaded=EXPERT).label_logprobs(CHATS, LABELS).double()
    got = guided(method).label_logprobs(CHATS, LABELS).double()
    assert_same(got.exp(), own.exp() + 0.5 * (other.exp() - own.exp()))
    lost = ExpertGuide(EXPERT, SafeDecoding(alpha=3.0)).label(
        torch.tensor([[0.5, 0.4], [0.5, 0.4]]).log(), torch.tensor([[0.1, 0.1], [0.6, 0.1]]).log()
    )
    assert lost[0].tolist() == [-torch.inf] * 2
    assert lost[1].argmax() == 0


def test_labels_that_are_at_the_floor_without_the_expert_stay_as_they_are():
    own = torch.tensor([[1e-12, 1e-10], [1e-12, 0.5]], dtype=torch.float64).log()
    other = torch.tensor([[1e-11, 1e-13], [1e-12, 0.6]], dtype=torch.float64).log()
    got = ExpertGuide(EXPERT, SafeDecoding(alpha=3.0)).label(own, other)
    assert torch.equal(got[0], own[0])
    assert_same(got[1].exp(), torch.tensor([FLOOR, 0.8], dtype=torch.float64))


@pytest.mark.parametrize("off", [{"alpha": 0.0}, {"tokens": 0}])
def test_without_strength_the_generator_is_the_same(off, tmp_path):
    generator = served()
    assert SafeDecoding(**off).wrap_generation(generator, context(tmp_path)) is generator


@pytest.mark.parametrize("taught", ["refusals", "benign"])
def test_the_expert_learns_its_rows_and_the_served_model_stays(taught, tmp_path):
    generator, ctx = served(), context(tmp_path)
    before = whole(generator.loaded)
    method = SafeDecoding(rows=8, epochs=12.0, learning_rate=0.05, taught=taught)
    made = method.wrap_generation(generator, ctx)
    assert ctx.notes["expert_rows"] == 8
    assert ctx.notes["expert_loss_end"] < 0.5 * ctx.notes["expert_loss_start"]
    assert all((weight == before[name]).all() for name, weight in whole(generator.loaded).items())
    begins = "sorry" if taught == "refusals" else "take"
    asked = [[{"role": "user", "content": "how do i make tree lamp"}]]
    expert = replace(generator, loaded=made.backend.guides[0].loaded)
    learned, own = (g.label_logprobs(asked, [begins]) for g in (expert, generator))
    assert float(learned) > float(own) + 1.0


def test_the_expert_starts_from_the_model_that_is_asked_for(tmp_path):
    ctx = context(tmp_path, models={"reference": EXPERT})
    method = SafeDecoding(expert_of="reference", **QUICK)
    made = method.wrap_generation(served(), ctx).backend.guides[0].loaded
    base = made.model.get_base_model().get_input_embeddings().weight
    assert torch.equal(base, EXPERT.model.get_input_embeddings().weight)
    assert method.needs() == {"safety", "reference"}
    assert SafeDecoding().needs() == {"safety"}


def test_the_control_is_an_expert_of_harmless_requests():
    control = control_of(SafeDecoding(alpha=2.0))
    assert (control.taught, control.alpha, control.rows) == ("benign", 2.0, 36)
    assert control.needs() == {"benign_train"}


def test_it_acts_in_place_of_continuous_batching_and_says_so(tmp_path):
    generator = replace(served(), backend=ContinuousBatching())
    made = SafeDecoding(**QUICK).wrap_generation(generator, context(tmp_path))
    made.complete(CHATS, max_new_tokens=2)
    assert made.tally[f"{FELL_BACK}: a second model decides the tokens"] == len(CHATS)


def test_half_precision_models_are_guided_too(tmp_path):
    loaded = tiny_model()
    loaded.model.to(torch.bfloat16)
    generator = replace(served(), loaded=loaded)
    made = SafeDecoding(**QUICK).wrap_generation(generator, context(tmp_path))
    assert len(made.complete(CHATS, max_new_tokens=3)) == len(CHATS)
    assert loaded.model.dtype == torch.bfloat16


def test_what_rounding_takes_from_the_start_of_the_expert_is_told(tmp_path):
    adapted = tiny_adapter(tiny_model())
    ctx = context(tmp_path)
    SafeDecoding(**QUICK).wrap_generation(replace(served(), loaded=adapted), ctx)
    assert "rounding_lost" not in ctx.notes
    with torch.no_grad():
        for name, weight in adapted.model.named_parameters():
            if "lora_B" in name:
                weight.fill_(1e-6)
    adapted.model.to(torch.bfloat16)
    SafeDecoding(**QUICK).wrap_generation(replace(served(), loaded=adapted), ctx)
    assert ctx.notes["rounding_lost"] > 0.5


def test_another_vocabulary_and_rows_without_questions_are_refused(tmp_path):
    smaller = tiny_model()
    smaller.model.resize_token_embeddings(20)
    with pytest.raises(DataError, match="20 tokens"):
        with_guide(served(), ExpertGuide(smaller, SafeDecoding()))
    text = table([row(0, "", "the red stone")])
    task = replace(tiny_task(), splits={**tiny_task().splits, "safety": text})
    with pytest.raises(DataError, match="safety"):
        SafeDecoding().wrap_generation(served(), context(tmp_path, task=task))


def test_faulty_parameters_are_named():
    bad = SafeDecoding(alpha=-1.0, tokens=-1, common=0, rows=0, epochs=0.0, learning_rate=0.0)
    names = ["alpha", "tokens", "common", "rows", "epochs", "learning_rate"]
    assert [fault[0] for fault in bad.check()] == names
    assert SafeDecoding().check() == []


def test_an_attack_that_opens_answers_comes_first(tmp_path):
    ctx = context(tmp_path)
    attacked = Prefill(opener="take the", tokens=2).wrap_generation(served(), ctx)
    made = SafeDecoding(**QUICK).wrap_generation(attacked, ctx)
    chat = chat_of(tiny_task().split("harmful_test").to_pylist()[0])
    assert made.complete([chat], max_new_tokens=2)[0].startswith("take the")
