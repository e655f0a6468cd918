"""Searched sensitivities: whole compressed models decide, and the model is left as it was."""

import copy

import pytest
import torch

import compresskit
from compresskit.calibration import calibrate
from compresskit.errors import CalibrationError
from tests.calibration.test_compress import LINEAR, samples
from tests.models import assert_unchanged, build, snapshot


def output_error(model, dense, batches) -> float:
    lost = energy = 0.0
    with torch.no_grad():
        for batch in batches:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[..., None]
            wanted = dense(**batch).last_hidden_state * mask
            lost += float((model(**batch).last_hidden_state * mask - wanted).square().sum())
            energy += float(wanted.square().sum())
    return (lost / energy) ** 0.5


@pytest.mark.parametrize(
    ("method", "aware", "robust"),
    [("svd", True, False), ("svd", False, False), ("kronecker", True, False), ("kronecker", True, True)],
)
def test_it_is_never_worse_than_its_start_on_the_samples(method, aware, robust):
    dense = build("bert").eval()
    with torch.no_grad():
        dense.get_submodule("encoder.layer.1.output.dense").weight.mul_(20)
    calibration = calibrate(dense, samples()) if aware else None
    errors, before, seen = {}, snapshot(dense), []
    for name, search in (("start", None), ("searched", samples(2))):
        small = copy.deepcopy(dense)
        how = {"search": search, "on_progress": lambda step: seen.append(step) if step.stage == "search" else None}
        compresskit.compress(small, method, ratio=2.5, calibration=calibration, robust=robust, **how, **LINEAR)
        errors[name] = output_error(small, dense, samples(2))
    assert_unchanged(dense, before)
    assert errors["searched"] <= errors["start"] * (1 + 1e-4)
    assert errors["searched"] == pytest.approx(min(step.error for step in seen), rel=1e-4)
    assert len(seen) > 1
    assert all(0 < step.done <= step.total for step in seen)


def test_a_shape_whose_errors_are_hidden_gets_less():
    """Next to nothing of what a feed-forward network answers is added to the rest: only whole models show it."""
    model = build("bert")
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.output.dense.weight.mul_(1e-4)
    found = {}
    for name, search in (("start", None), ("searched", samples(2))):
        moments = calibrate(model, samples())
        plan = compresskit.plan(model, "svd", ratio=2.5, calibration=moments, search=search, **LINEAR)
        found[name] = sum(p.params for p in plan.sites if "attention" not in p.site.name)
        assert bool(plan.searched) == (name == "searched")
        assert plan.to_json()["searched"] == dict(plan.searched)
    assert found["searched"] < found["start"]


def test_without_samples_it_says_so():
    with pytest.raises(CalibrationError, match="tried on samples"):
        compresskit.plan(build("bert"), "svd", ratio=1.3, search=[], **LINEAR)
