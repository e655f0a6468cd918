"""Triton kernels of the Kronecker product of a layer. Imports triton: import it late, and only for CUDA tensors.

A token x is a grid X (q, s), its output the grid Y (p, r) = sum_k small_k X wide_k^T. Row j of the grids of a block of
tokens is a tile of its own, so that mixing by the small factor is a sum of whole tiles: it stays in the registers of
each thread. A kernel that mixed along an axis of one tile would send every number through other threads.

With the small factor on the right the grids are stored transposed: tiles are read and written as they lie, and taken
apart and joined in registers. Either order of contraction reads factors that were stored for the other one. Sizes and
strides of factors are integers below 2^31; those of x and y may be larger.
"""

import math
from functools import cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from compresskit.core.kron_form import KronForm
from compresskit.core.kron_gpu import Tiles


@triton.jit
def _entry(small, i, j, k, P: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, STORED_WIDE_FIRST: tl.constexpr):
    """small_k[i, j] in float32."""
    at = (i * Q + j) * K + k if STORED_WIDE_FIRST else (i * K + k) * Q + j
    return tl.load(small + at).to(tl.float32)


@triton.jit
def _wide_tile(wide, k, m, l, r, s, K: tl.constexpr, STORED_WIDE_FIRST: tl.constexpr):
    """wide_k[m, l] transposed, (l, m)."""
    at = (k * r + m)[None, :] * s if STORED_WIDE_FIRST else (m * K + k)[None, :] * s
    return tl.load(wide + at + l[:, None], mask=(m < r)[None, :] & (l < s)[:, None], other=0.0)


@triton.jit
def _grid_row(x, rows, j, l, inside, s, Q: tl.constexpr, SMALL_LEFT: tl.constexpr):
    """Row j of the grids of some tokens, (tokens, l); `rows` (tokens, 1) is where each token begins."""
    at = j * s + l if SMALL_LEFT else l * Q + j
    return tl.load(x + rows + at[None, :], mask=inside & (l < s)[None, :], other=0.0)


