"""RepNoise: the distance by loops, the terms on rows without padding, its zero, and its hooks."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from ftsec_ray.conversation import answer_of
from ftsec_ray.data.pairs import refusals_for
from ftsec_ray.defenses.repnoise import RepNoise, differing, mmd, noising
from ftsec_ray.errors import DataError
from ftsec_ray.method import control_of
from ftsec_ray.models import lens, logits
from ftsec_ray.models.lens import lens_nll, lens_of
from ftsec_ray.models.load import bare
from ftsec_ray.models.row_tokens import IGNORED
from ftsec_ray.training.terms import term_batch
from tests.defenses.hardened import (
    SHORT,
    check_bfloat16,
    check_cuts,
    check_resume,
    hardened,
    same,
    turned_task,
)
from tests.defenses.shared import context, tiny_adapter
from tests.fixtures_models import tiny_model, tiny_task
from tests.numeric import assert_same

QUICK = {**SHORT, "harmful_rows": 8, "harmful_batch": 4}


def mmd_by_loops(ours, theirs):
    """The double sums of the definition, with the mean squared distance of all different pairs."""

    def square(a, b):
        return sum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True))

    both = [*ours, *theirs]
    pairs = [square(a, b) for i, a in enumerate(both) for j, b in enumerate(both) if i != j]
    scale = sum(pairs) / len(pairs)

    def kernel(a, b):
        return sum(math.exp(-square(a, b) / (scale * 2.0**k)) for k in range(-2, 3))

    def mean(left, right):
        return sum(kernel(a, b) for a in left for b in right) / (len(left) * len(right))

    return mean(ours, ours) + mean(theirs, theirs) - 2 * mean(ours, theirs)


@pytest.mark.usefixtures("float64")
def test_the_distance_is_the_double_sum_of_five_kernels():
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(3, 5, generator=generator)
    theirs = torch.randn(3, 5, generator=generator) + 1.0
    assert_same(mmd(ours, theirs), mmd_by_loops(ours, theirs))
    assert abs(float(mmd(ours, ours.clone()))) < 1e-12
    assert float(mmd(ours, theirs)) > float(mmd(ours, ours + 0.1))


@pytest.mark.usefixtures("float64")
def test_the_distance_has_the_gradient_of_differences_also_where_two_rows_are_equal():
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(3, 5, generator=generator)
    ours[2] = ours[1]
    theirs = torch.randn(3, 5, generator=generator)
    ours.requires_grad_(True)
    mmd(ours, theirs).backward()
    both = torch.cat([ours, theirs]).detach()
    squares = (both[:, None] - both[None]).square().sum(-1)
    scale = squares.sum() / 30
    for i in range(3):
        want = torch.zeros(5)
        for j in range(6):
            slope = sum(
                -torch.exp(-squares[i, j] / (scale * w)) / (scale * w) for w in (0.25, 0.5, 1, 2, 4)
            )
            # each pair stands twice in the sums, and each sum has 9 terms
            want += (1 if j < 3 else -1) * 2 / 9 * slope * 2 * (both[i] - both[j])
        assert_same(ours.grad[i], want)


def test_the_memory_of_a_step_holds_no_logits_and_no_differences_of_all_pairs():
    model, kept = tiny_model().model, []
    states = torch.randn(6, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        lens_nll(model, states, torch.arange(6))
        mmd(states, torch.randn(6, 32))
    assert kept
    assert not any(len(shape) == 3 and shape[-1] == 32 for shape in kept)
    assert model.config.vocab_size not in {shape[-1] for shape in kept if len(shape) == 2}


ROWS = [
    ([1, 3, 9, 20, 21, 22, 2], [IGNORED] * 3 + [20, IGNORED, 22, 2]),
    ([1, 3, 7, 15, 2], [IGNORED] * 3 + [15, IGNORED]),
]


def by_hand(model, *, alpha, beta, seed):
    """Both terms from one forward pass per row, without padding."""
    states, losses = [], []
    for ids, labels in ROWS:
        read = []
        handles = [
            layer.mlp.register_forward_hook(lambda _, __, out, read=read: read.append(out[0]))
            for layer in model.model.layers
        ]
        output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        for handle in handles:
            handle.remove()
        places = [t for t, label in enumerate(labels) if label != IGNORED]
        states.append((places, read))
        wanted = torch.tensor([labels[t] for t in places])
        before = torch.tensor([t - 1 for t in places])
        first = model.lm_head(model.model.norm(output.hidden_states[1]))[0, before]
        for given in (first, output.logits[0, before]):
            losses.append(cross_entropy(given, wanted, reduction="none"))
    ascent = torch.log1p(torch.cat(losses).mean())  # as many tokens at either depth
    torch.manual_seed(seed)
    distances = []
    width = max(len(ids) for ids, _ in ROWS)
    for layer in range(2):
        count = sum(len(places) for places, _ in states)
        noise = torch.randn(count, model.config.hidden_size)
        ours, theirs, used = [], [], 0
        for places, read in states:
            row, other = torch.zeros(width, noise.shape[1]), torch.zeros(width, noise.shape[1])
            for place in places:
                row[place] = read[layer][place]
                other[place] = noise[used]
                used += 1
            ours.append(row.flatten().tolist())
            theirs.append(other.flatten().tolist())
        distances.append(mmd_by_loops(ours, theirs))
    return beta * sum(distances) / 2 - alpha * float(ascent)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize(("alpha", "beta"), [(0.7, 3.0), (1.0, 0.0), (0.0, 1.0)])
def test_the_terms_are_those_of_single_rows_and_padding_plays_no_part(alpha, beta, padding):
    model = tiny_model(seed=1).model
    ids = [row + [0] * padding for row, _ in ROWS]
    labels = [row + [IGNORED] * padding for _, row in ROWS]
    batch = term_batch(ids, labels=labels, pad=0, device="cpu")
    for i, (row, _) in enumerate(ROWS):
        batch.attention_mask[i, len(row) :] = 0
    torch.manual_seed(4)
    with torch.no_grad():
        got = noising(model, batch, alpha=alpha, beta=beta)
        assert_same(got, by_hand(model, alpha=alpha, beta=beta, seed=4))


@pytest.mark.usefixtures("float64")
def test_the_gradient_agrees_with_finite_differences():
    model = tiny_model(seed=1, hidden=8).model
    batch = term_batch(
        [ids for ids, _ in ROWS], labels=[labels for _, labels in ROWS], pad=0, device="cpu"
    )

    def loss():
        # the bandwidth counts as a constant, so only the ascent has this derivative
        return noising(model, batch, alpha=1.0, beta=0.0)

    loss().backward()
    for i, weight in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 + i)
        way = torch.randn(weight.shape, generator=generator)
        want, slopes = float((weight.grad * way).sum()), []
        with torch.no_grad():
            for sign in (1, -1):
                weight.add_(sign * 1e-6 * way)
                slopes.append(float(loss()))
                weight.sub_(sign * 1e-6 * way)
        # central differences are off by rounding (1e-16 / 1e-6) and by the curvature (1e-12)
        assert abs((slopes[0] - slopes[1]) / 2e-6 - want) < 1e-6 * max(1.0, abs(want))


def test_no_hook_stays_also_after_an_exception():
    loaded = tiny_adapter(tiny_model())
    batch = term_batch([ROWS[0][0]], labels=[ROWS[0][1]], pad=0, device="cpu")
    noising(loaded.model, batch, alpha=1.0, beta=1.0)
    inner = bare(loaded.model)

    def fails(*_, **__):
        raise ZeroDivisionError

    inner.model.layers[1].mlp.forward = fails
    with pytest.raises(ZeroDivisionError):
        noising(loaded.model, batch, alpha=1.0, beta=1.0)
    assert not any(module._forward_hooks for module in inner.modules())


def test_a_token_counts_where_the_refusal_has_another_one():
    ctx, loaded = context(None), tiny_model()
    rows = ctx.task.split("harmful_train").to_pylist()[:2]
    rows[1] = {**rows[1], "rejected": answer_of(rows[1])}
    refusals = refusals_for(rows, ctx, by="repnoise")
    assert refusals[0] == "sorry i can not help"
    found = differing(
        loaded.tokenizer, rows, [refusals[0].replace("not", "and"), refusals[1]], max_length=64
    )
    # the second row's answer is its own refusal: no token is left
    ((ids, labels),) = found
    want = loaded.tokenizer(answer_of(rows[0]))["input_ids"]
    # the fourth word is that of the refusal, and so is the end of the turn
    assert [label for label in labels if label != IGNORED] == [*want[:3], want[4]]
    assert len(ids) == len(labels)
    with pytest.raises(DataError, match="differs"):
        differing(loaded.tokenizer, rows[1:], refusals[1:], max_length=64)


def test_without_alpha_and_beta_it_is_plain_tuning(tmp_path):
    method = RepNoise(**QUICK)
    control = control_of(method)
    assert (control.alpha, control.beta) == (0.0, 0.0)
    zero, _ = hardened(control, tmp_path / "zero", dropout=0.3)
    plain = context(tmp_path / "plain")
    want = control._merged_sft(tiny_model(), control._plain_rows(plain), plain, dropout=0.3)
    assert same(zero, want)
    other, ctx = hardened(method, tmp_path / "on", dropout=0.3)
    assert not same(other, want)
    assert (ctx.notes["harmful_rows"], ctx.notes["harmful_rows_left_out"]) == (8, 0)


def test_the_harmful_loss_rises_against_its_control(tmp_path):
    found = {}
    rows = tiny_task().split("harmful_train").to_pylist()
    refusals = ["sorry i can not help"] * len(rows)
    for alpha in (0.0, 1.0):
        made, _ = hardened(
            RepNoise(**{**QUICK, "epochs": 3.0}, alpha=alpha, beta=0.0), tmp_path / str(alpha)
        )
        ids, labels = zip(*differing(made.tokenizer, rows, refusals, max_length=64), strict=True)
        with torch.no_grad():
            batch = term_batch(ids, labels=labels, pad=0, device="cpu")
            found[alpha] = -float(noising(made.model, batch, alpha=1.0, beta=0.0))
    assert found[1.0] > found[0.0]


def test_a_killed_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    check_resume(RepNoise(**QUICK), tmp_path, monkeypatch)


def test_harmful_answers_that_are_cut_are_counted(tmp_path):
    check_cuts(RepNoise(**QUICK), tmp_path, "harmful")


def test_half_precision_weights_are_hardened(tmp_path):
    check_bfloat16(RepNoise(**QUICK), tmp_path)


def test_rows_with_several_turns_lose_nothing(tmp_path):
    _, ctx = hardened(RepNoise(**QUICK), tmp_path, task=turned_task())
    assert (ctx.notes["harmful_rows"], ctx.notes["harmful_rows_left_out"]) == (8, 0)
    assert "rows_left_out" not in ctx.notes


def test_many_logits_are_computed_in_slices_with_the_same_gradient(monkeypatch):
    model, states = tiny_model().model, torch.randn(7, 32).requires_grad_(True)
    wanted = torch.arange(7)
    found = []
    for _ in range(2):
        losses = lens_nll(model, states, wanted)
        found.append((losses.detach(), *torch.autograd.grad(losses.sum(), states)))
        monkeypatch.setattr(logits, "LOGITS_AT_A_TIME", 80)
        monkeypatch.setattr(lens, "LOGITS_AT_A_TIME", 80)
    for one, other in zip(*found, strict=True):
        # two products of width 32 and 37, in another order
        assert float((one - other).abs().max()) <= 1e-4 * float(one.abs().max())


def test_a_class_without_a_known_last_norm_is_an_error():
    loaded = tiny_model()
    loaded.model.model.ending = loaded.model.model.norm
    del loaded.model.model.norm
    with pytest.raises(DataError, match="LlamaForCausalLM"):
        lens_of(loaded.model)


@pytest.mark.parametrize(
    ("field", "value"), [("alpha", -1.0), ("beta", -1.0), ("harmful_rows", 0), ("batch_size", 0)]
)
def test_faulty_parameters_are_named(field, value):
    assert [f[0] for f in RepNoise(**{field: value}).check()] == [field]
