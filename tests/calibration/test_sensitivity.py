"""Sensitivities: larger for layers that matter, and the model is left as it was."""

import pytest
import torch

import compresskit
from compresskit.calibration import calibrate, measure_sensitivities
from compresskit.errors import CalibrationError, PlanError
from tests.calibration.test_compress import LINEAR, samples
from tests.models import assert_unchanged, build, snapshot


@pytest.mark.parametrize("aware", [False, True])
def test_a_layer_whose_output_hardly_counts_is_hardly_sensitive_and_gets_less(aware):
    model = build("bert")
    quiet, loud = "encoder.layer.0.output.dense", "encoder.layer.1.output.dense"
    with torch.no_grad():
        model.get_submodule(quiet).weight.mul_(1e-3)
    calibration = calibrate(model, samples()) if aware else None
    before = snapshot(model)
    found = measure_sensitivities(model, samples(2), calibration)
    assert_unchanged(model, before)
    assert set(found) == {site.name for site in compresskit.find_sites(model).sites}
    assert 0 <= found[quiet] < 1e-2 * found[loud]
    plan = compresskit.plan(model, "svd", ratio=1.3, calibration=calibration, sensitivities=found, **LINEAR)
    params = {planned.site.name: planned.params for planned in plan.sites}
    assert params[quiet] < params.get(loud, model.get_submodule(loud).weight.numel())


def test_the_model_is_left_as_it_was_when_it_fails():
    model = build("bert")
    before = snapshot(model)
    bad = [*samples(1), {"input_ids": torch.tensor([[10**6]])}]
    with pytest.raises(IndexError):
        measure_sensitivities(model, bad)
    assert_unchanged(model, before)


def test_without_samples_or_answers_it_says_so():
    with pytest.raises(CalibrationError, match="measured on samples"):
        measure_sensitivities(build("bert"), [])


def test_a_missing_sensitivity_is_an_error():
    with pytest.raises(PlanError, match=r"the sensitivity of 'encoder\.layer\.0.*got nan"):
        compresskit.plan(build("bert"), "svd", ratio=1.3, sensitivities={}, **LINEAR)
