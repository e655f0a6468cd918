"""The parts of the whole-model benchmark that can be checked without timing anything."""

import math

import pytest
import torch

from benchmarks.devices import device_name, find_device, find_dtype, timed
from benchmarks.experiments import ExperimentSkipped, SuiteError
from benchmarks.experiments.model_speed import PAPERS, ModelSpeed
from benchmarks.floors import Free, without_linear_layers
from benchmarks.models import build_bert

REST = 396_288 + 119_808 + 590_592
"""What KroneckerBERT leaves dense: positions, types and their norm, biases and norms of the layers, the pooler."""


@pytest.mark.parametrize(("name", "params"), [("K8", 14_654_216), ("K21", 5_228_272)])
def test_the_papers_shapes_have_the_papers_sizes(name, params):
    sizes = {pattern: math.prod(left) + math.prod(right) for pattern, (left, right) in PAPERS[name].items()}
    layer = 4 * sizes["*attention*"] + sizes["*intermediate*"] + sizes["*output.dense"]
    assert 12 * layer + sizes["*word_embeddings"] + REST == params
    weights = {"*attention*": (768, 768), "*intermediate*": (3072, 768), "*output.dense": (768, 3072)}
    for pattern, shape in {**weights, "*word_embeddings": (30522, 768)}.items():
        left, right = PAPERS[name][pattern]
        assert (left[0] * right[0], left[1] * right[1]) == shape


def test_the_floor_does_everything_but_linear_layers():
    model = build_bert("tiny", seed=0)
    floor = without_linear_layers(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(linear) == 13
    assert all(isinstance(floor.get_submodule(name), Free) for name in linear)
    assert all(isinstance(model.get_submodule(name), torch.nn.Linear) for name in linear)
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad():
        ours, dense = floor(ids), model(ids)
    assert ours.last_hidden_state.shape == dense.last_hidden_state.shape
    assert ours.last_hidden_state.isfinite().all()
    free = Free(3)
    assert free(torch.zeros(2, 5, 7)) is free(torch.ones(2, 5, 7))
    assert free(torch.zeros(4, 7)).shape == (4, 3)


@pytest.mark.parametrize("model", ["K9", "svd", "svd-x", "-4"])
def test_a_model_that_is_none(model):
    with pytest.raises((SuiteError, LookupError), match=r"model is K8, K21 or METHOD-RATIO|no decomposition"):
        ModelSpeed(model=model, shape="tiny").run(None)


def test_devices_and_types_that_are_not_there():
    assert device_name(find_device("cpu")) is None
    for name in ("cuda:99", "abacus"):
        with pytest.raises(ExperimentSkipped, match=f"device '{name}' cannot be used here"):
            find_device(name)
    with pytest.raises(SuiteError, match=r"no dtype .int8.\. Known: float32, bfloat16, float16"):
        find_dtype("int8")


def test_timed_calls_are_repeated_and_averaged():
    calls = []
    assert timed(lambda: calls.append(1), torch.device("cpu"), repeats=5)() > 0
    assert len(calls) == 5