@triton.jit
def _columns(tile, BT: tl.constexpr, WIDTH: tl.constexpr, Q: tl.constexpr):
    """Every Q-th column of a tile (BT, WIDTH), as Q tiles: the rows of grids that are stored transposed."""
    columns = (tile,)
    if Q > 1:
        even, odd = tl.split(tl.reshape(tile, (BT, WIDTH // 2, 2)))
        evens, odds = _columns(even, BT, WIDTH // 2, Q // 2), _columns(odd, BT, WIDTH // 2, Q // 2)
        columns = ()
        for j in tl.static_range(Q // 2):
            columns += (evens[j], odds[j])
    return columns


@triton.jit
def _joined(tiles, FIRST: tl.constexpr, STEP: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr, P: tl.constexpr):
    """The P tiles FIRST, FIRST + STEP, ... (BT, BM) column by column, (BT, P * BM): what `_columns` undoes."""
    joined = tiles[FIRST]
    if P > 1:
        even = _joined(tiles, FIRST, 2 * STEP, BT, BM, P // 2)
        odd = _joined(tiles, FIRST + STEP, 2 * STEP, BT, BM, P // 2)
        joined = tl.reshape(tl.join(even, odd), (BT, P * BM))
    return joined


@triton.jit
def _grid(x, rows, start, inside, s, Q: tl.constexpr, SMALL_LEFT: tl.constexpr, BT: tl.constexpr, BL: tl.constexpr):
    """All rows of the grids of some tokens, from column `start` on: q tiles (BT, BL)."""
    if not SMALL_LEFT and Q & (Q - 1) == 0:  # stored transposed: read as it lies
        column = start * Q + tl.arange(0, BL * Q)
        tile = tl.load(x + rows + column[None, :], mask=inside & (column < s * Q)[None, :], other=0.0)
        tiles = _columns(tile, BT, BL * Q, Q)
    else:
        tiles = ()
        for j in tl.static_range(Q):
            tiles += (_grid_row(x, rows, j, start + tl.arange(0, BL), inside, s, Q, SMALL_LEFT),)
    return tiles


@triton.jit
def _zeros(count: tl.constexpr, rows: tl.constexpr, cols: tl.constexpr):
    """A tuple of tiles."""
    tiles = ()
    for _ in tl.static_range(count):
        tiles += (tl.zeros((rows, cols), tl.float32),)
    return tiles


@triton.jit
def _add_mixed(total, tiles, i, k, small, P: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, STORED: tl.constexpr):
    """total + sum_j small_k[i, j] tiles[j]."""
    for j in tl.static_range(Q):
        total += _entry(small, i, j, k, P, Q, K, STORED) * tiles[j].to(tl.float32)
    return total


@triton.jit
def _store(y, bias, tile, i, rows, m, inside, r, P: tl.constexpr, SMALL_LEFT: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Row i of the output's grids; `rows` (tokens, 1) is where each token's output begins."""
    at = i * r + m if SMALL_LEFT else m * P + i
    if HAS_BIAS:
        tile += tl.load(bias + at, mask=m < r, other=0.0).to(tl.float32)[None, :]
    tl.store(y + rows + at[None, :], tile.to(y.dtype.element_ty), mask=inside & (m < r)[None, :])


@triton.jit
def _store_all(
    y, bias, tiles, rows, block, inside, r,
    P: tl.constexpr, SMALL_LEFT: tl.constexpr, HAS_BIAS: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """All rows of the output's grids, p tiles (BT, BM) of the wide factor's `block` of rows."""
    if not SMALL_LEFT and P & (P - 1) == 0:  # stored transposed: written as it lies
        column = block * (BM * P) + tl.arange(0, BM * P)
        _store(y, bias, _joined(tiles, 0, 1, BT, BM, P), 0, rows, column, inside, r * P, 1, True, HAS_BIAS)
    else:
        for i in tl.static_range(P):
            _store(y, bias, tiles[i], i, rows, block * BM + tl.arange(0, BM), inside, r, P, SMALL_LEFT, HAS_BIAS)


@triton.jit
def _wide_products(
    x, wide, k, x_rows, m, inside, r, s,
    Q: tl.constexpr, K: tl.constexpr, STORED: tl.constexpr, SMALL_LEFT: tl.constexpr,
    BT: tl.constexpr, BM: tl.constexpr, BL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X wide_k^T of each row of the grids: q tiles (BT, BM)."""
    tiles = _zeros(Q, BT, BM)
    for start in range(0, s, BL):
        factor = _wide_tile(wide, k, m, start + tl.arange(0, BL), r, s, K, STORED)
        grid = _grid(x, x_rows, start, inside, s, Q, SMALL_LEFT, BT, BL)
        summed = ()
        for j in tl.static_range(Q):
            summed += (tl.dot(grid[j], factor, tiles[j], input_precision=PRECISION),)
        tiles = summed
    return tiles


@triton.jit
def _place(n, width, BT: tl.constexpr, BM: tl.constexpr):
    """This program's block of columns, its tokens (BT, 1), its columns (BM,), and which of the n tokens there are."""
    blocks = tl.cdiv(width, BM)
    block = tl.program_id(0) % blocks
    t = ((tl.program_id(0) // blocks).to(tl.int64) * BT + tl.arange(0, BT))[:, None]
    return block, t, block * BM + tl.arange(0, BM), t < n


@triton.jit(do_not_specialize=["n"])
def wide_first(
    x, small, wide, bias, y, n, r_units, s_units,
    R_UNIT: tl.constexpr, S_UNIT: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
    STORED: tl.constexpr, SMALL_LEFT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BT: tl.constexpr, BM: tl.constexpr, BL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = x @ W.T + bias: products by the wide factor, mixed in the epilogue. Holds q tiles, and p more if K > 1."""
    r, s = r_units * R_UNIT, s_units * S_UNIT
    block, t, m, inside = _place(n, r, BT, BM)
    x_rows, y_rows = t * (Q * s), t * (P * r)
    if K == 1 and SMALL_LEFT:  # each row is stored before the next one is mixed
        tiles = _wide_products(x, wide, 0, x_rows, m, inside, r, s, Q, K, STORED, SMALL_LEFT, BT, BM, BL, PRECISION)
        for i in tl.static_range(P):
            tile = _add_mixed(tl.zeros((BT, BM), tl.float32), tiles, i, 0, small, P, Q, K, STORED)
            _store(y, bias, tile, i, y_rows, m, inside, r, P, SMALL_LEFT, HAS_BIAS)
    else:
        totals = _zeros(P, BT, BM)
        for k in range(K):
            tiles = _wide_products(x, wide, k, x_rows, m, inside, r, s, Q, K, STORED, SMALL_LEFT, BT, BM, BL, PRECISION)
            summed = ()
            for i in tl.static_range(P):
                summed += (_add_mixed(totals[i], tiles, i, k, small, P, Q, K, STORED),)
            totals = summed
        _store_all(y, bias, totals, y_rows, block, inside, r, P, SMALL_LEFT, HAS_BIAS, BT, BM)


@triton.jit(do_not_specialize=["n"])
def mix_first(
    x, small, wide, bias, y, n, r_units, s_units,
    R_UNIT: tl.constexpr, S_UNIT: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, K: tl.constexpr,
    STORED: tl.constexpr, SMALL_LEFT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BT: tl.constexpr, BM: tl.constexpr, BL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = x @ W.T + bias: x is mixed in the prologue, then multiplied by the wide factor. Holds p tiles."""
    r, s = r_units * R_UNIT, s_units * S_UNIT
    block, t, m, inside = _place(n, r, BT, BM)
    x_rows, y_rows = t * (Q * s), t * (P * r)
    totals = _zeros(P, BT, BM)
    for start in range(0, s, BL):
        grid = _grid(x, x_rows, start, inside, s, Q, SMALL_LEFT, BT, BL)
        for k in tl.static_range(K):
            factor = _wide_tile(wide, k, m, start + tl.arange(0, BL), r, s, K, STORED)
            summed = ()
            for i in tl.static_range(P):
                mixed = _add_mixed(tl.zeros((BT, BL), tl.float32), grid, i, k, small, P, Q, K, STORED)
                summed += (tl.dot(mixed.to(factor.dtype), factor, totals[i], input_precision=PRECISION),)
            totals = summed
    _store_all(y, bias, totals, y_rows, block, inside, r, P, SMALL_LEFT, HAS_BIAS, BT, BM)


@triton.jit(do_not_specialize=["n"])
def mix(
    z, left, bias, y, n, units,
    UNIT: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr, HAS_BIAS: tl.constexpr,
    BT: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """y = left (OUTS, INS) @ z + bias for n grids z (INS, width) -> y (OUTS, width): one pass over memory."""
    width = units * UNIT
    _, t, m, inside = _place(n, width, BT, BM)
    rows = t * (INS * width)
    tiles = ()
    for j in tl.static_range(INS):
        tiles += (_grid_row(z, rows, j, m, inside, width, INS, True),)
    for i in tl.static_range(OUTS):
        tile = _add_mixed(tl.zeros((BT, BM), tl.float32), tiles, i, 0, left, OUTS, INS, 1, True)
        _store(y, bias, tile, i, t * (OUTS * width), m, inside, width, OUTS, True, HAS_BIAS)


_compiled: dict[tuple[Any, ...], Any] = {}


def fused(
    x: Tensor,
    n: int,
    small: Tensor,
    wide: Tensor,
    bias: Tensor | None,
    y: Tensor,
    form: KronForm,
    tiles: Tiles,
    precision: str,
) -> None:
    """Writes x (n, q * s) @ W.T + bias to y (n, p * r); all contiguous, of one dtype and on the current device.

    Args:
        x, small, wide, bias, y: n >= 1 tokens; factors in the layout of `form`.
        n: tokens.
        form: sizes of the product.
        tiles: how the work is cut.
        precision: of float32 products, `ieee` or `tf32`.
    """
    kernel, constants = plan_fused(form, tiles, bias is not None, precision)
    programs = -(-n // tiles.tokens) * -(-form.r // tiles.wide)
    tensors = (x, small, wide, x if bias is None else bias, y)
    sizes = form.r // constants[0], form.s // constants[1]
    _launch(kernel, programs, tensors, n, sizes, constants, tiles.warps, tiles.stages)


@cache
def plan_fused(form: KronForm, tiles: Tiles, has_bias: bool, precision: str) -> tuple[Any, tuple[Any, ...]]:
    """The kernel of the order with fewer products by the wide factor, and its constants.

    Sizes are passed in units of which the compiler knows: several numbers are then read at once.
    """
    kernel = wide_first if form.q <= form.p else mix_first
    sizes = form.p, form.q, form.terms, form.wide_first, form.small_left, has_bias
    return kernel, (
        math.gcd(form.r, 16),
        math.gcd(form.s, 16),
        *sizes,
        tiles.tokens,
        tiles.wide,
        tiles.inner,
        precision,
    )


def mixed(z: Tensor, n: int, left: Tensor, bias: Tensor | None, y: Tensor, width: int) -> None:
    """Writes left (outs, ins) @ z + bias to y (n, outs, width), z (n, ins, width); bias (outs, width).

    Shapes are as said after a `view`; all contiguous, of one dtype and on the current device, n >= 1.
    """
    outs, ins = left.shape
    across = min(256, triton.next_power_of_2(width))
    tokens = max(1, 4096 // (across * triton.next_power_of_2(ins)))
    programs = -(-n // tokens) * -(-width // across)
    tensors = (z, left, z if bias is None else bias, y)
    unit = math.gcd(width, 16)
    _launch(mix, programs, tensors, n, (width // unit,), (unit, outs, ins, bias is not None, tokens, across), 4, 1)


def _launch(
    kernel: Any,
    programs: int,
    tensors: tuple[Tensor, ...],
    n: int,
    sizes: tuple[int, ...],
    constants: tuple[Any, ...],
    warps: int,
    stages: int,
) -> None:
    """Starts a kernel, compiled for these sizes; by a shorter way than Triton's own, which inspects every argument."""
    grid, first = (programs, 1, 1), tensors[0]
    if knobs.runtime.interpret or any(tensor.data_ptr() % 16 for tensor in tensors):
        kernel[grid](*tensors, n, *sizes, *constants, num_warps=warps, num_stages=stages)
        return
    key = (kernel.fn, first.dtype, first.get_device(), sizes, constants, warps, stages)
    found = _compiled.get(key)
    if found is None:
        found = kernel.warmup(*tensors, n, *sizes, *constants, grid=grid, num_warps=warps, num_stages=stages)
        _compiled[key] = found
    found[grid](*tensors, n, *sizes, *constants)
