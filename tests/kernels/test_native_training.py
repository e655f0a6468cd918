"""Training by the compiled kernel is a node of PyTorch's graph like any other: it saves, frees and derives."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import compresskit
from compresskit.core.native import kernel
from compresskit.decompositions.svd import LowRank
from tests.kernels.cases import error, gradients, layer_of, structure_of


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return layer_of(structure_of((4, 2), (8, 10), 1, True), torch.float32)


@pytest.fixture
def x():
    return torch.randn(7, 20, generator=torch.Generator().manual_seed(1), requires_grad=True)


def close(found, wanted):
    """Gradients in float32 of one layer by two ways."""
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def by_pytorch(function):
    with compresskit.use_kernels("pytorch"):
        return function()


def of_sum(layer, x):
    return torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])


def test_a_way_back_is_taken_once_unless_it_is_kept(layer, x, native):
    loss = layer(x).square().sum()
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    close(x.grad, 2 * first)
    assert native() == (1, 2)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_what_it_keeps_is_freed_after_the_way_back(layer, native):
    x = torch.randn(7, 20)
    kept = weakref.ref(x)
    y = layer(x)
    del x
    gc.collect()
    assert kept() is not None
    y.sum().backward()
    gc.collect()
    assert kept() is None
    assert native() == (1, 1)


def test_factors_that_change_in_between_are_noticed(layer, x, native):
    loss = layer(x).sum()
    with torch.no_grad():
        next(iter(layer.parameters())).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert native() == (1, 0)


def test_gradients_add_up_in_parameters(layer, x, native):
    for _ in range(2):
        layer(x).square().sum().backward()
    wanted = by_pytorch(lambda: of_sum(layer, x))
    close([value.grad for value in (x, *layer.parameters())], [2 * gradient for gradient in wanted])
    assert native() == (2, 2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_compute_it_again(reentrant, layer, x, native):
    model = nn.Sequential(layer, nn.GELU())
    loss = checkpoint(model, x, use_reentrant=reentrant).square().sum()
    loss.backward()
    assert native() == (2, 1)
    wanted = by_pytorch(lambda: torch.autograd.grad(model(x).square().sum(), [x, *layer.parameters()]))
    close([value.grad for value in (x, *layer.parameters())], wanted)


def test_several_gradients_at_once(layer, x, native):
    upstream = torch.randn(3, 7, 32)

    def found():
        return torch.autograd.grad(layer(x), [x, *layer.parameters()], upstream, is_grads_batched=True)

    together = found()
    assert native() == (1, 0)  # the way back is transformed: PyTorch's
    close(together, by_pytorch(found))
    each = [gradients(layer, x, upstream[k]) for k in range(3)]
    close(together, [torch.stack(values) for values in zip(*each, strict=True)])


def test_a_jacobian_and_a_hessian(layer, x, native):
    def loss(x):
        return layer(x).pow(3).mean()

    found = torch.autograd.functional.hessian(loss, x)
    assert native()[0] > 0
    close(found, by_pytorch(lambda: torch.autograd.functional.hessian(loss, x)))
    close(
        torch.autograd.functional.jacobian(layer, x), by_pytorch(lambda: torch.autograd.functional.jacobian(layer, x))
    )


def test_third_derivatives(layer, x, native):
    def third():
        y = layer(x).pow(3).sum()
        for _ in range(2):
            (y,) = torch.autograd.grad(y, x, create_graph=True)
            y = y.pow(2).sum()
        return torch.autograd.grad(y, [x, *layer.parameters()])

    found = third()
    assert native()[0] == 1
    for ours, theirs in zip(found, by_pytorch(third), strict=True):
        assert error(ours, theirs.double()) < 1e-4


def test_derivatives_forward_of_the_way_back(layer, x, native):
    """The upstream gradient has a tangent that came after the layer ran."""
    upstream, tangent = torch.randn(2, 7, 32)

    def found():
        y = layer(x)
        with forward_ad.dual_level():
            gradients = torch.autograd.grad(y, [x, *layer.parameters()], forward_ad.make_dual(upstream, tangent))
            return [part for gradient in gradients for part in forward_ad.unpack_dual(gradient)]

    ours = found()
    assert native() == (1, 0)
    assert all(part is not None for part in ours)
    close(ours, by_pytorch(found))


def test_a_way_back_that_is_counted_is_pytorchs(layer, x, native):
    loss = layer(x).sum()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert native() == (1, 0)
    assert counter.get_total_flops() > 0


def test_hooks_see_it(layer, x, native):
    y, seen = layer(x), []
    y.grad_fn.register_prehook(lambda upstream: seen.append(upstream[0]))
    y.grad_fn.register_hook(lambda grads, _: seen.append([None if g is None else tuple(g.shape) for g in grads]))
    y.sum().backward()
    assert "CompresskitChain" in y.grad_fn.name()
    assert seen[0].equal(torch.ones(7, 32))
    assert seen[1] == [(7, 20), (8, 10), (4, 2), (32,)]
    assert native() == (1, 1)


def test_an_output_that_nobody_derives_gives_nothing(layer, x, native):
    class Dropped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    (Dropped.apply(layer(x)).sum() + x.sum()).backward()
    assert x.grad.equal(torch.ones(7, 20))
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert native() == (1, 0)


@pytest.mark.parametrize("way", ["trained", "trained_now"])
def test_a_way_back_that_does_not_fit_is_refused(way, kernel_folder):
    trained, x = getattr(kernel_folder[1], way), torch.randn(3, 20, requires_grad=True)
    factors, plan = [torch.randn(6, 20)], (0, 1, 20, 6)
    with pytest.raises(RuntimeError, match="no factor 1"):
        trained(x, factors, plan, None, plan, (1,))
    with pytest.raises(RuntimeError, match="the way back has other factors"):
        trained(x, factors, plan, None, plan, (0, 0))
    with pytest.raises(RuntimeError, match="a factor of 120 numbers"):
        trained(x.detach(), [torch.randn(6, 19)], plan, None, plan, (0,))
    y = trained(x, factors, plan, None, (0, 1, 20, 5), (0,))
    with pytest.raises(RuntimeError, match="a factor of 100 numbers"):
        y.sum().backward()


def test_without_gradients_it_is_the_same(native):
    x, factors, plan = torch.randn(3, 20, requires_grad=True), [torch.randn(6, 20)], (0, 1, 20, 6)
    for way in (kernel._calls.trained, kernel._calls.trained_now):
        with torch.no_grad():
            y = way(x, factors, plan, None, plan, (0,))
        assert not y.requires_grad
        torch.testing.assert_close(y, x.detach() @ factors[0].T)
        assert way(x.detach(), factors, plan, None, plan, (0,)).equal(y)
        assert not way(x.detach(), factors, plan, None, plan, (0,)).requires_grad


def test_steps_of_all_kinds_are_derived_twice(kernel_folder):
    """By PyTorch's own operations, of plans that no layer has yet."""
    plan = (0, 5, 4, 3, 2, 5, 3, 0, 1, 3, 6, 5, 2, 6, 5, 0)
    torch.manual_seed(0)
    x, bias = torch.randn(2, 3, 20, requires_grad=True), torch.randn(30, requires_grad=True)
    factors = [torch.randn(3, 4, requires_grad=True), torch.randn(6, 3, requires_grad=True)]

    def by_hand(x, first, second, bias):
        grid = (x.reshape(6, 5, 4) @ first.T).mT
        return (second @ grid).mT.reshape(2, 3, 30) + bias

    def seconds(y):
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return first.detach(), *torch.autograd.grad(first.square().sum(), [x, *factors])

    y = torch.ops.compresskit.trained.default(x, factors, plan, bias, plan, (0, 1))
    torch.testing.assert_close(y, by_hand(x, *factors, bias), rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(seconds(y), seconds(by_hand(x, *factors, bias)), strict=True):
        assert error(ours, theirs.double()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 4], indirect=True)
