"""Sums of squares with a backward pass of their own, against the same written out in float64."""

import pytest
import torch

from compresskit.distill.measures import score_squares, scores, token_squares
from compresskit.errors import DistillError

MASK = torch.tensor([[1, 1, 1, 0, 1], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
"""Three texts of five places, with padding on either side, within, and everywhere."""


def leaf(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def gradients(value, *tensors):
    return [value.detach(), *torch.autograd.grad(3 * value, tensors)]


def close(ours, exact, *, rtol=1e-5):
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=rtol, atol=rtol * float(other.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strided", [False, True])
def test_hidden_states(dtype, strided):
    student, teacher = leaf(3, 5, 8, dtype=dtype), leaf(3, 5, 8, dtype=dtype, seed=1).detach()
    if strided:
        student, teacher = (t.detach().transpose(0, 1).contiguous().transpose(0, 1) for t in (student, teacher))
        student.requires_grad_()
    ours = gradients(token_squares(student, teacher, MASK), student)
    wide = student.detach().double().requires_grad_()
    squares = (wide - teacher.double()).square().mean(-1)
    close(ours, gradients(squares[MASK].sum(), wide), rtol=1e-5 if dtype == torch.float32 else 4e-3)
    assert ours[1].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [4, 6])
def test_scores(dtype, causal, size):
    """Also of a student whose heads have another size than the teacher's."""
    student = tuple(leaf(3, 5, 2, size, dtype=dtype, seed=i) for i in (0, 1))
    teacher = tuple(leaf(3, 5, 2, 4, dtype=dtype, seed=i).detach() for i in (2, 3))
    pairs = MASK[:, None, :, None] & MASK[:, None, None, :]
    pairs = pairs.tril() if causal else pairs
    ours = gradients(score_squares(student, teacher, pairs), *student)
    wide = [tensor.detach().double().requires_grad_() for tensor in student]
    difference = (_scores(*wide) - _scores(*(tensor.double() for tensor in teacher))).masked_fill(~pairs, 0)
    close(ours, gradients(difference.square().sum() / 2, *wide), rtol=1e-5 if dtype == torch.float32 else 4e-3)
    assert ours[1].dtype == ours[2].dtype == dtype
    torch.testing.assert_close(scores(*student).double(), _scores(*wide).detach(), rtol=1e-5, atol=1e-5)


def _scores(query, key):
    return torch.einsum("bihd,bjhd->bhij", query, key) / query.shape[-1] ** 0.5


def test_queries_alone_may_be_trained():
    query, key = leaf(3, 5, 2, 4), leaf(3, 5, 2, 4, seed=1).detach()
    teacher = tuple(leaf(3, 5, 2, 4, seed=i).detach() for i in (2, 3))
    pairs = torch.ones(3, 1, 5, 5, dtype=torch.bool)
    score_squares((query, key), teacher, pairs).backward()
    both = leaf(3, 5, 2, 4), leaf(3, 5, 2, 4, seed=1)
    score_squares(both, teacher, pairs).backward()
    torch.testing.assert_close(query.grad, both[0].grad, rtol=0, atol=0)


def test_gradients_may_be_taken_twice_but_have_none():
    student, teacher = leaf(3, 5, 8), leaf(3, 5, 8, seed=1).detach()
    value = token_squares(student, teacher, MASK)
    first, second = (torch.autograd.grad(value, student, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    with pytest.raises(DistillError, match="no second derivatives"):
        torch.autograd.grad(value, student, create_graph=True)


def test_equal_models_have_no_difference():
    query, key = leaf(3, 5, 2, 4), leaf(3, 5, 2, 4, seed=1)
    pairs = torch.ones(3, 1, 5, 5, dtype=torch.bool)
    value = score_squares((query, key), (query.detach(), key.detach()), pairs)
    assert float(value.detach()) == pytest.approx(0, abs=1e-10)


def test_an_empty_batch_is_zero():
    empty = leaf(0, 5, 8)
    assert float(token_squares(empty, empty.detach(), MASK[:0]).detach()) == 0
