"""Compressing with a calibration: outputs are nearer than without, biases take up means, and everything is reported."""

import pytest
import torch

import compresskit
from compresskit import calibrate
from compresskit.calibration.weights import importances_of
from compresskit.errors import CalibrationError, OptionError
from compresskit.surgery.sites import find_sites
from tests.calibration.test_calibrate import padded
from tests.models import VOCAB, Plain, assert_unchanged, build, inputs, outputs, snapshot

LINEAR = {"include": "*encoder.layer*"}


def samples(count=8, seed=3):
    return [padded(count=4, length=12, seed=seed + n) for n in range(count)]


def distance(model, dense, batches):
    """Mean squared difference of last hidden states at real tokens."""
    with torch.no_grad():
        pairs = [(m(**b).last_hidden_state for m in (model, dense)) for b in batches]
    masks = [batch["attention_mask"].bool() for batch in batches]
    return sum(float((ours - theirs)[mask].square().mean()) for (ours, theirs), mask in zip(pairs, masks, strict=True))


@pytest.mark.parametrize("gradients", [False, True])
def test_outputs_are_nearer_than_with_a_plain_fit(gradients):
    dense = build("bert")
    with torch.no_grad():  # inputs that lie mostly in a few directions, as those of trained models do
        for layer in dense.encoder.layer:
            layer.attention.output.LayerNorm.weight.copy_(torch.logspace(0, -2, 48))
            layer.output.LayerNorm.weight.copy_(torch.logspace(0, -2, 48))
    calibration = calibrate(dense, samples(), gradients=gradients)
    plain, aware = (build("bert"), build("bert"))
    for model in (plain, aware):
        model.load_state_dict(dense.state_dict())
    compresskit.compress(plain, "svd", ratio=2, **LINEAR)
    report = compresskit.compress(aware, "svd", ratio=2, calibration=calibration, **LINEAR)
    assert distance(aware, dense, samples(seed=50)) < 0.7 * distance(plain, dense, samples(seed=50))
    assert report.corrected_biases == len(report.sites)
    assert report.weighted_error < report.relative_error
    assert report.to_json()["calibration"]["samples"] == calibration.samples


def test_the_weighted_error_is_the_error_of_the_output():
    dense, model = build("bert"), build("bert")
    batches = samples()
    report = compresskit.compress(model, "svd", ratio=1.3, calibration=calibrate(dense, batches), **LINEAR)
    name = report.sites[0].name
    x = []
    handle = dense.get_submodule(name).register_forward_pre_hook(lambda module, args: x.append(args[0].detach()))
    for batch in batches:
        dense(**batch)
    handle.remove()
    flat = torch.cat([t[b["attention_mask"].bool()] for t, b in zip(x, batches, strict=True)])
    with torch.no_grad():
        wanted, got = dense.get_submodule(name)(flat), model.get_submodule(name)(flat)
    torch.testing.assert_close(got.mean(0), wanted.mean(0), rtol=1e-4, atol=1e-4)  # the bias took up the mean
    error = (got - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert report.sites[0].weighted_error == pytest.approx(float(error.sqrt()), rel=1e-2)


@pytest.mark.parametrize("family", ["bert-mlm", "gpt2", "llama-tied", "t5", "albert", "plain"])
def test_every_family_is_compressed_with_a_calibration(family):
    model = build(family)
    calibration = calibrate(model, [inputs(family)], gradients=True)
    report = compresskit.compress(model, "svd", ratio=1.6, calibration=calibration)
    assert outputs(model, family).isfinite().all()
    reached = {site.name for site in report.sites if any(name in calibration.uses for name in site.names)}
    assert {site.name for site in report.sites if site.weighted_error is not None} == reached


def test_shared_biases_stay_shared():
    model = build("bert-mlm")
    calibration = calibrate(model, [padded()])
    before = model.cls.predictions.bias.detach().clone()
    compresskit.compress(model, "svd", ratio=1.1, include="*word_embeddings", calibration=calibration)
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias
    assert not torch.equal(model.cls.predictions.bias, before)


def test_a_tied_weight_answers_to_both_uses():
    model = Plain()
    calibration = calibrate(model, [inputs("plain")])
    survey = find_sites(model)
    importance = importances_of(calibration, model, survey)["embed"]
    assert importance.rows.shape == (VOCAB,)
    assert importance.cols.dim() == 2
    assert importance.rows.argmax() == calibration.uses["embed"].counts.argmax()
    seen = calibration.uses["head"].inputs
    correlation = torch.corrcoef(torch.stack([importance.cols.flatten(), seen.flatten()]))[0, 1]
    assert correlation > 0.5


def test_words_that_no_sample_holds_still_count():
    model = build("bert")
    calibration = calibrate(model, [padded()])
    rows = importances_of(calibration, model)["embeddings.word_embeddings"].rows
    assert importances_of(calibration.with_even_words(), model)[
        "embeddings.word_embeddings"
    ].rows.unique().tolist() == [1]
    counts = calibration.uses["embeddings.word_embeddings"].counts
    assert rows[counts == 0].unique().tolist() == [0.5]
    assert rows.mean() == pytest.approx(1)


def test_a_plan_is_priced_by_outputs_and_applied_with_the_same_moments():
    model = build("bert")
    calibration = calibrate(model, samples())
    planned = compresskit.plan(model, "svd", ratio=2, calibration=calibration, **LINEAR)
    report = compresskit.apply(model, planned, calibration=calibration)
    for site in report.sites:
        assert site.weighted_error == pytest.approx(site.expected_error, rel=0.05, abs=1e-3)


def test_a_calibration_of_another_model_changes_nothing():
    calibration = calibrate(build("gpt2"), [inputs("gpt2")])
    model = build("bert")
    before = snapshot(model)
    with pytest.raises(CalibrationError, match="made for another model"):
        compresskit.compress(model, "svd", ratio=2, calibration=calibration)
    assert_unchanged(model, before)


def test_a_method_without_data_aware_fit_says_so():
    model = build("bert")
    before = snapshot(model)
    calibration = calibrate(model, [padded()])
    unable = [name for name, cls in compresskit.methods().items() if not cls.is_data_aware()]
    for method in unable:
        with pytest.raises(OptionError, match=f"{method} has no data-aware fit"):
            compresskit.compress(model, method, ratio=2, calibration=calibration)
    assert_unchanged(model, before)
