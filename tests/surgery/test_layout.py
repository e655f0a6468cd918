"""The layout of a compressed model: read off, written as JSON, installed into a fresh model, and undone."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compresskit.core.decomposition import module_from
from compresskit.core.modules import FactorizedEmbedding, FactorizedLinear, FactorizedModule
from compresskit.decompositions.kronecker import Kronecker, KroneckerSum
from compresskit.decompositions.svd import SVD, LowRank
from compresskit.errors import CheckpointError
from compresskit.surgery import layout as layout_module
from compresskit.surgery.layout import Entry, dequantize_, install_, layout_of, swap_
from compresskit.surgery.sites import count_params


class Tied(nn.Module):
    """An embedding with a padding row, a Conv1D, a linear layer and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 16, padding_idx=0)
        self.conv = Conv1D(32, 16)
        self.layers = nn.ModuleList([nn.Linear(32, 16), nn.Linear(16, 16, bias=False)])
        self.head = nn.Linear(16, 24)
        self.head.weight = self.embed.weight

    def forward(self, index: Tensor) -> Tensor:
        x = self.conv(self.embed(index))
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


INDEX = torch.tensor([[1, 5, 0, 23]])


def tied() -> Tied:
    torch.manual_seed(0)
    return Tied()


def compressed(method: Any = None) -> Tied:
    model = tied()
    groups = [["embed", "head"], ["conv"], ["layers.0"], ["layers.1"]]
    for names in groups:
        first = model.get_submodule(names[0])
        weight = first.weight.T if isinstance(first, Conv1D) else first.weight
        fitted = (method or SVD()).fit(weight, ratio=1.5)
        factors = {name: nn.Parameter(tensor) for name, tensor in fitted.factors.items()}
        swap_(model, {name: module_from(fitted.structure, factors, model.get_submodule(name)) for name in names})
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_dense_model_has_an_empty_layout() -> None:
    assert layout_of(tied()) == {}


def test_layout_names_every_factorised_module_and_what_it_shares() -> None:
    layout = layout_of(compressed())
    assert list(layout) == ["embed", "conv", "layers.0", "layers.1", "head"]
    assert layout["head"] == Entry(layout["embed"].structure, {"left": "embed", "right": "embed"})
    assert not any(layout[name].shares for name in ("embed", "conv", "layers.0", "layers.1"))


@pytest.mark.parametrize("method", [SVD(), Kronecker()], ids=lambda method: method.name)
@pytest.mark.parametrize(
    "order", [list, lambda items: list(reversed(items)), sorted], ids=["same", "reversed", "sorted"]
)
def test_a_layout_installs_in_any_order(method: Any, order: Callable[[Any], list[str]]) -> None:
    model = compressed(method)
    written = json.loads(json.dumps({name: entry.to_json() for name, entry in layout_of(model).items()}))
    layout = {name: Entry.from_json(name, written[name]) for name in order(list(written))}
    assert layout == layout_of(model)
    with torch.device("meta"):
        empty = Tied()
        install_(empty, layout)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert layout_of(empty) == layout_of(model)
    assert count_params(empty) == count_params(model)
    fresh = tied()
    install_(fresh, layout)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(INDEX), model(INDEX), rtol=0, atol=0)
    for one, other in zip(fresh.embed.factors().values(), fresh.head.factors().values(), strict=True):
        assert one is other


def test_sharers_of_an_absent_owner_share_with_each_other() -> None:
    layout = {name: entry for name, entry in layout_of(compressed()).items() if name in ("embed", "head")}
    orphans = {name: Entry(entry.structure, {"right": "gone"}) for name, entry in layout.items()}
    model = tied()
    install_(model, orphans)
    assert model.embed.right is model.head.right.weight
    assert model.embed.left is not model.head.left.weight


@pytest.mark.parametrize(
    ("name", "structure", "shares", "match"),
    [
        ("nowhere", LowRank(16, 16, 2), {}, "the map names 'nowhere', which Tied does not have"),
        ("layers.7", LowRank(16, 16, 2), {}, "the map names 'layers.7', which Tied does not have"),
        ("layers", LowRank(16, 16, 2), {}, "is a ModuleList, not a linear layer or embedding"),
        ("layers.1", LowRank(16, 32, 2), {}, "'layers.1' is 16 x 32, the model's is 16 x 16"),
        ("conv", LowRank(16, 32, 2), {}, "'conv' is 16 x 32, the model's is 32 x 16"),
        ("layers.1", LowRank(16, 16, 2), {"left": "embed"}, r"'layers.1' shares its factor 'left' \(16, 2\)"),
    ],
)
def test_a_layout_that_does_not_fit_changes_nothing(name: str, structure: Any, shares: Any, match: str) -> None:
    model = tied()
    before, modules = state(model), list(model.modules())
    with pytest.raises(CheckpointError, match=match):
        install_(model, {"embed": Entry(LowRank(24, 16, 4)), name: Entry(structure, shares)})
    assert list(model.modules()) == modules
    torch.testing.assert_close(state(model), before, rtol=0, atol=0)


