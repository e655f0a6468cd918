"""The compiled kernel in bfloat16, on a processor that has units for it: sums in float32, rounded once."""

import pytest
import torch

import compresskit
from compresskit.core.native import HALF_DEPTH, HALF_FEW, HALF_LARGEST, HALF_MANY
from compresskit.core.native_build import INCLUDED
from compresskit.decompositions.svd import LowRank
from tests.kernels.cases import error, exact, layer_of, structure_of
from tests.kernels.test_native import CHAINS, KRONECKER, others

HALF = torch.bfloat16
ROUNDED = 2.0**-9  # relative, of one number


def taken(structure, tokens):
    return structure.native is not None and structure.native.takes_half(tokens)


@pytest.mark.parametrize("structure", [*KRONECKER, *CHAINS, *others()], ids=str)
def test_products_are_exact_but_for_rounding(structure, half):
    layer = layer_of(structure, HALF)
    with torch.inference_mode():
        for shape in ((0,), (1,), (3,), (17,), (2, 0), (2, 3, 67)):
            x = torch.randn(*shape, structure.cols, generator=torch.Generator().manual_seed(1)).to(HALF)
            y = layer(x)
            assert half() == (taken(structure, x.numel() // structure.cols), 0)
            assert y.dtype is HALF
            assert y.shape == (*shape, structure.rows)
            assert y.is_contiguous()
            assert not x.numel() or error(y, exact(layer, x)) < 3 * ROUNDED


@pytest.mark.parametrize("threads", [1, 2, 5], indirect=True)
@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 17, 33, 64, 65, 500])
def test_threads_share_tokens_or_products(threads, tokens, half):
    torch.manual_seed(0)
    dense = torch.nn.Linear(256, 256, dtype=HALF)  # PyTorch's own products set up the same units
    for structure in (
        structure_of((4, 2), (192, 320), 2, True),
        structure_of((2, 8), (150, 88), 1, False),
        LowRank(1010, 1280, 304),
    ):
        layer, x = layer_of(structure, HALF), torch.randn(tokens, structure.cols).to(HALF)
        with torch.inference_mode():
            dense(torch.randn(tokens, 256).to(HALF))
            assert error(layer(x), exact(layer, x)) < 3 * ROUNDED
    assert half() == (3, 0)


def test_more_exact_than_products_that_are_rounded_between(half):
    layer, x = layer_of(structure_of((4, 4), (96, 96), 1, True), HALF), torch.randn(200, 384).to(HALF)
    with torch.inference_mode():
        ours = error(layer(x), exact(layer, x))
        with compresskit.use_kernels("pytorch"):
            assert ours < error(layer(x), exact(layer, x))
    assert half() == (1, 0)


def test_what_is_no_number_stays_none(half):
    layer, x = layer_of(LowRank(96, 80, 16), HALF), torch.randn(3, 80).to(HALF)
    x[1, 5], x[2, 5] = float("nan"), float("inf")
    with torch.inference_mode():
        y = layer(x)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()
    assert half() == (1, 0)


@pytest.mark.parametrize("rank", [2, 30, 32, 33, 47, 64, 70])
@pytest.mark.parametrize("sizes", [(130, 96), (97, 74), (71, 130), (75, 93), (384, 384)])
def test_sizes_that_end_within_a_tile(sizes, rank, half):
    layer = layer_of(LowRank(*sizes, rank), HALF)
    with torch.inference_mode():
        for tokens in (1, 40, 65, 79, 96, 97, 300):
            x = torch.randn(tokens, sizes[1], dtype=HALF)
            assert error(layer(x), exact(layer, x)) < 3 * ROUNDED
    assert half() == (7, 0)


@pytest.mark.parametrize("tokens", [31, 200])
def test_nothing_is_read_or_written_beside_rows(tokens, half):
    """Tiles that end within a row, of tensors that others lie around."""
    layer = layer_of(LowRank(37, 75, 33), HALF)
    x = torch.full((tokens + 2, 75), float("nan"), dtype=HALF)
    x[1:-1] = torch.randn(tokens, 75)
    with torch.inference_mode():
        assert error(layer(x[1:-1]), exact(layer, x[1:-1])) < 3 * ROUNDED
    assert half() == (1, 0)


