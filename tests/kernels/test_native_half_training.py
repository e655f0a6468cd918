"""Training by the compiled kernel in bfloat16, by itself and under autocast: sums in float32."""

import itertools

import pytest
import torch
from torch import nn

import compresskit
from compresskit.core.kron_form import MOST_TRAINED_HALF, WIDE_TRAINED_HALF
from compresskit.core.native import WIDEST_TRAINED, kernel
from compresskit.decompositions.svd import LowRank
from tests.kernels.cases import error, exact, gradients, layer_of, structure_of
from tests.kernels.test_native import CHAINS, KRONECKER, others
from tests.kernels.test_native_half import HALF, MIXED, ROUNDED, run_steps, sides_of

EXACT = 4 * ROUNDED
ODD = [
    LowRank(97, 81, 33),
    LowRank(64, 35, 34),
    structure_of((4, 2), (33, 47), 1, True),
    structure_of((3, 5), (51, 40), 2, False),
]
STRUCTURES = [*(s for s in KRONECKER[::3] if s.small != (1, 1)), *CHAINS, *others(), *ODD]
"""A gradient that is one number may be a sum that cancels out."""


def autocast():
    return torch.autocast("cpu", HALF)


def exact_gradients(layer, x, upstream):
    """In float64, of the numbers that the layer holds, by the dense weight."""
    factors = {name: value.detach().double().requires_grad_() for name, value in layer.factors().items()}
    x = x.detach().double().requires_grad_()
    bias = None if layer.bias is None else layer.bias.detach().double().requires_grad_()
    y = nn.functional.linear(x, layer.structure.dense(factors), bias)
    by_name = dict(zip(layer.factors(), factors.values(), strict=True))
    names = {id(parameter): name for name, parameter in layer.factors().items()}
    inputs = [bias if p is layer.bias else by_name[names[id(p)]] for p in layer.parameters()]
    return torch.autograd.grad(y, [x, *inputs], upstream.double())


def trained(structure, tokens):
    return structure.native is not None and structure.native.takes_half(tokens, training=True)


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_gradients_are_exact_but_for_rounding(structure, threads, half):
    for tokens in (1, 5, 300):
        torch.manual_seed(tokens)
        layer, x = layer_of(structure, HALF), torch.randn(tokens, structure.cols).to(HALF)
        upstream, by_kernel = torch.randn(tokens, structure.rows).to(HALF), trained(structure, tokens)
        found = gradients(layer, x, upstream)
        assert half() == (by_kernel, by_kernel)
        if by_kernel:
            for ours, theirs in zip(found, exact_gradients(layer, x, upstream), strict=True):
                assert ours.dtype is HALF
                assert ours.shape == theirs.shape
                assert error(ours, theirs) < EXACT


def test_most_structures_of_these_are_trained():
    assert sum(trained(structure, 300) for structure in STRUCTURES) > 20
    assert all(trained(structure, 300) for structure in ODD)


@pytest.mark.parametrize("tokens", [0, 2, 700])
@pytest.mark.parametrize("leading", [(), (2,)])
@pytest.mark.parametrize("narrow_input", [False, True])
def test_autocast_trains_float32_layers(narrow_input, leading, tokens, half):
    structure = structure_of((4, 2), (34, 40), 1, False)
    layer, x = layer_of(structure, torch.float32), torch.randn(*leading, tokens, structure.cols)
    x = x.to(HALF) if narrow_input else x
    upstream = torch.randn(*leading, tokens, structure.rows).to(HALF)
    with autocast():
        found = gradients(layer, x, upstream)
        assert layer(x).dtype is HALF
    assert half() == (2, 1)
    assert [gradient.dtype for gradient in found] == [x.dtype, *[torch.float32] * 3]
    rounded = layer_of(structure, HALF)
    wanted = exact_gradients(rounded, x.to(HALF), upstream)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape == theirs.shape
        assert not tokens or error(ours, theirs) < EXACT


@pytest.mark.parametrize("structure", [structure_of((4, 2), (34, 40), 2, True), LowRank(96, 80, 16)], ids=str)
def test_autocast_without_gradients(structure, half):
    layer, x = layer_of(structure, torch.float32), torch.randn(9, structure.cols)
    with torch.no_grad(), autocast():
        y = layer(x)
        assert layer(x.to(HALF)).equal(y)
    assert half() == (2, 0)
    assert y.dtype is HALF
    assert error(y, exact(layer_of(structure, HALF), x.to(HALF))) < 3 * ROUNDED


