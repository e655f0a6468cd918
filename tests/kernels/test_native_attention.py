"""Attention and the loss of its scores by the compiled kernel, against the same in float64."""

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import compresskit
from compresskit.core.native_attention import attention, score_squares
from compresskit.distill import measures
from compresskit.distill.precision import _ARGUMENTS
from compresskit.errors import DistillError
from tests.distill.test_precision import asked
from tests.distill.tiny import compressed, examples, model, objective, trainer

SHAPES = (
    (2, 3, 12, 32),
    (3, 2, 64, 32),
    (2, 2, 77, 64),
    (1, 2, 200, 128),
    (2, 1, 1, 8),
    (2, 2, 33, 24),
    (2, 2, 130, 6),
)
MASKS = ("none", "bool", "float", "bfloat16", "causal")


def states(*shape, seed=0):
    """(batch, heads, time, size) as models have it: a view of (batch, time, heads * size)."""
    batch, heads, time, size = shape
    made = torch.randn(batch, time, heads * size, generator=torch.Generator().manual_seed(seed))
    return made.bfloat16().view(batch, time, heads, size).transpose(1, 2)


def masks(batch, time):
    """Of texts of other lengths, in all forms."""
    lengths = torch.arange(batch) % time + 1
    keep = (torch.arange(time) < lengths[:, None])[:, None, None]
    return {
        "none": None,
        "bool": keep.expand(batch, 1, time, time),
        "float": torch.zeros(batch, 1, 1, time).masked_fill(~keep, torch.finfo(torch.float32).min),
        "bfloat16": torch.randn(time, time, generator=torch.Generator().manual_seed(1)).bfloat16(),
        "causal": keep & torch.ones(time, time, dtype=torch.bool).tril(),
    }


def differ(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm()).item()


def exactly(given, mask, scale, grad):
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    mask = mask.double() if mask is not None and mask.dtype is not torch.bool else mask
    made = scaled_dot_product_attention(*wide, attn_mask=mask, scale=scale)
    made.backward(grad.double())
    return made.detach(), *(tensor.grad for tensor in wide)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_attention_and_its_gradients_are_those_of_float64(half, shape, mask):
    given, grad = [states(*shape, seed=i).requires_grad_() for i in range(3)], states(*shape, seed=3)
    mask = masks(shape[0], shape[2])[mask]
    made = attention(*given, mask, 0.3)
    assert made.dtype is torch.bfloat16
    made.backward(grad)
    for ours, exact in zip((made, *(x.grad for x in given)), exactly(given, mask, 0.3, grad), strict=True):
        assert ours.shape == exact.shape
        if exact.norm() > 1e-6:  # one token has the gradient of none of its scores
            assert differ(ours.detach(), exact) < 0.005
        else:
            assert ours.detach().abs().max() < 1e-2


def test_the_scale_is_that_of_pytorch_unless_it_is_given(half):
    given = [states(2, 2, 9, 16, seed=i) for i in range(3)]
    torch.testing.assert_close(attention(*given), attention(*given, None, 0.25), rtol=0, atol=0)


def test_values_may_have_another_size(half):
    query, key, value = states(2, 2, 20, 16), states(2, 2, 20, 16, seed=1), states(2, 2, 20, 40, seed=2)
    given, grad = [x.requires_grad_() for x in (query, key, value)], states(2, 2, 20, 40, seed=3)
    made = attention(*given)
    made.backward(grad)
    for ours, exact in zip((made, *(x.grad for x in given)), exactly(given, None, None, grad), strict=True):
        assert differ(ours.detach(), exact) < 0.005


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
def test_so_many_threads_give_the_same_bits(half, threads):
    given, grad = [states(4, 3, 50, 32, seed=i).requires_grad_() for i in range(3)], states(4, 3, 50, 32, seed=3)
    made = attention(*given)
    made.backward(grad)
    found = [made.detach(), *(x.grad for x in given)]
    total, *gradients = score_squares(*(x.transpose(1, 2) for x in (*given[:2], *given[1:])), mask_of(4, 50))
    torch.set_num_threads(1)
    once = [x.detach().requires_grad_() for x in given]
    again = attention(*once)
    again.backward(grad)
    other, *others = score_squares(*(x.transpose(1, 2) for x in (*given[:2], *given[1:])), mask_of(4, 50))
    expected = [again.detach(), *(x.grad for x in once), other, *others]
    for ours, alone in zip((*found, total, *gradients), expected, strict=True):
        torch.testing.assert_close(ours, alone, rtol=0, atol=0)


