"""The baselines do what their papers say, and keep to the budget."""

import copy

import pytest
import torch

import compresskit
from benchmarks.baselines import asvd, baseline_, svd_llm
from benchmarks.models import build_bert
from compresskit.calibration import calibrate


@pytest.fixture(scope="module")
def model():
    return build_bert("tiny", seed=0)


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 512, (16, 24), generator=generator)
    mask = (torch.arange(24) < torch.randint(8, 25, (16, 1), generator=generator)).long()
    return [{"input_ids": ids[i : i + 8] * mask[i : i + 8], "attention_mask": mask[i : i + 8]} for i in (0, 8)]


def error(layer, weight, second):
    """tr(D C D^T) of a compressed layer."""
    difference = (weight - layer.weight.detach()).double()
    return float(((difference @ second.double()) * difference).sum())


def test_svd_llm_is_the_least_output_error_of_its_rank(model, batches):
    small = copy.deepcopy(model)
    name = "encoder.layer.0.intermediate.dense"
    total = sum(parameter.numel() for parameter in model.parameters())
    baseline_(small, "svd-llm", batches, [name], total - 6000)
    layer, weight = small.get_submodule(name), model.get_submodule(name).weight.detach()
    second = calibrate(model, batches).uses[name].inputs
    ours = compresskit.SVD().fit(weight, structure=layer.structure, importance=compresskit.Importance(cols=second))
    difference = weight - layer.structure.dense(ours.factors)
    best = float(((difference.double() @ second.double()) * difference.double()).sum())
    assert error(layer, weight, second) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("name", ["svd-llm", "asvd"])
def test_a_baseline_keeps_to_the_budget_and_near_it(name, model, batches):
    small = copy.deepcopy(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    names = [site.name for site in compresskit.find_sites(model).sites]
    baseline_(small, name, batches, names, total // 3)
    after = sum(parameter.numel() for parameter in small.parameters())
    assert 0.9 * total / 3 < after <= total // 3
    assert small(**batches[0]).last_hidden_state.isfinite().all()


def test_scales_are_those_of_the_papers():
    second = torch.tensor([[4.0, 2.0], [2.0, 3.0]])
    factor = svd_llm(second, torch.ones(2))
    torch.testing.assert_close(factor @ factor.T, second.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(asvd(second, torch.tensor([4.0, 9.0])), torch.diag(torch.tensor([2.0, 3.0]).double()))