def test_gradients_of_factors_are_more_exact_than_those_of_pytorch(half):
    torch.manual_seed(0)
    structure = structure_of((4, 4), (96, 96), 1, True)
    layer, x = layer_of(structure, torch.float32), torch.randn(500, 384)
    upstream = torch.randn(500, 384).to(HALF)
    wanted = exact_gradients(layer_of(structure, HALF), x.to(HALF), upstream)
    with autocast():
        ours = gradients(layer, x, upstream)
        with compresskit.use_kernels("pytorch"):
            theirs = gradients(layer, x, upstream)
    assert half() == (1, 1)
    assert error(ours[0], wanted[0]) <= error(theirs[0], wanted[0])  # in bfloat16, both
    for k in (1, 2, 3):
        assert error(ours[k], wanted[k]) < error(theirs[k], wanted[k])


@pytest.mark.parametrize("small", [(4, 2), (2, 4)])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("wanted", [w for w in itertools.product((True, False), repeat=4) if any(w)], ids=str)
def test_gradients_that_are_wanted_alone(wanted, left, small, half):
    torch.manual_seed(0)
    structure = structure_of(small, (34, 40), 1, left)
    layer, x = layer_of(structure, HALF), torch.randn(70, 40 * small[1]).to(HALF)
    upstream = torch.randn(70, 34 * small[0]).to(HALF)
    all_of_them = exact_gradients(layer, x, upstream)
    found = gradients(layer, x, upstream, wanted)
    assert half() == (1, 1)
    chosen = [gradient for gradient, wants in zip(all_of_them, wanted, strict=True) if wants]
    for ours, theirs in zip(found, chosen, strict=True):
        assert error(ours, theirs) < EXACT


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("tokens", [1, 9, 200])
@pytest.mark.parametrize("steps", [s for s in MIXED if all(b % 2 == c % 2 == 0 for k, _, b, c in s if k == 0)], ids=str)
def test_steps_in_any_order(steps, tokens, threads, half):
    torch.manual_seed(0)
    sizes, shapes = sides_of(steps)
    factors = [torch.randn(shape).div(shape[1] ** 0.5).to(HALF) for shape in shapes]
    x, bias = torch.randn(tokens, sizes[0][0]).to(HALF), torch.randn(sizes[-1][1]).to(HALF)
    upstream = torch.randn(tokens, sizes[-1][1]).to(HALF)
    inputs = [tensor.double().requires_grad_() for tensor in (x, bias, *factors)]
    wanted = torch.autograd.grad(run_steps(steps, inputs[0], inputs[2:]) + inputs[1], inputs, upstream.double())
    plan = [number for step in steps for number in step]
    count = len(inputs)
    alone = [[int(k == other) for k in range(count)] for other in range(count)]
    for needs in ([1] * count, [0, 0] + [1] * len(factors), *alone):
        found = torch.ops.compresskit.chain_backward.default(upstream, x, factors, plan, needs)
        for k, gradient in enumerate(found):
            assert gradient.dtype is (torch.float32 if k else HALF)
            if needs[k]:
                assert gradient.shape == wanted[k].shape
                assert error(gradient, wanted[k]) < 2 * EXACT  # rounded once in each step
            else:
                assert not gradient.numel()


def test_gradients_of_gradients_are_those_of_pytorch(half):
    layer, x = layer_of(structure_of((4, 2), (8, 10), 1, True), torch.float32), torch.randn(7, 20, requires_grad=True)

    def second():
        with autocast():
            y = layer(x)
        (first,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, *layer.parameters()])

    found = second()
    assert half() == (1, 1)
    with compresskit.use_kernels("pytorch"):
        wanted = second()
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype is theirs.dtype
        assert error(ours, theirs.double()) < 0.02


def test_training_keeps_the_input_alone(half):
    layer, x = layer_of(structure_of((4, 2), (34, 40), 1, True), torch.float32), torch.randn(70, 80, requires_grad=True)
    kept = {}
    own = {parameter.data_ptr() for parameter in layer.parameters()}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast():
        layer(x)
    assert half() == (1, 0)
    assert sum(size for pointer, size in kept.items() if pointer not in own) == 2 * x.numel()