def test_a_row_without_any_pair_is_zero_and_has_no_gradient(half):
    given, keep = [states(1, 2, 6, 8, seed=i).requires_grad_() for i in range(3)], torch.ones(6, 6, dtype=torch.bool)
    keep[2] = False
    made = attention(*given, keep)
    made.sum().backward()
    assert not made[:, :, 2].any()
    assert not given[0].grad[:, :, 2].any()
    assert all(x.grad.isfinite().all() for x in given)


@pytest.mark.parametrize("which", range(3))
def test_what_is_no_number_stays_so(half, which):
    given = [states(1, 1, 40, 8, seed=i) for i in range(3)]
    given[which][0, 0, 5, 0] = torch.nan
    made, expected = attention(*given), scaled_dot_product_attention(*map(torch.Tensor.float, given))
    assert torch.equal(made.isnan(), expected.isnan())


def test_large_scores_overflow_nowhere(half):
    query, key, value = (100 * states(1, 2, 20, 16, seed=i) for i in range(3))
    assert differ(attention(query, key, value), exactly((query, key, value), None, None, value)[0]) < 0.005


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q.float(), k.float(), v.float()),
        lambda q, k, v: (q[..., :7], k[..., :7], v),
        lambda q, k, v: (q[:, :, :4], k, v),
        lambda q, k, v: (q.mT.contiguous().mT, k, v),
        lambda q, k, v: (q, k, v, torch.zeros(6, 6, requires_grad=True)),
        lambda q, k, v: (q, k, v, torch.zeros(6, 6, dtype=torch.float64)),
        lambda q, k, v: (q, k, v, torch.zeros(5, 6)),
        lambda q, k, v: (q[:0], k[:0], v[:0]),
    ],
)
def test_what_is_not_for_the_kernel_is_left_to_pytorch(half, change):
    assert attention(*change(*(states(2, 2, 6, 8, seed=i) for i in range(3)))) is None


def test_nothing_is_for_it_where_it_is_turned_off(half):
    given = [states(2, 2, 6, 8, seed=i) for i in range(3)]
    assert attention(*given) is not None
    with compresskit.use_kernels("pytorch"):
        assert attention(*given) is None


