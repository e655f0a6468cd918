"""The two modules: what they refuse, what they share, and how they look to others."""

import pytest
import torch
from torch import nn

from compresskit.core.modules import FactorizedEmbedding, FactorizedLinear
from compresskit.core.structure import empty_factors
from compresskit.decompositions.kronecker import KroneckerSum
from compresskit.decompositions.svd import LowRank
from compresskit.errors import StructureError

STRUCTURE = LowRank(8, 6, 2)


@pytest.fixture
def factors():
    generator = torch.Generator().manual_seed(0)
    return {"left": torch.randn(8, 2, generator=generator), "right": torch.randn(2, 6, generator=generator)}


@pytest.fixture
def linear(factors):
    return FactorizedLinear(STRUCTURE, factors, torch.arange(8.0))


@pytest.fixture
def embedding(factors):
    return FactorizedEmbedding(STRUCTURE, factors, padding_idx=3, padding_row=torch.arange(6.0))


@pytest.mark.parametrize("module", ["linear", "embedding"])
def test_assigning_the_weight_fails_loudly(module, request):
    module = request.getfixturevalue(module)
    message = r"weight is rebuilt from its factors \(left, right\) and cannot be assigned; change the factors, or call"
    for value in (torch.zeros(8, 6), nn.Parameter(torch.zeros(8, 6)), None):
        with pytest.raises(AttributeError, match=message):
            module.weight = value
    with pytest.raises(KeyError, match="attribute 'weight' already exists"):
        module.register_parameter("weight", nn.Parameter(torch.zeros(8, 6)))


def test_reading_the_weight_gives_the_matrix(linear, embedding, factors):
    dense = factors["left"] @ factors["right"]
    torch.testing.assert_close(linear.weight.detach(), dense)
    dense[3] = torch.arange(6.0)
    torch.testing.assert_close(embedding.weight.detach(), dense)


def test_a_conv1d_weight_is_read_transposed(linear):
    linear.stored_transposed = True
    assert linear.weight.shape == (6, 8)
    torch.testing.assert_close(linear.weight.detach(), STRUCTURE.dense(linear.factors()).detach().T)


@pytest.mark.parametrize("shape", [(5,), (2, 5), (6, 1), (2, 3, 12)])
def test_a_wrong_last_size_is_refused(linear, shape):
    with pytest.raises(StructureError, match=r"this layer takes \(\.\.\., 6\) and got \(.*: the last sizes must agree"):
        linear(torch.zeros(shape))


@pytest.mark.parametrize("cls", [FactorizedLinear, FactorizedEmbedding])
@pytest.mark.parametrize(
    "change",
    [{"left": torch.zeros(8, 3)}, {"right": torch.zeros(6, 2)}, {"extra": torch.zeros(1)}, {"left": torch.zeros(16)}],
)
def test_factors_of_another_shape_or_name_are_refused(cls, change, factors):
    message = r"low-rank\(rank=2\) needs factors \{'left': \(8, 2\), 'right': \(2, 6\)\}, got"
    with pytest.raises(StructureError, match=message):
        cls(STRUCTURE, {**factors, **change})
    with pytest.raises(StructureError, match=message):
        cls(STRUCTURE, {"left": factors["left"]})


@pytest.mark.parametrize("bias", [torch.zeros(1), torch.zeros(6), torch.zeros(8, 1)])
def test_a_bias_of_another_size_is_refused(factors, bias):
    with pytest.raises(StructureError, match="the bias of 8 outputs has shape"):
        FactorizedLinear(STRUCTURE, factors, bias)


@pytest.mark.parametrize(
    ("idx", "row", "message"),
    [
        (3, None, "padding_idx and padding_row come together"),
        (None, torch.zeros(6), "padding_idx and padding_row come together"),
        (8, torch.zeros(6), "padding_idx is a row, 0 to 7; got 8"),
        (-1, torch.zeros(6), "padding_idx is a row, 0 to 7; got -1"),
        (3, torch.zeros(1), "the padding row of 6 columns has shape"),
        (3, torch.zeros(8), "the padding row of 6 columns has shape"),
    ],
)
def test_padding_that_does_not_fit_is_refused(factors, idx, row, message):
    with pytest.raises(StructureError, match=message):
        FactorizedEmbedding(STRUCTURE, factors, padding_idx=idx, padding_row=row)


