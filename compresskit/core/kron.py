"""x @ (sum_k left_k (x) right_k).T without building the sum, as few large products, forward and backward.

A token x (cols,) is read as a grid X (q, s) and its output as Y (p, r) = sum_k small_k X wide_k^T: two products,
`mix` by the small factor and a wide GEMM. With the small factor on the right, both grids are stored transposed:
the same product between two swaps. Terms lie side by side, so that each step is one product for all of them.
"""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from compresskit.errors import StructureError

PART_BYTES = 2 * 2**20
"""Tokens are taken in parts on a CPU: what lies between the two products is at most this large.

It is then still in the cache when the second product reads it, and is not fresh memory each time. Measured on 2
cores with 2 MiB of L2 in all, time in parts / at once: .5 to .75 at 4096 tokens with the wide factor first, about
1 at 1024 tokens and with the small factor first."""


@final
@dataclass(frozen=True)
class KronForm:
    """Sizes and storage of sum_k small_k (x) wide_k, small_k (p, q) and wide_k (r, s).

    Args:
        wide_first: multiply by wide, then mix: small (p, q * terms), wide (terms * r, s). Else mix first:
            small (p * terms, q), wide (r, terms * s).
        small_left: whether the small factor stands on the left of the product.
    """

    p: int
    q: int
    r: int
    s: int
    terms: int
    wide_first: bool
    small_left: bool

    @property
    def between(self) -> int:
        """Numbers per token between the two products."""
        return self.terms * (self.q * self.r if self.wide_first else self.p * self.s)


def kron_linear(
    x: Tensor, small: Tensor, wide: Tensor, bias: Tensor | None, form: KronForm, *, rows: int
) -> Tensor:
    """x (..., q * s) -> the first `rows` of p * r outputs, plus bias (rows,).

    What it keeps for the backward pass is x and the factors, as a dense layer does. Under autocast it computes in the
    dtype that a dense layer would.

    Raises:
        StructureError: x has another last size.
    """
    cols = form.q * form.s
    if x.shape[-1:] != (cols,):
        raise StructureError(f"this product takes (..., {cols}) and got {tuple(x.shape)}: the last sizes must agree")
    lead = x.shape[:-1]
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        x, small, wide = _narrow(x), _narrow(small), _narrow(wide)
        bias = None if bias is None else _narrow(bias)
    x = x.reshape(-1, cols).contiguous()
    padded = rows != form.p * form.r
    y = _apply(x, small, wide, None if padded else bias, form)
    if padded:
        y = y[:, :rows].contiguous() if bias is None else y[:, :rows] + bias
    return y.view(*lead, rows)


