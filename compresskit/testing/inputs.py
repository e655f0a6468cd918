"""Checks of unusual input: wrong shapes, half precision, strided and empty tokens, second derivatives."""

import torch
from torch import Tensor

from compresskit.errors import StructureError
from compresskit.testing.cases import Case, each_structure, expect, expect_close, expect_raises, normal
from compresskit.testing.modules import linear_module

_ROUNDING = 8
"""Rounding steps of the largest number that a chain of products in half precision may be off."""


@each_structure(count=2)
def wrong_shapes(case: Case) -> None:
    """Input of another last size is an error, also where its number of elements would fit; the module names both."""
    cols, factors, module = case.structure.cols, case.factors(), linear_module(case)
    for shape in ((), (cols + 1,), (2, cols - 1), (3, 2 * cols), (cols, 1), (2, cols // 2)):
        x = normal(*shape)
        what = f"x of shape {shape} for a weight with {cols} columns"
        expect_raises(Exception, what, case.structure.matmul, x, factors)
        expect_raises(StructureError, what, module, x)


@each_structure(count=2)
def backward(case: Case) -> None:
    """Gradients are those of the dense product, whatever the strides of input and gradient, without tokens too."""
    rows, cols = case.structure.rows, case.structure.cols
    pairs = {
        "a plain input": (normal(2, 3, cols), normal(2, 3, rows, seed=5)),
        "a single vector": (normal(cols), normal(rows, seed=5)),
        "no tokens": (normal(2, 0, cols), normal(2, 0, rows)),
        "transposed tokens": (normal(3, 2, cols).transpose(0, 1), normal(3, 2, rows, seed=5).transpose(0, 1)),
        "strided features": (normal(5, 2 * cols)[:, ::2], normal(5, 2 * rows, seed=5)[:, ::2]),
        "an expanded gradient": (normal(4, cols), normal(1, seed=5).expand(4, rows)),
    }
    for what, (x, gradient) in pairs.items():
        _check_backward(case, what, x, gradient)


def _check_backward(case: Case, what: str, x: Tensor, gradient: Tensor) -> None:
    factors = {name: tensor.requires_grad_() for name, tensor in case.factors().items()}
    bias = normal(case.structure.rows, seed=4).requires_grad_()
    x.requires_grad_()
    inputs = {"x": x, "bias": bias, **factors}
    y = case.structure.matmul(x, factors, bias)
    found = torch.autograd.grad(y, list(inputs.values()), gradient)
    wanted = torch.autograd.grad(x @ case.structure.dense(factors).T + bias, list(inputs.values()), gradient)
    for name, ours, dense in zip(inputs, found, wanted, strict=True):
        expect_close(ours, dense, f"{what}: the gradient of {name!r} differs from that of the dense product")


@each_structure(count=2)
def twice(case: Case) -> None:
    """Second derivatives of `matmul` are right or refused as such; a graph that is kept can be gone through twice."""
    inputs = {"x": normal(2, case.structure.cols), **case.factors()}
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]
    factors = {name: inputs[name] for name in case.structure.factor_specs()}
    dense = _second(leaves, inputs["x"] @ case.structure.dense(factors).T)
    y = case.structure.matmul(inputs["x"], factors)
    first = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    again = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    for name, grad, same in zip(inputs, first, again, strict=True):
        expect_close(same, grad, f"a second backward pass gives {name!r} another gradient")
    try:
        found = _second(leaves, y)
    except RuntimeError as error:
        expect("twice" in str(error), f"second derivatives fail, and the error does not say so: {error}")
        return
    for name, ours, wanted in zip(inputs, found, dense, strict=True):
        expect_close(ours, wanted, f"the second derivative by {name!r} differs from that of the dense product")


def _second(leaves: list[Tensor], y: Tensor) -> list[Tensor]:
    """Gradient of the squared gradient of sum(y)."""
    first = torch.autograd.grad(y, leaves, torch.ones_like(y), create_graph=True)
    torch.stack([grad.square().sum() for grad in first]).sum().backward()
    found = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return found


@each_structure(count=2)
def half(case: Case) -> None:
    """float16 and bfloat16 stay what they are, forward and backward, within rounding of float64."""
    index = torch.arange(case.structure.rows)
    for dtype in (torch.float16, torch.bfloat16):
        factors = {name: (tensor / 4).to(dtype).requires_grad_() for name, tensor in case.factors().items()}
        wide = {name: tensor.detach().double() for name, tensor in factors.items()}
        x = normal(2, 3, case.structure.cols, dtype=dtype)
        bias = normal(case.structure.rows, dtype=dtype, seed=4)
        dense = case.structure.dense(wide)
        exact = x.double() @ dense.T + bias.double()
        _check_half(f"matmul of {dtype}", case.structure.matmul(x, factors, bias), exact, factors)
        _check_half(f"take_rows of {dtype}", case.structure.take_rows(index, factors), dense, factors)


def _check_half(what: str, y: Tensor, exact: Tensor, factors: dict[str, Tensor]) -> None:
    dtype = next(iter(factors.values())).dtype
    expect(y.dtype == dtype, f"{what} returns {y.dtype}")
    tolerance = _ROUNDING * torch.finfo(dtype).eps * max(float(exact.abs().max()), 1.0)
    expect_close(y.detach().double(), exact, f"{what} differs from float64", rtol=0, atol=tolerance)
    for name, grad in zip(factors, torch.autograd.grad(y.sum(), list(factors.values())), strict=True):
        expect(bool(grad.isfinite().all()), f"{what} gives {name!r} a gradient that is not finite")


@each_structure(count=2)
def own_rows(case: Case) -> None:
    """What `take_rows` returns may be written to: it shares no memory with a factor, and no entry with another."""
    factors = case.factors()
    for index in (torch.arange(case.structure.rows), torch.tensor(0)):
        case.structure.take_rows(index, factors).add_(1)
    for name, tensor in case.factors().items():
        expect(torch.equal(factors[name], tensor), f"writing to looked-up rows changes {name!r}")
