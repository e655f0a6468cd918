"""x @ (sum_k left_k (x) right_k).T without building the sum, as few large products, forward and backward.

A token x (cols,) is read as a grid X (q, s) and its output as Y (p, r) = sum_k small_k X wide_k^T: a wide product, and
`mix` by the small factor before or after it. With the small factor on the right, both grids are stored transposed: the
same product between two swaps. Terms lie side by side, so that each step is one product for all of them.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F

from compresskit.errors import StructureError

PART_BYTES = 4 * 2**20
"""On a CPU, tokens are taken in parts: what lies between the two products is at most this large.

It is then still in the cache when the second product reads it, and is not fresh memory each time. Time in parts / at
once at 4096 tokens of 768 x 768 on 2 cores: 2x2 .77, 8x8 .58; about 1 where the system hands out no fresh memory."""


@final
@dataclass(frozen=True)
class KronForm:
    """Sizes and storage of sum_k small_k (x) wide_k, small_k (p, q) and wide_k (r, s).

    Args:
        wide_first: multiply by wide, then mix: small (p, q * terms), wide (terms * r, s). Else mix first:
            small (p * terms, q), wide (r, terms * s).
        small_left: whether the small factor stands on the left of the product.
        rows: outputs that are kept of p * r.
    """

    p: int
    q: int
    r: int
    s: int
    terms: int
    wide_first: bool
    small_left: bool
    rows: int


def kron_linear(x: Tensor, small: Tensor, wide: Tensor, bias: Tensor | None, form: KronForm) -> Tensor:
    """x (..., q * s) -> (..., rows), plus bias (rows,); small and wide in the layout of `form`.

    For the backward pass it keeps x and the factors, as a dense layer does. Under autocast it computes in the dtype
    that a dense layer would.

    Raises:
        StructureError: x has another last size.
    """
    shape, cols = x.shape, form.q * form.s
    if shape[-1:] != (cols,):
        raise StructureError(f"this product takes (..., {cols}) and got {tuple(shape)}: the last sizes must agree")
    if torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type):
        x, small, wide = _narrow(x), _narrow(small), _narrow(wide)
        bias = None if bias is None else _narrow(bias)
    if len(shape) != 2:
        x = x.reshape(-1, cols)
    if not x.is_contiguous():
        x = x.contiguous()
    y = _apply(x, small, wide, bias, form)
    return y if len(shape) == 2 else y.view(*shape[:-1], form.rows)


def _narrow(tensor: Tensor) -> Tensor:
    """The tensor as autocast would hand it to a matrix product."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _apply(x: Tensor, small: Tensor, wide: Tensor, bias: Tensor | None, form: KronForm) -> Tensor:
    """x (tokens, q * s) -> (tokens, rows), all contiguous and of one dtype and device."""
    if form.rows != form.p * form.r:
        full = dataclasses.replace(form, rows=form.p * form.r)
        y = _apply(x, small, wide, None, full)[:, : form.rows]
        return y.contiguous() if bias is None else y + bias
    tensors = (x, small, wide) if bias is None else (x, small, wide, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        result: Tensor = _KronLinear.apply(x, small, wide, bias, form)  # type: ignore[no-untyped-call]
        return result
    return _product(x, small, wide, bias, form)


def _step(x: Tensor, numbers: int) -> int:
    """How many tokens to take at a time, with this many numbers between the products for each."""
    return max(1, PART_BYTES // (numbers * x.element_size())) if x.is_cpu else x.shape[0]


def _product(x: Tensor, small: Tensor, wide: Tensor, bias: Tensor | None, form: KronForm) -> Tensor:
    step = _step(x, form.terms * (form.q * form.r if form.wide_first else form.p * form.s))
    if x.shape[0] <= step:
        return _part(x, small, wide, bias, form, None)
    y = x.new_empty(x.shape[0], form.rows)
    for part, out in zip(x.split(step), y.split(step), strict=True):
        _part(part, small, wide, bias, form, out)
    return y


def _part(x: Tensor, small: Tensor, wide: Tensor, bias: Tensor | None, form: KronForm, out: Tensor | None) -> Tensor:
    """Product of some tokens, in `out` where one is given.

    The bias is laid first and the last product adds to it: 5 to 30 % faster than a sum afterwards.
    """
    p, q, r, s, k = form.p, form.q, form.r, form.s, form.terms
    n = x.shape[0]
    if not form.small_left:
        x = _swap(x, s, q)
        bias = None if bias is None else _swap(bias.view(1, r * p), r, p)
    y = out if out is not None and form.small_left else x.new_empty(n, p * r)
    beta = 0 if bias is None else 1
    if bias is not None:
        y.copy_(bias)
    if form.wide_first:
        grid = y.view(n, p, r)
        z = torch.mm(x.view(n * q, s), wide.t()).view(n, q * k, r)
        torch.baddbmm(grid, small.expand(n, p, q * k), z, beta=beta, out=grid)
    else:
        grid = y.view(n * p, r)
        z = torch.bmm(small.expand(n, p * k, q), x.view(n, q, s)).view(n * p, k * s)
        torch.addmm(grid, z, wide.t(), beta=beta, out=grid)
    if form.small_left:
        return y
    y = _swap(y, p, r)
    return y if out is None else out.copy_(y)


def _swap(x: Tensor, a: int, b: int) -> Tensor:
    """(n, a * b) -> (n, b * a), each row transposed as a grid (a, b).

    On a CPU `channel_shuffle` is this with vector instructions: 4 times faster than a transposed copy from 128 tokens
    on in float32, as fast in bfloat16.
    """
    if a == 1 or b == 1:
        return x
    if not x.is_cpu or x.shape[0] < 16:
        return x.view(-1, a, b).mT.reshape(x.shape)
    pixels = x.view(1, -1, 1, a * b).permute(0, 3, 1, 2)  # one image of n pixels, its channels last in memory
    return F.channel_shuffle(pixels, a).permute(0, 2, 3, 1).reshape(x.shape).contiguous()


class _KronLinear(torch.autograd.Function):
    """`_product` with a backward pass that costs two wide products, as a dense layer's does, and one more if p > q.

    The gradients are differentiable operations on the saved inputs, so they can be differentiated again.
    """

    @staticmethod
    def forward(x: Tensor, small: Tensor, wide: Tensor, bias: Tensor | None, form: KronForm) -> Tensor:
        return _product(x, small, wide, bias, form)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, _, form = inputs
        ctx.save_for_backward(*tensors)
        ctx.form = form

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, small, wide = ctx.saved_tensors
        *needs, needs_bias, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        found = _gradients(grad, x, small, wide, ctx.form, needs)
        return *found, grad.sum(0) if needs_bias else None, None


def _gradients(
    grad: Tensor, x: Tensor, small: Tensor, wide: Tensor, form: KronForm, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of x, small and wide, those that are needed, from that of the output (tokens, p * r)."""
    step = _step(x, form.terms * (form.p * form.s if form.p <= form.q else form.q * form.r))
    if x.shape[0] <= step or torch.is_grad_enabled():  # in one piece, so that it can be differentiated again
        return _part_gradients(grad, x, small, wide, form, needs)
    x_grad = torch.empty_like(x)
    total: list[Tensor | None] = []
    for start in range(0, x.shape[0], step):
        part = slice(start, start + step)
        first, *others = _part_gradients(grad[part], x[part], small, wide, form, needs)
        if first is not None:
            x_grad[part] = first
        if total:
            for old, new in zip(total, others, strict=True):
                _ = None if old is None or new is None else old.add_(new)
        else:
            total = others
    return [x_grad if needs[0] else None, *total]


def _part_gradients(
    grad: Tensor, x: Tensor, small: Tensor, wide: Tensor, form: KronForm, needs: list[bool]
) -> list[Tensor | None]:
    """The same of some tokens.

    With p <= q the output's gradient goes through wide first, and the mixed x is cheap to compute again; else it is
    mixed first, and only the gradient of `small` needs x times wide again.
    """
    p, q, r, s, k = form.p, form.q, form.r, form.s, form.terms
    n, wide_first = x.shape[0], p > q
    if not form.small_left:
        grad, x = _swap(grad, r, p), _swap(x, s, q)
    small, wide = _small_layout(small, form, wide_first), _wide_layout(wide, form, wide_first)
    unmix = small.t().contiguous()
    x_grad = small_grad = wide_grad = None
    if wide_first:
        if needs[0] or needs[2]:
            g = torch.bmm(unmix.expand(n, q * k, p), grad.view(n, p, r)).view(n * q, k * r)
            x_grad = torch.mm(g, wide) if needs[0] else None
            wide_grad = torch.mm(g.t(), x.view(n * q, s)) if needs[2] else None
        if needs[1]:
            z = torch.mm(x.view(n * q, s), wide.t()).view(n, q * k, r)
            small_grad = torch.bmm(grad.view(n, p, r), z.mT).sum(0)
    else:
        if needs[0] or needs[1]:
            g = torch.mm(grad.view(n * p, r), wide).view(n, p * k, s)
            x_grad = torch.bmm(unmix.expand(n, q, p * k), g) if needs[0] else None
            small_grad = torch.bmm(g, x.view(n, q, s).mT).sum(0) if needs[1] else None
        if needs[2]:
            z = torch.bmm(small.expand(n, p * k, q), x.view(n, q, s)).view(n * p, k * s)
            wide_grad = torch.mm(grad.view(n * p, r).t(), z)
    if x_grad is not None:
        x_grad = x_grad.view(n, q * s) if form.small_left else _swap(x_grad.view(n, q * s), q, s)
    stored = dataclasses.replace(form, wide_first=wide_first)
    small_grad = None if small_grad is None else _small_layout(small_grad, stored, form.wide_first)
    wide_grad = None if wide_grad is None else _wide_layout(wide_grad, stored, form.wide_first)
    return [x_grad, small_grad, wide_grad]


def _small_layout(small: Tensor, form: KronForm, wide_first: bool) -> Tensor:
    """`small` of this form in the layout of the given order; copied only if the order differs and terms are several."""
    p, q, k = form.p, form.q, form.terms
    if form.wide_first == wide_first:
        return small
    if wide_first:
        return small.view(p, k, q).transpose(1, 2).reshape(p, q * k)
    return small.view(p, q, k).transpose(1, 2).reshape(p * k, q)


def _wide_layout(wide: Tensor, form: KronForm, wide_first: bool) -> Tensor:
    """The same of `wide`."""
    r, s, k = form.r, form.s, form.terms
    if form.wide_first == wide_first:
        return wide
    if wide_first:
        return wide.view(r, k, s).transpose(0, 1).reshape(k * r, s)
    return wide.view(k, r, s).transpose(0, 1).reshape(r, k * s)