@pytest.mark.parametrize("tokens", [0, 1, 9, 900])
def test_sums_do_not_begin_with_what_memory_held(tokens, threads, dtype, half):
    """PyTorch fills what is not written yet with what is no number."""
    torch.use_deterministic_algorithms(True)
    try:
        for structure in (
            structure_of((4, 2), (34, 40), 1, False),
            structure_of((2, 4), (34, 40), 2, True),
            LowRank(96, 80, 16),
        ):
            layer, x = layer_of(structure, dtype), torch.randn(tokens, structure.cols).to(dtype)
            upstream = torch.randn(tokens, structure.rows).to(dtype)
            count = 1 + len(list(layer.parameters()))
            for wanted in ([True] * count, *([k == one for k in range(count)] for one in range(count))):
                found = gradients(layer, x, upstream, wanted)
                assert all(gradient.isfinite().all() for gradient in found)
                assert tokens or not any(gradient.any() for gradient in found)
            assert half() == (1 + count, 1 + count)
    finally:
        torch.use_deterministic_algorithms(False)


def test_threads_go_back_at_once(layer, native):
    """A graph may be followed by several threads, and several graphs hold one layer's factors."""
    from concurrent.futures import ThreadPoolExecutor

    inputs = [torch.randn(7, 20, requires_grad=True) for _ in range(16)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: of_sum(layer, x), inputs))
    assert native() == (16, 16)
    for ours, x in zip(found, inputs, strict=True):
        close(ours, by_pytorch(lambda x=x: of_sum(layer, x)))


def test_a_way_back_that_is_compiled(layer, x, native):
    def found():
        x.grad = None
        loss = layer(x).square().sum()
        with compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()
        return x.grad

    ours = found()
    assert native()[0] == 1
    close(ours, by_pytorch(found))
    torch.compiler.reset()