def test_the_padding_row_is_exact_and_gets_no_gradient(embedding, factors):
    index = torch.tensor([[3, 0], [7, 3]])
    y = embedding(index)
    torch.testing.assert_close(y[0, 0], torch.arange(6.0), rtol=0, atol=0)
    torch.testing.assert_close(y[1, 1], torch.arange(6.0), rtol=0, atol=0)
    torch.testing.assert_close(y[1, 0].detach(), factors["left"][7] @ factors["right"])
    y[0, 0].sum().backward()
    assert embedding.padding_row.grad is None
    for factor in embedding.factors().values():
        torch.testing.assert_close(factor.grad, torch.zeros_like(factor), rtol=0, atol=0)


def test_the_padding_row_is_frozen_and_saved(embedding):
    assert not embedding.padding_row.requires_grad
    assert set(embedding.state_dict()) == {"left", "right", "padding_row"}


def test_the_sizes_that_other_code_asks_for(linear, embedding):
    assert (linear.in_features, linear.out_features) == (6, 8)
    assert (embedding.num_embeddings, embedding.embedding_dim) == (8, 6)
    assert "FactorizedLinear(\n  6, 8, low-rank(rank=2)" in repr(linear)


def test_matrix_factors_are_linear_children_and_others_parameters():
    structure = KroneckerSum(8, 6, (2, 3), (4, 2), 1)
    module = FactorizedLinear(structure, {"small": torch.ones(2, 3), "wide": torch.ones(4, 2)}, torch.ones(8))
    assert set(module.state_dict()) == {"small", "wide.weight", "bias"}
    assert type(module.wide) is nn.Linear
    assert module.factor_keys() == {"small": "small", "wide": "wide.weight"}


def test_a_parameter_is_used_as_it_is():
    left, right = nn.Parameter(torch.ones(8, 2)), nn.Parameter(torch.ones(2, 6), requires_grad=False)
    linear = FactorizedLinear(STRUCTURE, {"left": left, "right": right})
    embedding = FactorizedEmbedding(STRUCTURE, {"left": left, "right": right})
    assert linear.factors()["left"] is left
    assert embedding.factors()["right"] is right
    assert not linear.right.weight.requires_grad


def test_tied_modules_share_their_factors(factors):
    shared = {name: nn.Parameter(tensor) for name, tensor in factors.items()}
    model = nn.ModuleDict(
        {"words": FactorizedEmbedding(STRUCTURE, shared), "decoder": FactorizedLinear(STRUCTURE, shared)}
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == STRUCTURE.num_params
    before = model["words"](torch.tensor([1])).detach()
    model["decoder"](torch.ones(6)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    dense = STRUCTURE.dense(model["decoder"].factors()).detach()
    torch.testing.assert_close(model["words"](torch.tensor([1])).detach(), dense[[1]])
    assert not torch.equal(before, dense[[1]])


def test_a_child_that_is_more_than_a_linear_layer_is_called(linear):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x = torch.ones(3, 6)
    expected = 2 * (linear(x) - linear.bias) + linear.bias
    doubled = Doubled(6, 2, bias=False)
    doubled.weight = linear.right.weight
    linear.right = doubled
    torch.testing.assert_close(linear(x), expected)


def test_hooks_on_a_child_run(linear):
    seen = []
    linear.left.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    linear.right.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    linear(torch.ones(3, 6))
    assert seen == [(3, 6), (3, 8)]


def test_empty_factors_allocate_nothing_on_meta():
    module = FactorizedLinear(STRUCTURE, empty_factors(STRUCTURE, dtype=torch.float16, device="meta"))
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.float16)}
    assert module.weight.is_meta
    assert module(torch.empty(2, 6, dtype=torch.float16, device="meta")).shape == (2, 8)