def _narrow(tensor: Tensor) -> Tensor:
    """The tensor as autocast would hand it to a matrix product."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _apply(x: Tensor, small: Tensor, wide: Tensor, bias: Tensor | None, form: KronForm) -> Tensor:
    """x (tokens, q * s) -> (tokens, p * r), all contiguous and of one dtype and device."""
    tensors = (x, small, wide) if bias is None else (x, small, wide, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        y: Tensor = _KronLinear.apply(x, small, wide, bias, form)
        return y
    return _product(x, small, wide, bias, form)


def _product(x: Tensor, small: Tensor, wide: Tensor, bias: Tensor | None, form: KronForm) -> Tensor:
    tokens = x.shape[0]
    step = max(1, PART_BYTES // (form.between * x.element_size()))
    if tokens <= step or x.device.type != "cpu":
        return _part(x, small, wide, bias, form, None)
    y = x.new_empty(tokens, form.p * form.r)
    for start in range(0, tokens, step):
        _part(x[start : start + step], small, wide, bias, form, y[start : start + step])
    return y


def _part(
    x: Tensor, small: Tensor, wide: Tensor, bias: Tensor | None, form: KronForm, out: Tensor | None
) -> Tensor:
    """Product of some tokens, in `out` where one is given."""
    p, q, r, s, k = form.p, form.q, form.r, form.s, form.terms
    n = x.shape[0]
    x = x if form.small_left else _swap(x, s, q)
    target = out if form.small_left else None
    if form.wide_first:
        z = torch.mm(x.view(n * q, s), wide.t()).view(n, q * k, r)
        y = torch.bmm(small.expand(n, p, q * k), z, out=None if target is None else target.view(n, p, r))
    else:
        z = torch.bmm(small.expand(n, p * k, q), x.view(n, q, s)).view(n * p, k * s)
        y = torch.mm(z, wide.t(), out=None if target is None else target.view(n * p, r))
    y = y.view(n, p * r)
    if out is not None and target is None:
        y = out.copy_(_swap(y, p, r))
    elif not form.small_left:
        y = _swap(y, p, r)
    return y if bias is None else y.add_(bias)


def _swap(x: Tensor, a: int, b: int) -> Tensor:
    """(n, a * b) -> (n, b * a), each row transposed as a grid (a, b).

    `channel_shuffle` is this transpose with vector instructions on a CPU: 4 times faster than a transposed copy in
    float32, no slower in bfloat16.
    """
    if a == 1 or b == 1 or x.shape[0] == 0:
        return x
    if x.device.type != "cpu":
        return x.view(-1, a, b).mT.reshape(x.shape)
    pixels = x.view(1, -1, 1, a * b).permute(0, 3, 1, 2)  # one image of n pixels, its channels last in memory
    return F.channel_shuffle(pixels, a).permute(0, 2, 3, 1).reshape(x.shape).contiguous()


class _KronLinear(torch.autograd.Function):
    """`_product` with a backward pass that costs two wide products, as a dense layer's does, and one more if p > q.

    The gradients are written with differentiable operations on the saved inputs, so they can be differentiated again.
    """

    @staticmethod
    def forward(x: Tensor, small: Tensor, wide: Tensor, bias: Tensor | None, form: KronForm) -> Tensor:
        return _product(x, small, wide, bias, form)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, bias, form = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.form = form

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, small, wide = ctx.saved_tensors
        form, needs = ctx.form, ctx.needs_input_grad
        bias_grad = grad.sum(0) if needs[3] else None
        return *_gradients(grad, x, small, wide, form, needs), bias_grad, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dsmall: Tensor | None, dwide: Tensor | None, dbias: Tensor | None, _: Any) -> Any:
        x, small, wide = ctx.saved_tensors
        changes = ((dx, small, wide), (x, dsmall, wide), (x, small, dwide))
        parts = [_product(*change, None, ctx.form) for change in changes if all(t is not None for t in change)]
        return sum(parts) if dbias is None else sum(parts, dbias)


def _gradients(
    grad: Tensor, x: Tensor, small: Tensor, wide: Tensor, form: KronForm, needs: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, small and wide from that of the output (n, p * r).

    With p <= q the output's gradient goes through wide first, and the mixed x is cheap to compute again; else it is
    mixed first, and only the gradient of `small` needs x times wide again.
    """
    p, q, r, s, k = form.p, form.q, form.r, form.s, form.terms
    n = x.shape[0]
    if not form.small_left:
        grad, x = _swap(grad.contiguous(), r, p), _swap(x, s, q)
    grad, x = grad.reshape(n, p, r), x.view(n, q, s)
    order = p > q  # that in which this pass takes the factors; no copy unless there are several terms
    mixer = small if order == form.wide_first else _small_layout(small, form, wide_first=order)
    rows = wide if order == form.wide_first else _wide_layout(wide, form, wide_first=order)
    x_grad = small_grad = wide_grad = None
    if p <= q:
        if needs[0] or needs[1]:
            g = torch.mm(grad.view(n * p, r), rows).view(n, p * k, s)
            x_grad = torch.bmm(mixer.t().expand(n, q, p * k), g) if needs[0] else None
            small_grad = torch.bmm(g, x.mT).sum(0) if needs[1] else None
        if needs[2]:
            z = torch.bmm(mixer.expand(n, p * k, q), x).view(n * p, k * s)
            wide_grad = torch.mm(grad.view(n * p, r).t(), z)
    else:
        if needs[0] or needs[2]:
            g = torch.bmm(mixer.t().expand(n, q * k, p), grad).view(n * q, k * r)
            x_grad = torch.mm(g, rows) if needs[0] else None
            wide_grad = torch.mm(g.t(), x.view(n * q, s)) if needs[2] else None
        if needs[1]:
            z = torch.mm(x.view(n * q, s), rows.t()).view(n, q * k, r)
            small_grad = torch.bmm(grad, z.mT).sum(0)
    if x_grad is not None:
        x_grad = x_grad.view(n, q * s)
        x_grad = x_grad if form.small_left else _swap(x_grad, q, s)
    if order != form.wide_first:
        small_grad = None if small_grad is None else _small_layout(small_grad, form, wide_first=form.wide_first)
        wide_grad = None if wide_grad is None else _wide_layout(wide_grad, form, wide_first=form.wide_first)
    return x_grad, small_grad, wide_grad


def _small_layout(small: Tensor, form: KronForm, *, wide_first: bool) -> Tensor:
    """The small factor, or its gradient, from the layout of the other order to that of the given one."""
    p, q, k = form.p, form.q, form.terms
    if wide_first:
        return small.reshape(p, k, q).transpose(1, 2).reshape(p, q * k)
    return small.reshape(p, q, k).transpose(1, 2).reshape(p * k, q)


def _wide_layout(wide: Tensor, form: KronForm, *, wide_first: bool) -> Tensor:
    """The same for the wide factor."""
    r, s, k = form.r, form.s, form.terms
    if wide_first:
        return wide.reshape(r, k, s).transpose(0, 1).reshape(k * r, s)
    return wide.reshape(k, r, s).transpose(0, 1).reshape(r, k * s)