GOOD = {"structure": {"kind": "low-rank", "rows": 16, "cols": 16, "rank": 2}}


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ([], "the map of 'it' must hold 'structure' and perhaps 'shares', got"),
        ({}, "must hold 'structure'"),
        ({**GOOD, "more": 1}, "must hold 'structure' and perhaps 'shares', got .*'more'"),
        ({"structure": "low-rank"}, "a structure is an object with a 'kind'"),
        ({"structure": {"kind": "low-rank"}}, "structure 'low-rank' has fields"),
        ({**GOOD, "shares": ["left"]}, r"'shares' of 'it' maps factors \(left, right\) to modules"),
        ({**GOOD, "shares": {"middle": "embed"}}, "'shares' of 'it' maps factors"),
        ({**GOOD, "shares": {"left": 3}}, "'shares' of 'it' maps factors"),
        ({"structure": {**GOOD["structure"], "rank": 17}}, "is impossible"),
        ({"structure": {**GOOD["structure"], "rank": -1}}, "the size 'rank' of a structure is -1"),
    ],
)
def test_entries_that_are_no_entries(data: Any, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        Entry.from_json("it", data)


def test_factors_far_larger_than_the_weight_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    twice_as_large = {"structure": KroneckerSum(16, 16, (4, 4), (4, 4), 16).to_json()}
    assert Entry.from_json("it", twice_as_large).structure.num_params == 2 * 16 * 16
    monkeypatch.setattr(layout_module, "MAX_OVERSIZE", 1)
    with pytest.raises(CheckpointError, match=r"of 'it' would hold 512 parameters, more than 1 times its 16 x 16"):
        Entry.from_json("it", twice_as_large)


@pytest.mark.parametrize("method", [SVD(), Kronecker()], ids=lambda method: method.name)
def test_dequantize_gives_the_layers_back(method: Any) -> None:
    model = compressed(method)
    model.layers[0].eval()
    expected, reference = model(INDEX), tied()
    dequantize_(model)
    assert not any(isinstance(module, FactorizedModule) for module in model.modules())
    assert [(name, type(module)) for name, module in model.named_modules()] == [
        (name, type(module)) for name, module in reference.named_modules()
    ]
    assert [(n, p.shape) for n, p in model.named_parameters()] == [
        (n, p.shape) for n, p in reference.named_parameters()
    ]
    assert model.head.weight is model.embed.weight
    assert model.embed.padding_idx == 0
    torch.testing.assert_close(model.embed.weight[0], reference.embed.weight[0], rtol=0, atol=0)
    assert not model.layers[0].training
    assert model.layers[1].training
    torch.testing.assert_close(model(INDEX)[..., 1:], expected[..., 1:])  # the head's padding row is now the exact one


def test_dequantize_takes_a_dtype_and_keeps_frozen_weights_frozen() -> None:
    model = compressed()
    for parameter in model.layers[1].parameters():
        parameter.requires_grad_(False)
    dequantize_(model, torch.float64)
    assert model.layers[1].weight.dtype == torch.float64
    assert not model.layers[1].weight.requires_grad
    assert model.layers[0].weight.requires_grad


def test_a_module_in_several_places_is_swapped_in_all() -> None:
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.Identity(), shared)})
    install_(model, {"a": Entry(LowRank(16, 16, 2))})
    assert isinstance(model["a"], FactorizedLinear)
    assert model["b"][1] is model["a"]
    dequantize_(model)
    assert type(model["a"]) is nn.Linear
    assert model["b"][1] is model["a"]


def test_marks_of_saved_files_are_not_loaded_and_other_strangers_are_reported() -> None:
    model = compressed()
    marked = {**model.state_dict(), "embed.weight": torch.zeros(1), "conv.weight": torch.zeros(1)}
    copy.deepcopy(model).load_state_dict(marked)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"embed.weight"'):
        model.load_state_dict({**marked, "embed.weight": torch.zeros(24, 16)})


def test_sizes_may_be_assigned_as_on_dense_layers() -> None:
    model = compressed()
    assert isinstance(model.embed, FactorizedEmbedding)
    assert (model.embed.num_embeddings, model.embed.embedding_dim) == (24, 16)
    assert (model.conv.in_features, model.conv.out_features) == (16, 32)
    model.embed.num_embeddings = 24
    model.conv.out_features = 32
