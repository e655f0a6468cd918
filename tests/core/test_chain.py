"""Chains of products: what training keeps of them, in each registered decomposition, and gradients of what it drops."""

import copy

import pytest
import torch
from torch import nn

from compresskit.core import chain, kron
from compresskit.core.chain import Chain, LastAxis
from compresskit.core.modules import FactorizedLinear
from compresskit.core.registry import decomposition, decompositions
from compresskit.decompositions.blast import BlastBlocks
from compresskit.decompositions.monarch import MonarchBlocks
from compresskit.decompositions.svd import LowRank
from compresskit.decompositions.tensor_train import TrainCores
from compresskit.decompositions.tucker import TuckerTensor
from compresskit.errors import StructureError
from compresskit.testing import CHECKS
from compresskit.testing.cases import normal, spread
from tests.core.autocast import check_training_under_autocast

STRUCTURES = [
    LowRank(12, 8, 6),
    TuckerTensor(12, 8, (3, 4), (1, 8), (2, 3), (1, 4)),
    TuckerTensor(12, 8, (3, 4), (2, 4), (2, 4), (2, 3)),
    TuckerTensor(12, 8, (1, 12), (2, 4), (1, 6), (2, 3)),
    TrainCores(12, 8, (3, 4), (2, 4), (2, 5, 3)),
    TrainCores(12, 8, (3, 4), (2, 4), (3, 6, 3)),
    MonarchBlocks(12, 8, (2, 2), 3),
    MonarchBlocks(12, 8, (3, 1), 3),
    MonarchBlocks(12, 8, (1, 4), 2),
    BlastBlocks(12, 8, (3, 2), 5),
    BlastBlocks(12, 8, (1, 4), 2),
]
"""Left to PyTorch, all of them keep more than half of their input between the products; every kind of step."""


@pytest.fixture
def few(monkeypatch):
    """However little it is, nothing counts as little."""
    monkeypatch.setattr(chain, "FEW_BYTES", -1)
    monkeypatch.setattr(kron, "FEW_BYTES", -1)


def layer_of(structure, dtype=torch.float64):
    factors = {
        name: normal(*spec.shape, dtype=dtype, seed=i)
        for i, (name, spec) in enumerate(structure.factor_specs().items())
    }
    return FactorizedLinear(structure, factors, normal(structure.rows, dtype=dtype, seed=7))


def as_function(layer):
    """The layer as a function of its input and its parameters."""
    names = [name for name, _ in layer.named_parameters()]
    return lambda x, *values: torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)


def kept_bytes(layer, x):
    """Of all tensors that a forward pass keeps for the backward pass, parameters aside."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for pointer, size in sizes.items() if pointer not in own)


@pytest.mark.parametrize("name", decompositions())
@pytest.mark.parametrize(("rows", "cols"), [(768, 768), (3072, 768), (768, 3072), (96, 96)])
def test_every_decomposition_keeps_at_most_half_of_the_input_beside_it(name, rows, cols):
    for structure in spread(decomposition(name), rows, cols, lookup=False, count=12):
        x = normal(512, cols, dtype=torch.float32).requires_grad_()
        share = kept_bytes(layer_of(structure, torch.float32), x) / x.nbytes
        assert share <= 1.5, (structure, share)


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.usefixtures("few")
def test_these_structures_are_recomputed(structure):
    """Otherwise the tests below would test PyTorch."""
    y = layer_of(structure)(normal(3, structure.cols).requires_grad_())
    names, nodes = set(), [y.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(type(node).__name__)
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    assert "_SegmentBackward" in names


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.usefixtures("few")
def test_gradcheck_of_first_and_second_derivatives(structure):
    layer = layer_of(structure)
    arguments = [normal(2, structure.cols).requires_grad_(), *layer.parameters()]
    assert torch.autograd.gradcheck(as_function(layer), arguments)
    assert torch.autograd.gradgradcheck(as_function(layer), arguments)


@pytest.mark.parametrize("name", decompositions())
@pytest.mark.parametrize(
    "check", ["matmul", "gradients", "backward", "twice", "half", "autocast", "deepcopy", "compile"]
)
@pytest.mark.usefixtures("few")
def test_conformance_where_nothing_is_little(check, name):
    CHECKS[check](decomposition(name))


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.usefixtures("few")
def test_each_gradient_alone(structure):
    """Whichever of input and parameters needs a gradient gets the one that it gets when all do."""
    layer = layer_of(structure)
    x = normal(3, structure.cols).requires_grad_()
    tensors = [x, *layer.parameters()]
    every = torch.autograd.grad(layer(x).square().sum(), tensors)
    for tensor, expected in zip(tensors, every, strict=True):
        for other in tensors:
            other.requires_grad_(other is tensor)
        (alone,) = torch.autograd.grad(layer(x).square().sum(), [tensor])
        torch.testing.assert_close(alone, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.usefixtures("few")
def test_frozen_factors_keep_nothing(structure):
    layer = layer_of(structure).requires_grad_(False)
    assert kept_bytes(layer, normal(50, structure.cols).requires_grad_()) == 0


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.usefixtures("few")
def test_training_under_autocast_is_in_bfloat16_and_fills_float32_gradients(structure):
    check_training_under_autocast(layer_of(structure, torch.float32))


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.usefixtures("few")
def test_gradients_of_each_sample_by_functorch(structure):
    layer = layer_of(structure)
    x = normal(4, 3, structure.cols)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(values, x):
        return torch.func.functional_call(layer, values, x).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, sample in enumerate(x):
        names, leaves = zip(*layer.named_parameters(), strict=True)
        for name, wanted in zip(names, torch.autograd.grad(layer(sample).square().sum(), leaves), strict=True):
            torch.testing.assert_close(found[name][i], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("few")
def test_a_factor_that_is_more_than_a_matrix_is_called():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = layer_of(STRUCTURES[1])
    x = normal(3, 8).requires_grad_()
    plain = copy.deepcopy(layer)(x) - layer.bias
    core = layer.core
    layer.core = Doubled(core.in_features, core.out_features, bias=False, dtype=torch.float64)
    layer.core.weight = core.weight
    torch.testing.assert_close(layer(x) - layer.bias, 2 * plain)


def test_a_graph_that_changes_between_forward_and_backward_is_refused():
    """As PyTorch refuses it: an input that is overwritten would give wrong gradients without a word."""
    layer = layer_of(LowRank(96, 96, 72), torch.float32)
    x = normal(512, 96, dtype=torch.float32)
    y = layer(x).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_kept_is_what_is_dearest_to_compute_again():
    steps = (LastAxis("a", 1, 100, 30), LastAxis("b", 1, 30, 40), LastAxis("c", 1, 40, 45), LastAxis("d", 1, 45, 9))
    assert [len(segment) for segment in Chain(100, steps).segments] == [1, 3]  # 3000 of 3000, 1200 and 1800
    assert [len(segment) for segment in Chain(140, steps).segments] == [1, 1, 2]  # 30 + 40 numbers cost 4200
    assert [len(segment) for segment in Chain(150, steps).segments] == [1, 2, 1]  # 30 + 45 cost 4800
    assert [len(segment) for segment in Chain(40, steps).segments] == [4]


def test_another_last_size_is_an_error():
    with pytest.raises(StructureError, match=r"takes \(\.\.\., 8\), got \(2, 9\)"):
        layer_of(LowRank(12, 8, 6)).structure.matmul(normal(2, 9), {})
