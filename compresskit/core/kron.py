"""x @ (sum_k left_k (x) right_k).T without building the sum, as few large products, forward and backward.

A token x (cols,) is read as a grid X (q, s) and its output as Y (p, r) = sum_k small_k X wide_k^T: a wide product, and
`mix` by the small factor before or after it. With the small factor on the right, both grids are stored transposed: the
mixing reads or writes one of them as it is where that is quick, and the other is swapped by a copy. Terms lie side by
side, so that each step is one product for all of them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compresskit.core import kron_gpu
from compresskit.core.autograd import narrow, with_signature
from compresskit.core.kron_form import KronForm
from compresskit.errors import StructureError

PART_BYTES = 4 * 2**20
"""On a CPU, tokens are taken in parts: what lies between the two products is at most this large.

It is then still in the cache when the second product reads it, and is not fresh memory each time. Time in parts / at
once at 4096 tokens of 768 x 768 on 2 cores: 2x2 .77, 8x8 .58; about 1 where the system hands out no fresh memory."""
FEW_BYTES = 2**16
"""In training, what lies between the products is kept if it is at most this large, or half as large as the input.

PyTorch's own derivatives then take a third to a half of the time of ours, which compute it again: 70 us less a step."""
FEW_NUMBERS = 2**13
"""A mixing writes or reads a grid of at most this size transposed, whatever its sides: that saves a call."""
FEW_NARROW = 2**16
"""On a CPU a mixing of bfloat16 that writes at most this many numbers is done in float32: oneDNN takes 40 us a call.

A layer of 768 x 768 then takes about .88 of the time at 16 to 64 tokens; at 128 there is no difference any more."""
LEAST_READ = 8
"""A mixing reads a transposed grid as quickly as a straight one from this side on; at a side of 2, half as fast."""
LEAST_WRITTEN = 4
"""It writes one as quickly if its output's side is this many times its input's; else in three to six times the time."""


def kron_linear(x: Tensor, small: Tensor, wide: Tensor, bias: Tensor | None, form: KronForm) -> Tensor:
    """x (..., q * s) -> (..., rows), plus bias (rows,); small and wide in the layout of `form`.

    For the backward pass it keeps x and the factors, as a dense layer does, and little else (`FEW_BYTES`). Under
    autocast it computes in the dtype that a dense layer would.

    Raises:
        StructureError: x has another last size.
    """
    shape, cols = x.shape, form.cols
    if not shape or shape[-1] != cols:
        raise StructureError(f"this product takes (..., {cols}) and got {tuple(shape)}: the last sizes must agree")
    if torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type):
        x, small, wide = narrow(x), narrow(small), narrow(wide)
        bias = None if bias is None else narrow(bias)
    if not x.is_contiguous():
        x = x.contiguous()
    if form.rows == form.p * form.r:
        y = _product(x, small, wide, bias, form)
    else:
        y = _product(x, small, wide, None, form)[:, : form.rows]
        y = y.contiguous() if bias is None else y + bias
    return y if len(shape) == 2 else y.view(*shape[:-1], form.rows)


def swaps(form: KronForm) -> tuple[bool, bool]:
    """Whether input and output are swapped by a copy of their own when tokens are many."""
    if form.small_left:
        return False, False
    if form.wide_first:
        return form.q > 1, form.p > 1 and form.p < LEAST_WRITTEN * form.q * form.terms
    return form.q < LEAST_READ, form.p > 1


def _product(x: Tensor, small: Tensor, wide: Tensor, bias: Tensor | None, form: KronForm) -> Tensor:
    """x (..., q * s) -> (tokens, p * r), all contiguous and of one dtype and device."""
    if torch.compiler.is_compiling():
        x = x.view(-1, form.cols)
        return _part(x, x.shape[0], small, wide, bias, form, None)
    n = x.numel() // form.cols
    if torch.is_grad_enabled():
        tensors = (x, small, wide) if bias is None else (x, small, wide, bias)
        if any(tensor.requires_grad for tensor in tensors) and not _few(x, n, form):
            result: Tensor = _KronLinear.apply(x.view(n, form.cols), small, wide, bias, form)  # type: ignore[no-untyped-call]
            return result
    return _parts(x, n, small, wide, bias, form)


