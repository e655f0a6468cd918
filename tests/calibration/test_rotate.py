"""Rotated values: the model computes what it did, its calibration is that of a new pass, and cuts cost less."""

import dataclasses

import pytest
import torch
from torch import nn

from compresskit import calibrate
from compresskit.calibration.rotate import _layout, rotate_values_
from compresskit.calibration.weights import importances_of
from compresskit.decompositions.kronecker import Kronecker, KroneckerSum
from compresskit.errors import CalibrationError, PlanError
from tests.models import FAMILIES, HEADS, HIDDEN, assert_unchanged, build, inputs, outputs, snapshot

ROTATED = {
    "bert": 2,
    "bert-mlm": 2,
    "roberta": 2,
    "distilbert": 2,
    "albert": 1,
    "electra": 2,
    "t5": 6,
    "whisper": 6,
    "vit": 2,
}
"""Families whose values can be rotated, and in how many places; llama here shares values between heads."""


@pytest.mark.parametrize("family", ROTATED)
def test_the_model_computes_what_it_did(family):
    model = build(family)
    with torch.no_grad():
        for parameter in model.parameters():  # biases of zero would rotate to zero
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        before, weights = outputs(model, family), {n: p.clone() for n, p in model.named_parameters()}
        calibration = calibrate(model, [inputs(family)])
        _, names = rotate_values_(model, calibration)
        assert len(names) == ROTATED[family]
        torch.testing.assert_close(outputs(model, family), before, rtol=1e-4, atol=1e-5)
    changed = {n for n, p in model.named_parameters() if not torch.allclose(p, weights[n], rtol=1e-3, atol=1e-5)}
    assert {f"{name}.weight" for name in names} <= changed
    assert len(changed) <= 3 * len(names)  # values, their biases, outputs


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("max_width", [4096, 16])
def test_the_calibration_is_that_of_the_rotated_model(gradients, max_width):
    model = build("bert")
    given = calibrate(model, [inputs("bert")], gradients=gradients, max_width=max_width)
    turned, names = rotate_values_(model, given)
    again = calibrate(model, [inputs("bert")], gradients=gradients, max_width=max_width)
    assert turned.fingerprint == again.fingerprint
    for name, use in again.uses.items():
        for field in dataclasses.fields(use):
            found, wanted = getattr(turned.uses[name], field.name), getattr(use, field.name)
            if isinstance(wanted, torch.Tensor) and not (max_width == 16 and _is_turned(name, names, field.name)):
                scale = float(wanted.abs().max())
                torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * scale + 1e-12, msg=f"{name} {field}")
    importances_of(turned, model)


def _is_turned(name, names, field):
    """A diagonal does not say what a rotation makes of it."""
    return (field == "inputs" and name in names) or (field == "gradients" and name.endswith("value"))


def test_cutting_neighbours_costs_less():
    model = build("bert")
    calibration = calibrate(model, [inputs("bert")])
    before = _errors(model, calibration)
    after = _errors(model, rotate_values_(model, calibration)[0])
    assert sum(after) < 0.97 * sum(before)


def _errors(model, calibration):
    importances = importances_of(calibration, model)
    structure = KroneckerSum(HIDDEN, HIDDEN, (HIDDEN, HIDDEN // 4), (1, 4), 1)
    return [
        Kronecker()
        .fit(layer.attention.output.dense.weight, structure=structure, importance=importances[name])
        .weighted_error
        for i, layer in enumerate(model.encoder.layer)
        for name in [f"encoder.layer.{i}.attention.output.dense"]
    ]


def test_important_directions_take_positions_of_high_powers_of_two_first():
    assert _layout(8) == [0, 4, 2, 6, 1, 3, 5, 7]
    assert sorted(_layout(12)) == list(range(12))
    assert _layout(HIDDEN // HEADS)[0] == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "plain"])
def test_what_cannot_be_rotated_is_left_alone(family):
    model = build(family)
    calibration, before = calibrate(model, [inputs(family)]), snapshot(model)
    with pytest.raises(PlanError, match=r"no value and output projections were found .* attention.self.value"):
        rotate_values_(model, calibration)
    assert_unchanged(model, before)


def test_another_models_calibration_is_refused_and_nothing_changed():
    model, other = build("bert"), FAMILIES["bert"]()
    nn.init.normal_(other.encoder.layer[0].attention.self.query.weight)
    before = snapshot(model)
    with pytest.raises(CalibrationError, match="made for another model"):
        rotate_values_(model, calibrate(other, [inputs("bert")]))
    assert_unchanged(model, before)
