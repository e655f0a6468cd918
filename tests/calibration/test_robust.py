"""Robust fits: for inputs that are off, with the structures that a plan without has."""

import copy
import dataclasses

import pytest
import torch

import compresskit
from compresskit.calibration import calibrate
from compresskit.calibration.weights import NOISE, expecting_errors, importances_of
from compresskit.errors import CalibrationError, PlanError
from tests.calibration.test_compress import LINEAR, samples
from tests.models import build


@pytest.mark.parametrize("method", ["svd", "kronecker", "tucker", "blast"])
def test_a_fit_is_better_for_noisy_inputs_and_worse_for_exact_ones(method):
    dense = build("bert")
    moments = calibrate(dense, samples())
    plan = compresskit.plan(dense, method, ratio=2, calibration=moments, **LINEAR)
    small = {robust: copy.deepcopy(dense) for robust in (False, True)}
    reports = {robust: compresskit.apply(m, plan, calibration=moments, robust=robust) for robust, m in small.items()}
    assert [site.structure for site in reports[True].sites] == [site.structure for site in reports[False].sites]
    assert reports[True].relative_error < reports[False].relative_error
    assert reports[True].weighted_error >= reports[False].weighted_error * (1 - 1e-3)
    noisy = expecting_errors(importances_of(moments, dense), plan)
    errors = dict.fromkeys(small, 0.0)
    for robust, model in small.items():
        for planned in plan.sites:
            name = planned.site.name
            weight, importance = dense.get_submodule(name).weight.detach(), noisy[name]
            difference = weight - model.get_submodule(name).rebuilt_weight().detach()
            metric = importance.metric(weight)
            errors[robust] += metric.squared_norm(difference) / metric.squared_norm(weight)
    assert errors[True] < errors[False]


def test_fits_in_order_expect_a_little_noise_too():
    dense = build("bert")
    plan = compresskit.plan(dense, "svd", ratio=2, calibration=calibrate(dense, samples()), **LINEAR)
    errors = {}  # of a layer that reads the same without and with: nothing is compressed before it
    for robust in (False, True):
        how = {"samples": samples(), "sequential": True, "robust": robust}
        report = compresskit.apply(copy.deepcopy(dense), plan, **how)
        errors[robust] = {site.name: site.relative_error for site in report.sites}["encoder.layer.0.attention.self.key"]
    assert errors[True] < errors[False]


def test_noise_follows_the_errors_that_the_plan_expects():
    dense = build("bert")
    moments = calibrate(dense, samples())
    importances = importances_of(moments, dense)
    noises = []
    for ratio in (1.5, 3):
        plan = compresskit.plan(dense, "svd", ratio=ratio, calibration=moments, **LINEAR)
        squared = sum(p.expected_error**2 * p.site.num_params for p in plan.sites)
        squared /= sum(p.site.num_params for p in plan.sites)
        (noise,) = {importance.noise for importance in expecting_errors(importances, plan).values()}
        assert NOISE * squared / 1.42 < noise < NOISE * squared * 1.42
        noises.append(noise)
    assert noises[0] < noises[1]


def test_a_plan_without_expected_errors_says_so():
    dense = build("bert")
    plan = compresskit.plan(dense, "svd", ratio=2, **LINEAR)
    edited = dataclasses.replace(plan, sites=tuple(dataclasses.replace(p, expected_error=None) for p in plan.sites))
    with pytest.raises(PlanError, match="this one has none: leave robust out"):
        compresskit.apply(dense, edited, calibration=calibrate(dense, samples()), robust=True)


def test_it_takes_a_calibration():
    for job in (compresskit.compress, compresskit.plan):
        with pytest.raises(CalibrationError, match="give calibration= or samples="):
            job(build("bert"), "svd", ratio=1.5, robust=True, **LINEAR)


def test_the_report_says_so():
    dense = build("bert")
    report = compresskit.compress(dense, "svd", ratio=2, samples=samples(), robust=True, **LINEAR)
    assert report.calibration["robust"] is True
    assert torch.isfinite(torch.tensor(report.weighted_error))
