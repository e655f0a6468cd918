"""Multiplication of one axis in the middle of an activation, as small products of one batch, and of two axes."""

import torch
from torch import Tensor

from compresskit.core.cost import Gemm, Operation, Pass
from compresskit.core.structure import Factor, linear, tensor_of

Pair = tuple[int, int]


def mix(first: Tensor, grid: Tensor, bias: Tensor | None = None) -> Tensor:
    """`first @ grid + bias` with the last two axes flattened, without a transposed copy.

    Measured against `torch.matmul`, which transposes the grid there and back to make one product of it: 3 x faster
    forward, 2 x with the backward pass (first 24 x 18 and 48 x 24; 16 to 4096 tokens). The bias goes into the
    product, because a sum of its own would be one more pass over fresh memory.

    Args:
        first: (out, in).
        grid: (..., in, n).
        bias: (out * n,), or None.

    Returns:
        (..., out * n).
    """
    (rows, inner), n = first.shape, grid.shape[-1]
    batch = grid.reshape(-1, inner, n)
    firsts = first.expand(batch.shape[0], rows, inner)
    y = torch.bmm(firsts, batch) if bias is None else torch.baddbmm(bias.view(rows, n), firsts, batch)
    return y.view(*grid.shape[:-2], rows * n)


def mix_orders(ins: Pair, outs: Pair) -> Pair:
    """Multiply-adds of `mix_both`: last mode before the first one, and after it."""
    (i1, i2), (o1, o2) = ins, outs
    first, last = i1 != o1, i2 != o2
    return i1 * o2 * (i2 * last + o1 * first), o1 * i2 * (i1 * first + o2 * last)


def mix_operations(ins: Pair, outs: Pair, tokens: int) -> list[Operation]:
    """What `mix_both` does, a bias as a pass of its own."""
    (i1, i2), (o1, o2) = ins, outs
    if ins == outs:
        return []
    if i1 == o1 == 1:
        return [Gemm(tokens, o2, i2)]
    last_before, last_after = mix_orders(ins, outs)
    width, height = (o2, i1) if last_before <= last_after else (i2, o1)  # of the grid as the other product finds it
    first = [Gemm(o1, width, i1, batch=tokens)] if i1 != o1 else []
    last = [Gemm(tokens * height, o2, i2)] if i2 != o2 else []
    return [*(last + first if last_before <= last_after else first + last), Pass(2 * tokens * o1 * o2)]


def mix_both(
    x: Tensor, ins: Pair, outs: Pair, first: Factor | None, last: Factor | None, bias: Tensor | None = None
) -> Tensor:
    """(first (x) last) on the last axis, in the cheaper order: (..., product of ins) -> (..., product of outs)."""
    if ins[0] == outs[0] == 1 and last is not None:
        return linear(x, last, bias)
    if ins == outs and bias is None:
        return x
    grid: Tensor = x.unflatten(-1, ins)
    last_before, last_after = mix_orders(ins, outs)
    if first is not None and (last is None or last_before <= last_after):
        grid = grid if last is None else linear(grid, last)
        return mix(tensor_of(first), grid, bias)
    if first is not None:
        grid = mix(tensor_of(first), grid).unflatten(-1, (outs[0], ins[1]))
    y = (grid if last is None else linear(grid, last)).flatten(-2)
    return y if bias is None else y + bias.to(y.dtype)  # under autocast y is narrower
