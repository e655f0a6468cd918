"""Sequential fits make up for the errors before them; refinement only ever helps on what is held out."""

import pytest
import torch

import compresskit
from compresskit import calibrate
from compresskit.calibration import Refine
from compresskit.errors import CalibrationError
from tests.calibration.test_compress import LINEAR, distance, samples
from tests.models import assert_unchanged, build, inputs, outputs, snapshot


def spiky(family="bert"):
    """A model whose layers read inputs that lie mostly in a few directions."""
    model = build(family)
    with torch.no_grad():
        for name, module in model.named_modules():
            if "layer" in name and isinstance(module, torch.nn.LayerNorm):
                module.weight.copy_(torch.logspace(0, -2, 48))
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(4)
    return model


def compressed(calibration, batches, **how):
    model = spiky()
    report = compresskit.compress(model, "svd", ratio=2, calibration=calibration, samples=batches, **LINEAR, **how)
    return model, report


def test_sequential_and_refined_are_nearer_each():
    dense, batches, fresh = spiky(), samples(24), samples(8, seed=90)
    calibration = calibrate(dense, batches, samples=10**6)
    models = {
        "weighted": compressed(calibration, batches)[0],
        "sequential": compressed(calibration, batches, sequential=True)[0],
        "refined": compressed(calibration, batches, sequential=True, refine=Refine(epochs=8, lr=3e-3))[0],
    }
    errors = {name: distance(model, dense, fresh) for name, model in models.items()}
    assert errors["sequential"] < errors["weighted"]
    assert errors["refined"] < 0.9 * errors["sequential"]


def test_the_error_of_a_sequential_fit_is_that_of_the_output():
    dense, batches = spiky(), samples()
    model, report = compressed(None, batches, sequential=True)
    site = next(s for s in report.sites if s.name == "encoder.layer.1.output.dense")
    seen = {}
    for key, one in (("dense", dense), ("small", model)):
        kept = seen.setdefault(key, [])
        handle = one.get_submodule(site.name).register_forward_hook(
            lambda m, a, out, kept=kept: kept.append(out.detach())
        )
        for batch in batches:
            one(**batch)
        handle.remove()
    masks = [batch["attention_mask"].bool() for batch in batches]
    wanted, got = (torch.cat([t[m] for t, m in zip(seen[k], masks, strict=True)]) for k in ("dense", "small"))
    error = (got - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert site.weighted_error == pytest.approx(float(error.sqrt()), rel=0.02)


@pytest.mark.parametrize("family", ["bert", "bert-mlm", "gpt2", "llama", "vit", "distilbert", "roberta"])
def test_families_with_one_stack_are_fitted_in_order(family):
    model, steps = build(family), []
    report = compresskit.compress(
        model,
        "svd",
        ratio=1.6,
        samples=[inputs(family)],
        sequential=True,
        refine=Refine(epochs=1),
        on_progress=steps.append,
    )
    assert outputs(model, family).isfinite().all()
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "padding_row" not in name)
    assert {step.stage for step in steps} >= {"fit", "refine"}
    assert report.to_json()["calibration"]["sequential"] is True


@pytest.mark.parametrize("family", ["t5", "albert", "plain"])
def test_models_without_one_stack_are_refused_and_unchanged(family):
    model = build(family)
    before = snapshot(model)
    with pytest.raises(CalibrationError, match=r"one list of layers|several times"):
        compresskit.compress(model, "svd", ratio=1.6, samples=[inputs(family)], sequential=True)
    assert_unchanged(model, before)


def test_a_failure_half_way_changes_nothing():
    model = spiky()
    before = snapshot(model)

    def stop(step):
        if step.stage == "fit" and step.done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compresskit.compress(model, "svd", ratio=2, samples=samples(), sequential=True, on_progress=stop, **LINEAR)
    assert_unchanged(model, before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_samples_are_needed():
    with pytest.raises(CalibrationError, match="sequential and refine run on samples: give samples="):
        compresskit.compress(
            build("bert"), "svd", ratio=2, calibration=calibrate(build("bert"), samples()), sequential=True
        )


def test_refinement_that_would_not_help_is_dropped():
    batches = samples()
    once, _ = compressed(None, batches, sequential=True)
    wild, _ = compressed(None, batches, sequential=True, refine=Refine(epochs=1, lr=0.9))
    for name, parameter in once.named_parameters():
        torch.testing.assert_close(dict(wild.named_parameters())[name], parameter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"epochs": 0}, {"lr": 0.0}, {"lr": 2.0}])
def test_refinement_that_makes_no_sense(options):
    with pytest.raises(CalibrationError, match="at least one epoch and a learning rate between 0 and 1"):
        Refine(**options)


def test_half_precision_cannot_be_refined():
    with pytest.raises(CalibrationError, match="refinement trains in float32; load the model in it"):
        compresskit.compress(build("bert").bfloat16(), "svd", ratio=2, samples=samples(), refine=Refine())
