"""A lazy weight answers what costs nothing at once, and is the real matrix for everything else."""

from unittest import mock

import pytest
import torch
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5DenseActDense

from compresskit.core.lazy import LazyWeight
from compresskit.core.modules import FactorizedLinear
from compresskit.decompositions.svd import SVD, LowRank

MATRIX = torch.arange(6.0).view(3, 2)


@pytest.fixture
def rebuilds():
    return mock.Mock(return_value=MATRIX)


@pytest.fixture
def lazy(rebuilds):
    return LazyWeight.of((3, 2), torch.empty(1), rebuilds)


FREE = {
    "shape": (lambda w: w.shape, torch.Size([3, 2])),
    "dtype": (lambda w: w.dtype, torch.float32),
    "device": (lambda w: w.device, torch.device("cpu")),
    "ndim": (lambda w: w.ndim, 2),
    "layout": (lambda w: w.layout, torch.strided),
    "requires_grad": (lambda w: w.requires_grad, False),
    "is_meta": (lambda w: w.is_meta, False),
    "is_cuda": (lambda w: w.is_cuda, False),
    "size": (lambda w: (w.size(), w.size(1)), (torch.Size([3, 2]), 2)),
    "dim": (lambda w: w.dim(), 2),
    "numel": (lambda w: (w.numel(), w.nelement()), (6, 6)),
    "element_size": (lambda w: w.element_size(), 4),
    "kind": (lambda w: (w.is_floating_point(), w.is_complex()), (True, False)),
    "len": (len, 3),
    "isinstance": (lambda w: isinstance(w, torch.Tensor), True),
}


@pytest.mark.parametrize(("ask", "answer"), FREE.values(), ids=FREE)
def test_metadata_does_not_rebuild(lazy, rebuilds, ask, answer):
    assert ask(lazy) == answer
    assert rebuilds.call_count == 0


COMPUTED = {
    "product": (lambda w: w @ torch.ones(2), MATRIX @ torch.ones(2)),
    "product from the right": (lambda w: torch.ones(4, 3) @ w, torch.ones(4, 3) @ MATRIX),
    "linear": (lambda w: torch.nn.functional.linear(torch.ones(2), w), MATRIX @ torch.ones(2)),
    "transpose": (lambda w: w.T, MATRIX.T),
    "index": (lambda w: w[1], MATRIX[1]),
    "nested argument": (lambda w: torch.cat([w, w]), torch.cat([MATRIX, MATRIX])),
    "keyword": (lambda w: torch.add(torch.zeros(3, 2), other=w), MATRIX),
    "detach": (lambda w: w.detach().clone(), MATRIX),
    "conversion": (lambda w: w.double(), MATRIX.double()),
    "data": (lambda w: w.data, MATRIX),
    "numpy": (lambda w: torch.from_numpy(w.numpy()), MATRIX),
}


@pytest.mark.parametrize(("compute", "expected"), COMPUTED.values(), ids=COMPUTED)
def test_computing_rebuilds_the_matrix(lazy, rebuilds, compute, expected):
    torch.testing.assert_close(compute(lazy), expected, rtol=0, atol=0)
    assert rebuilds.call_count >= 1


def test_it_is_rebuilt_each_time():
    factor = torch.ones(3, 2)
    lazy = LazyWeight.of((3, 2), factor, lambda: factor)
    torch.testing.assert_close(lazy + 0, torch.ones(3, 2))
    factor += 1
    torch.testing.assert_close(lazy + 0, torch.full((3, 2), 2.0))


def test_writing_into_it_changes_nothing():
    module = SVD().fit(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), ratio=1).to_module()
    before = module.rebuilt_weight().detach().clone()
    with torch.no_grad():
        module.weight.zero_()
        module.weight.data.normal_()
    torch.testing.assert_close(module.weight.detach(), before, rtol=0, atol=0)


def test_gradients_flow_to_the_factors():
    factors = {"left": torch.randn(6, 2), "right": torch.randn(2, 4)}
    module = FactorizedLinear(LowRank(6, 4, 2), factors)
    x = torch.randn(4)
    assert module.weight.requires_grad
    (module.weight @ x).sum().backward()
    torch.testing.assert_close(module.factors()["left"].grad, (factors["right"] @ x).expand(6, 2))
    torch.testing.assert_close(module.factors()["right"].grad, torch.outer(factors["left"].sum(0), x))


def test_a_t5_layer_that_asks_for_the_dtype_pays_nothing():
    layer = T5DenseActDense(T5Config(d_model=16, d_ff=32, dropout_rate=0.0)).eval()
    layer.wo = SVD(rank=3).fit(layer.wo.weight, ratio=1).to_module(layer.wo)
    x = torch.randn(2, 5, 16)
    with mock.patch.object(LowRank, "dense", side_effect=AssertionError("rebuilt")):
        y = layer(x)
    hidden = torch.relu(layer.wi(x))
    torch.testing.assert_close(y, hidden @ layer.wo.rebuilt_weight().T)