def test_there_are_no_second_derivatives(half):
    query = states(1, 1, 6, 8).requires_grad_()
    made = attention(query, query, query)
    (grad,) = torch.autograd.grad(made.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_training_step_attends_by_it(half, mask, causal):
    mask = None if causal else masks(2, 21)[mask]
    with torch.autocast("cpu", torch.bfloat16), asked(), torch.profiler.profile() as seen:
        given = [states(2, 3, 21, 8, seed=i).requires_grad_() for i in range(3)]
        made = scaled_dot_product_attention(*given, mask, is_causal=causal)
        made.backward(states(2, 3, 21, 8, seed=3))
        with torch.no_grad():
            alone = scaled_dot_product_attention(*given, attn_mask=mask, is_causal=causal)
    torch.testing.assert_close(alone, made.detach(), rtol=0, atol=0)
    assert {"compresskit::attention", "compresskit::attention_backward"} <= {event.name for event in seen.events()}
    mask = torch.ones(21, 21, dtype=torch.bool).tril() if causal else mask
    exact = exactly(given, mask, None, states(2, 3, 21, 8, seed=3))
    for ours, expected in zip((made, *(x.grad for x in given)), exact, strict=True):
        assert differ(ours.detach(), expected) < 0.005


def test_dropout_and_groups_of_heads_stay_pytorchs(half):
    given = [states(2, 4, 6, 8, seed=i) for i in range(3)]
    few = [given[0], *(x[:, :2] for x in given[1:])]
    with torch.autocast("cpu", torch.bfloat16), asked(), torch.profiler.profile() as seen:
        scaled_dot_product_attention(*given, dropout_p=0.5)
        scaled_dot_product_attention(*few, enable_gqa=True)
    assert not {event.name for event in seen.events()} & {"compresskit::attention"}


def mask_of(batch, time):
    keep = torch.arange(time) < (torch.arange(batch) % time + 1)[:, None]
    return keep[:, None, :, None] & keep[:, None, None]


def by_time(*shape, seed=0):
    batch, time, heads, size = shape
    return states(batch, heads, time, size, seed=seed).transpose(1, 2)


@pytest.mark.parametrize("size", [8, 24, 32])
@pytest.mark.parametrize(
    "shape", [(2, 12, 3, 32), (3, 64, 2, 32), (2, 77, 2, 64), (1, 200, 2, 24), (2, 1, 1, 8)], ids=str
)
@pytest.mark.parametrize("pairs", ["all", "real", "causal"])
def test_squares_of_scores_and_their_gradients_are_those_of_float64(half, shape, size, pairs):
    ours = [by_time(*shape, seed=i).requires_grad_() for i in range(2)]
    theirs = [by_time(*shape[:3], size, seed=i) for i in range(2, 4)]
    real = mask_of(*shape[:2])
    pairs = {"all": torch.ones_like(real), "real": real, "causal": real & torch.ones(shape[1], shape[1]).tril().bool()}[
        pairs
    ]
    total = measures.score_squares(tuple(ours), tuple(theirs), pairs)
    (3 * total).backward()
    wide = [x.detach().double().requires_grad_() for x in ours]
    scores = [
        (query.transpose(1, 2) @ key.permute(0, 2, 3, 1)) / math.sqrt(query.shape[-1])
        for query, key in (wide, [x.double() for x in theirs])
    ]
    exact = ((scores[0] - scores[1]) * pairs).square().sum() / shape[2]
    (3 * exact).backward()
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=0)
    assert all(differ(x.grad, y.grad) < 0.006 for x, y in zip(ours, wide, strict=True))


def test_a_teacher_may_answer_in_float32_and_one_side_may_be_frozen(half):
    query, key = by_time(2, 9, 2, 8).requires_grad_(), by_time(2, 9, 2, 8, seed=1)
    theirs = [by_time(2, 9, 2, 8, seed=i) for i in (2, 3)]
    pairs = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    totals = [
        measures.score_squares((query, key), tuple(map(f, theirs)), pairs) for f in (torch.Tensor.float, lambda x: x)
    ]
    assert totals[0] == totals[1]
    totals[0].backward()
    assert query.grad.any()
    assert key.grad is None
    assert score_squares(query.float(), key.float(), *theirs, pairs) is None
    with pytest.raises(DistillError, match="second derivatives"):
        torch.autograd.grad(totals[1], query, create_graph=True)


@pytest.mark.parametrize("task", [None, "sequence", "causal-lm"])
def test_a_distillation_in_bfloat16_goes_the_same_way(half, tmp_path, task):
    words = ("attn_pdrop", "resid_pdrop", "embd_pdrop")
    none = dict.fromkeys(words if task == "causal-lm" else ("attention_probs_dropout_prob", "hidden_dropout_prob"), 0.0)
    teacher, goal, losses = model(task, **none), objective("hidden-states", "attention-scores"), {}
    for how in ("auto", "pytorch"):
        with compresskit.use_kernels(how), torch.profiler.profile() as seen:
            made = trainer(teacher, compressed(teacher), goal, tmp_path / how, data=examples(task), bf16=True)
            made.train()
        names = {event.name for event in seen.events()}
        ours = {f"compresskit::{name}" for name in ("attention", "attention_backward", "score_squares")}
        assert names & ours == (ours if how == "auto" else set())
        losses[how] = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert len(losses["auto"]) == 6
    assert losses["auto"] == pytest.approx(losses["pytorch"], rel=0.02)


def test_what_it_is_asked_for_has_the_names_of_pytorch():
    """As `scaled_dot_product_attention`, which says its own in its documentation alone."""
    said = scaled_dot_product_attention.__doc__.split("scaled_dot_product_attention(", 1)[1].split("->", 1)[0]
    assert all(name in said for name in _ARGUMENTS.parameters)