def test_a_model_learns_as_by_pytorch(half):
    """To answer as another one: the losses of both ways, step by step."""

    def losses():
        torch.manual_seed(0)
        layers = [layer_of(structure_of(small, (16, 16), 1, left), torch.float32) for small, left in SHAPES]
        model = nn.Sequential(layers[0], nn.GELU(), layers[1])
        wanted = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        found = []
        for _ in range(60):
            x = torch.randn(64, 64)
            with autocast():
                loss = nn.functional.mse_loss(model(x).float(), wanted(x).detach().float())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    ours = losses()
    assert half() == (120, 120)
    with compresskit.use_kernels("pytorch"):
        theirs = losses()
    assert ours[-1] < ours[0] / 10
    assert ours == pytest.approx(theirs, rel=0.05)


SHAPES = (((4, 4), True), ((4, 4), False))


def test_what_pytorch_trains_as_fast_is_left_to_it(half):
    for structure in (LowRank(96, 1600, 16), LowRank(96, 80, 15), structure_of((4, 2), (31, 40), 1, True)):
        layer, x = layer_of(structure, HALF), torch.randn(70, structure.cols, dtype=HALF)
        layer(x).sum().backward()
    assert half() == (0, 0)
    for cols, most in ((WIDEST_TRAINED // 2, MOST_TRAINED_HALF), (WIDEST_TRAINED // 2 + 2, WIDE_TRAINED_HALF)):
        rows = most // cols // 2 * 2
        assert structure_of((2, 2), (rows, cols), 1, True).native.takes_half(9, training=True)
        assert not structure_of((2, 2), (rows + 2, cols), 1, True).native.takes_half(9, training=True)
        assert not structure_of((2, 2), (rows, cols), 2, True).native.takes_half(9, training=True)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_it_is_one_operation_of_a_layer_compiled_under_autocast(dtype, half):
    structure = structure_of((4, 2), (8, 10), 1, True)
    layer, x = layer_of(structure, dtype), torch.randn(7, 20)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with autocast():
        with torch.no_grad():
            y = compiled(x)
        assert half() == (1, 0)
        compiled(x).sum().backward()  # PyTorch's
    assert half() == (0, 0)
    assert error(y, exact(layer_of(structure, HALF), x.to(HALF))) < 3 * ROUNDED
    torch.compiler.reset()


def test_what_does_not_fit_is_refused(half):
    backward, x, factor = torch.ops.compresskit.chain_backward.default, torch.randn(3, 20), torch.randn(6, 20)
    x, factor, grad = x.to(HALF), factor.to(HALF), torch.randn(3, 6).to(HALF)
    plan = (0, 1, 20, 6)
    with pytest.raises(RuntimeError, match="needs of input, bias and factors"):
        backward(grad, x, [factor], plan, (1, 1))
    with pytest.raises(RuntimeError, match="a gradient of 3 tokens"):
        backward(grad[:2], x, [factor], plan, (1, 1, 1))
    with pytest.raises(RuntimeError, match=r"\(\.\.\., 6\) in bfloat16"):
        backward(grad.float(), x, [factor], plan, (1, 1, 1))
    with pytest.raises(RuntimeError, match="in pairs, and 5 is odd"):
        backward(grad[:, :5], x, [factor[:5]], (0, 1, 20, 5), (1, 1, 1))


def test_without_autocast_types_have_to_agree(half):
    layer = layer_of(structure_of((4, 2), (8, 10), 1, True), torch.float32)
    for grad in (True, False):
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(RuntimeError, match="in bfloat16 on the processor is expected"),
        ):
            layer(torch.randn(7, 20, dtype=HALF))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_second_derivatives_warn_of_nothing(dtype, half):
    layer, x = layer_of(structure_of((4, 2), (8, 10), 1, True), dtype), torch.randn(7, 20, dtype=dtype)
    (first,) = torch.autograd.grad(layer(x.requires_grad_()).square().sum(), x, create_graph=True)
    assert first.requires_grad


def test_modes_that_are_not_bfloat16_are_pytorchs(native, monkeypatch):
    layer, x = layer_of(structure_of((4, 2), (8, 10), 1, True), torch.float32), torch.randn(7, 20)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        assert layer(x).dtype is torch.float16
    monkeypatch.setattr(kernel, "types", (torch.float32,))  # as of a processor without such units
    with torch.no_grad(), autocast():
        assert layer(x).dtype is HALF
    assert native() == (0, 0)