def _few(x: Tensor, n: int, form: KronForm) -> bool:
    """Whether training may keep what lies between the products."""
    little = 2 * form.between <= form.cols or n * form.between * x.element_size() <= FEW_BYTES
    return little and n <= _step(x, form.between)


def _step(x: Tensor, numbers: int) -> int:
    """How many tokens to take at a time, with this many numbers between the products for each."""
    return max(1, PART_BYTES // (numbers * x.element_size())) if x.is_cpu else max(1, x.numel())


def _parts(x: Tensor, n: int, small: Tensor, wide: Tensor, bias: Tensor | None, form: KronForm) -> Tensor:
    """The product: by a kernel of ours where one is quicker, else in parts of tokens where it is large."""
    if x.is_cuda and (found := kron_gpu.product(x, n, small, wide, bias, form)) is not None:
        return found
    step = _step(x, form.between)
    if n <= step:
        return _part(x, n, small, wide, bias, form, None)
    y = x.new_empty(n, form.p * form.r)
    for part, out in zip(x.view(n, form.cols).split(step), y.split(step), strict=True):
        _part(part, part.shape[0], small, wide, bias, form, out)
    return y


def _part(
    x: Tensor, n: int, small: Tensor, wide: Tensor, bias: Tensor | None, form: KronForm, out: Tensor | None
) -> Tensor:
    """Product of n tokens (n, p * r), in `out` where one is given; without it, PyTorch can differentiate it.

    The bias is laid first and the last product adds to it: 5 to 30 % faster than a sum afterwards.
    """
    p, q, r, s, k = form.p, form.q, form.r, form.s, form.terms
    if not form.wide_first:
        z = _mixed(small, _read(x, n, q, s, form), n).view(n * p, k * s)
        return _wide_last(z, n, wide, bias, form, out)
    rows = x if form.small_left else _swap(x.view(n, s * q), s, q)
    z = _grids(F.linear(rows.view(n * q, s), wide), n, q * k, r)
    if form.small_left:
        return _mixed(small, z, n, None if bias is None else bias.view(p, r), out).view(n, p * r)
    if n * p * r <= FEW_NUMBERS or not swaps(form)[1]:
        return _mixed(z.mT, small.t(), n, None if bias is None else bias.view(r, p), out).view(n, r * p)
    y = _mixed(small, z, n, None if bias is None else _swap(bias.view(1, r * p), r, p).view(p, r))
    return _into(_swap(y.view(n, p * r), p, r), out)


def _wide_last(z: Tensor, n: int, wide: Tensor, bias: Tensor | None, form: KronForm, out: Tensor | None) -> Tensor:
    """z (n * p, terms * s) @ wide.T + bias, read as (n, p * r) or, with the small factor right, as (n, r * p)."""
    p, r = form.p, form.r
    if p == 1 and out is None:
        return F.linear(z, wide, bias)
    if out is None and (torch.is_grad_enabled() or torch.compiler.is_compiling() or n * p * r <= FEW_NUMBERS):
        y = F.linear(z, wide).view(n, p * r)
        y = y if form.small_left else _swap(y, p, r)
        return y if bias is None else y + bias
    y = out if out is not None and form.small_left else z.new_empty(n, p * r)
    if bias is not None:
        y.copy_(bias if form.small_left else _swap(bias.view(1, r * p), r, p))
    torch.addmm(y.view(n * p, r), z, wide.t(), beta=0 if bias is None else 1, out=y.view(n * p, r))
    return y if form.small_left else _into(_swap(y, p, r), out)


def _into(y: Tensor, out: Tensor | None) -> Tensor:
    return y if out is None else out.copy_(y)


def _grids(x: Tensor, n: int, rows: int, cols: int) -> Tensor:
    """(n, rows, cols), or (rows, cols) of one token: a plain product takes fewer calls than a batch of one."""
    return x.view(rows, cols) if n == 1 else x.view(n, rows, cols)


def _read(x: Tensor, n: int, rows: int, cols: int, form: KronForm) -> Tensor:
    """Grids for a mixing to read: a view, unless they lie transposed and a copy is quicker to read."""
    if form.small_left:
        return _grids(x, n, rows, cols)
    if rows >= LEAST_READ or x.numel() <= FEW_NUMBERS:
        return _grids(x, n, cols, rows).mT
    return _grids(_swap(x.view(n, rows * cols), cols, rows), n, rows, cols)


def _mixed(left: Tensor, right: Tensor, n: int, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`left @ right + bias`, one of both a matrix and the other `_grids`, as grids; in `out` where one is given."""
    if left.dtype == torch.bfloat16 and out is None and _is_quicker_wide(left, n * left.shape[-2] * right.shape[-1], n):
        return _mixed(left.float(), right.float(), n, None if bias is None else bias.float()).bfloat16()
    out = None if out is None else _grids(out, n, left.shape[-2], right.shape[-1])
    if n == 1:
        return torch.mm(left, right, out=out) if bias is None else torch.addmm(bias, left, right, out=out)
    left, right = left.expand(n, -1, -1), right.expand(n, -1, -1)
    return torch.bmm(left, right, out=out) if bias is None else torch.baddbmm(bias, left, right, out=out)


def _is_quicker_wide(x: Tensor, written: int, n: int) -> bool:
    """Whether to mix in float32, which keeps more for a backward pass, so not where PyTorch differentiates."""
    here = x.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return here and n > 1 and written <= FEW_NARROW


def _swap(x: Tensor, a: int, b: int) -> Tensor:
    """(n, a * b) -> (n, b * a), each row transposed as a grid (a, b).

    On a CPU `channel_shuffle` is this with vector instructions: 4 times faster than a transposed copy from 128 tokens
    on in float32, as fast in bfloat16.
    """
    if a == 1 or b == 1:
        return x
    if not x.is_cpu or x.shape[0] < 32:
        return x.view(-1, a, b).mT.reshape(x.shape)
    pixels = x.view(1, -1, 1, a * b).permute(0, 3, 1, 2)  # one image of n pixels, its channels last in memory
    return F.channel_shuffle(pixels, a).permute(0, 2, 3, 1).reshape(x.shape).contiguous()


@with_signature
class _KronLinear(torch.autograd.Function):
    """`_parts` with a backward pass that costs two wide products, as a dense layer's does, and one more if p > q.

    The gradients are differentiable operations on the saved inputs, so they can be differentiated again.
    """

    @staticmethod
    def forward(x: Tensor, small: Tensor, wide: Tensor, bias: Tensor | None, form: KronForm) -> Tensor:
        return _parts(x, x.shape[0], small, wide, bias, form)

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
    wide_first = form.p > form.q
    factors = (
        _small_layout(small, form, form.wide_first, wide_first),
        _wide_layout(wide, form, form.wide_first, wide_first),
    )
    part_of = _wide_first_gradients if wide_first else _mix_first_gradients
    step = _step(x, form.terms * (form.q * form.r if wide_first else form.p * form.s))
    if x.shape[0] <= step or torch.is_grad_enabled():  # in one piece, so that it can be differentiated again
        x_grad, *total = part_of(grad, x, *factors, form, needs)
    else:
        x_grad, total = torch.empty_like(x) if needs[0] else None, []
        for start in range(0, x.shape[0], step):
            part = slice(start, start + step)
            first, *others = part_of(grad[part], x[part], *factors, form, needs)
            if x_grad is not None and first is not None:
                x_grad[part] = first
            for old, new in zip(total, others, strict=False):
                _ = None if old is None or new is None else old.add_(new)
            total = total or others
    small_grad, wide_grad = total
    small_grad = None if small_grad is None else _small_layout(small_grad, form, wide_first, form.wide_first)
    wide_grad = None if wide_grad is None else _wide_layout(wide_grad, form, wide_first, form.wide_first)
    return [x_grad, small_grad, wide_grad]


def _wide_first_gradients(
    grad: Tensor, x: Tensor, small: Tensor, wide: Tensor, form: KronForm, needs: list[bool]
) -> list[Tensor | None]:
    """Of some tokens and p > q: the output's gradient is mixed first, that of `small` needs x times wide again."""
    p, q, r, s, k = form.p, form.q, form.r, form.s, form.terms
    n = x.shape[0]
    upstream = _read(grad, n, p, r, form)
    if needs[1] or needs[2]:
        rows = (x if form.small_left else _swap(x, s, q)).view(n * q, s)
    x_grad = small_grad = wide_grad = None
    if needs[0] or needs[2]:
        g = _mixed(small.t(), upstream, n).view(n * q, k * r)
        if needs[0]:
            x_grad = torch.mm(g, wide).view(n, q * s)
            x_grad = x_grad if form.small_left else _swap(x_grad, q, s)
        wide_grad = torch.mm(g.t(), rows) if needs[2] else None
    if needs[1]:
        z = _grids(F.linear(rows, wide), n, q * k, r)
        small_grad = _contracted(upstream, z)
    return [x_grad, small_grad, wide_grad]


def _mix_first_gradients(
    grad: Tensor, x: Tensor, small: Tensor, wide: Tensor, form: KronForm, needs: list[bool]
) -> list[Tensor | None]:
    """Of some tokens and p <= q: the output's gradient goes through wide first, the mixed x is cheap to have again."""
    p, q, r, s, k = form.p, form.q, form.r, form.s, form.terms
    n = x.shape[0]
    rows = (grad if form.small_left else _swap(grad, r, p)).view(n * p, r)
    x_grid = _read(x, n, q, s, form) if needs[1] or needs[2] else x
    x_grad = small_grad = wide_grad = None
    if needs[0] or needs[1]:
        g = _grids(torch.mm(rows, wide), n, p * k, s)
        if needs[0] and not form.small_left and (q >= LEAST_WRITTEN * p * k or n * q * s <= FEW_NUMBERS):
            x_grad = _mixed(g.mT, small, n).view(n, s * q)
        elif needs[0]:
            x_grad = _mixed(small.t(), g, n).view(n, q * s)
            x_grad = x_grad if form.small_left else _swap(x_grad, q, s)
        small_grad = _contracted(g, x_grid) if needs[1] else None
    if needs[2]:
        wide_grad = torch.mm(rows.t(), _mixed(small, x_grid, n).view(n * p, k * s))
    return [x_grad, small_grad, wide_grad]


def _contracted(left: Tensor, right: Tensor) -> Tensor:
    """Sum over the tokens of `left @ right.T`, both grids."""
    return torch.mm(left, right.mT) if left.dim() == 2 else torch.bmm(left, right.mT).sum(0)


def _small_layout(small: Tensor, form: KronForm, stored: bool, wide_first: bool) -> Tensor:
    """`small` stored for one order in the layout of another; copied only if they differ and terms are several."""
    p, q, k = form.p, form.q, form.terms
    if stored == wide_first:
        return small
    if wide_first:
        return small.view(p, k, q).transpose(1, 2).reshape(p, q * k)
    return small.view(p, q, k).transpose(1, 2).reshape(p * k, q)


def _wide_layout(wide: Tensor, form: KronForm, stored: bool, wide_first: bool) -> Tensor:
    """The same of `wide`."""
    r, s, k = form.r, form.s, form.terms
    if stored == wide_first:
        return wide
    if wide_first:
        return wide.view(r, k, s).transpose(0, 1).reshape(k * r, s)
    return wide.view(k, r, s).transpose(0, 1).reshape(r, k * s)