MIXED = [  # steps of both axes in all orders, with groups that do not agree
    ((0, 6, 20, 30), (1, 6, 5, 30), (0, 5, 30, 7)),
    ((0, 4, 16, 64), (1, 8, 3, 32), (2, 3, 32, 0)),
    ((0, 4, 16, 132), (1, 8, 3, 66), (0, 33, 6, 9), (1, 27, 4, 11)),
    ((1, 6, 4, 70), (0, 4, 70, 33), (0, 2, 66, 5), (0, 1, 10, 40)),
    ((2, 5, 16, 0), (1, 16, 8, 5), (2, 8, 5, 0), (0, 5, 8, 32), (1, 5, 2, 32)),
    ((1, 3, 8, 18), (1, 8, 2, 18), (0, 2, 18, 3)),
]


def sides_of(steps):
    """Numbers that go into each step and come out, and shapes of the factors."""
    kinds = {0: lambda g, i, o: (g * i, g * o), 1: lambda i, o, w: (i * w, o * w), 2: lambda a, b, _: (a * b, a * b)}
    sizes = [kinds[kind](*rest) for kind, *rest in steps]
    return sizes, [{0: (c, b), 1: (b, a)}[kind] for kind, a, b, c in steps if kind < 2]


def run_steps(steps, x, factors):
    """The steps one after the other by PyTorch."""
    tokens, given = len(x), iter(factors)
    for kind, a, b, c in steps:
        if kind == 0:
            x = x.reshape(tokens, a, b) @ next(given).T
        else:
            grid = x.reshape(tokens, a, c or b)
            x = next(given) @ grid if kind == 1 else grid.mT
        x = x.reshape(tokens, -1)
    return x


@pytest.mark.parametrize("tokens", [1, 9, 200])
@pytest.mark.parametrize("steps", MIXED, ids=str)
def test_steps_in_any_order(steps, tokens, half):
    torch.manual_seed(0)
    sizes, shapes = sides_of(steps)
    factors = [torch.randn(shape).div(shape[1] ** 0.5).to(HALF) for shape in shapes]
    x, bias = torch.randn(tokens, sizes[0][0]).to(HALF), torch.randn(sizes[-1][1]).to(HALF)
    wanted = run_steps(steps, x.double(), [factor.double() for factor in factors])
    plan = [number for step in steps for number in step]
    found = torch.ops.compresskit.chain.default(x, factors, plan, bias)
    assert error(found, wanted + bias.double()) < 3 * ROUNDED


def test_what_is_never_taken_is_known_before(half):
    counts = (1, 2, HALF_FEW, HALF_FEW + 1, 300, 5000)
    known = [s.native for s in (*KRONECKER, *CHAINS, LowRank(96, 72, 21)) if s.native is not None]
    for one in known:
        taken = [one.takes_half(count, training=way) for count in counts for way in (True, False)]
        assert one.half_ever == any(taken)
    assert {one.half_ever for one in known} == {True, False}
    layer, x = layer_of(LowRank(96, 72, 21), HALF), torch.randn(9, 72).to(HALF)
    with torch.inference_mode():
        assert error(layer(x), exact(layer, x)) < 3 * ROUNDED
    assert half() == (0, 0)


def test_both_sides_mean_the_same_numbers():
    code = "".join(path.read_text("utf-8") for path in INCLUDED)
    assert f"FEW_ROWS = {HALF_FEW};" in code
    assert f"DEPTH = {HALF_DEPTH};" in code


def test_factors_that_no_cache_holds_are_left_to_pytorch_for_some_tokens():
    native = LowRank(4096, 4096, 512).native
    assert HALF_LARGEST <= 4096 * 512
    assert native.takes_half(HALF_FEW)
    assert not native.takes_half(HALF_FEW + 1)
    assert not native.takes_half(HALF_MANY - 1)
    assert native.takes_half(HALF_MANY)
    assert all(LowRank(768, 768, rank).native.takes_half(count) for rank in (33, 96) for count in (1, 100, 10**6))
    assert not LowRank(768, 768, 31).native.takes_half(1)


def test_bias_and_factors_of_another_type_are_refused(half):
    op = torch.ops.compresskit.chain.default
    x, factor = torch.randn(3, 20, dtype=HALF), torch.randn(6, 20, dtype=HALF)
    with pytest.raises(RuntimeError, match="a factor of 120 numbers in bfloat16"):
        op(x, [factor.float()], (0, 1, 20, 6), None)
    with pytest.raises(RuntimeError, match=r"\(\.\.\., 6\) in bfloat16"):
        op(x, [factor], (0, 1, 20, 6), torch.randn(6))
    with pytest.raises(RuntimeError, match="in pairs, and 5 is odd"):
        op(x, [torch.randn(3, 5, dtype=HALF)], (0, 4, 5, 3), None)
