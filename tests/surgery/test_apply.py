"""Applying a plan: all or nothing, whatever goes wrong and whenever; and a report that is true."""

import json
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import compresskit
from compresskit import SVD, FactorizedEmbedding, FactorizedLinear, Progress
from compresskit.errors import CheckpointError, PlanError, WeightError
from tests.core.toy import Toy, ToyAnalysis, ToyDecomposition
from tests.models import HIDDEN, VOCAB, Plain, assert_unchanged, build, outputs, snapshot, unique_params

LAST = "encoder.layer.1.output.dense"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", compresskit.methods())
def test_weights_that_are_not_finite_are_named_and_nothing_changes(method, bad):
    model = build("bert")
    with torch.no_grad():
        model.get_submodule(LAST).weight[2, 7] = bad
    before, steps = snapshot(model), []
    with pytest.raises(WeightError, match=f"the weight of '{LAST}' holds [01] NaN and [01] infinite values"):
        compresskit.compress(model, method, ratio=2, on_progress=steps.append)
    assert steps == []  # before any search
    assert_unchanged(model, before)


def test_weights_that_went_bad_after_planning_are_named_too():
    model = build("bert")
    planned = compresskit.plan(model, "svd", ratio=3)
    name = planned.sites[-1].site.name
    with torch.no_grad():
        model.get_submodule(name).weight.fill_(math.nan)
    before = snapshot(model)
    with pytest.raises(WeightError, match=f"the weight of '{name}' holds"):
        compresskit.apply(model, planned)
    assert_unchanged(model, before)


@pytest.mark.parametrize("method", compresskit.methods())
def test_a_zero_weight_becomes_zero_factors(method):
    model = build("bert")
    with torch.no_grad():
        for name in ("query", "key"):
            model.get_submodule(f"encoder.layer.0.attention.self.{name}").weight.zero_()
    report = compresskit.compress(model, method, ratio=8)
    errors = {site.name: site.relative_error for site in report.sites}
    layer = model.encoder.layer[0].attention.self
    assert errors["encoder.layer.0.attention.self.query"] == errors["encoder.layer.0.attention.self.key"] == 0
    torch.testing.assert_close(layer.query.weight + 0, torch.zeros(HIDDEN, HIDDEN))
    assert outputs(model, "bert").isfinite().all()


def test_a_model_of_zeros_has_error_zero():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert compresskit.compress(model, "svd", ratio=2).relative_error == 0


class FailingAnalysis(ToyAnalysis):
    def factors(self, structure):
        if self.weight.shape == (HIDDEN, 2 * HIDDEN):
            raise RuntimeError("out of patience")
        return super().factors(structure)


class NanAnalysis(ToyAnalysis):
    def factors(self, structure):
        return {name: tensor / 0 for name, tensor in super().factors(structure).items()}


class UnevenAnalysis(ToyAnalysis):
    """A product that is right, of factors that float16 cannot hold."""

    def factors(self, structure):
        factors = super().factors(structure)
        return {"left": factors["left"] * 1e9, "right": factors["right"] / 1e9}


def toy(analysis_class):
    """A decomposition that the registry does not know."""

    @dataclass(frozen=True)
    class Broken(ToyDecomposition):
        name = "broken"
        structures = (Toy,)
        analysis = analysis_class

    return Broken()


@pytest.mark.parametrize(
    ("analysis", "error", "message"),
    [
        (FailingAnalysis, RuntimeError, "out of patience"),
        (NanAnalysis, WeightError, r"fitting 'embed' with toy\(rank=\d+\) gave values that are not finite"),
    ],
)
def test_a_decomposition_that_fails_half_way_changes_nothing(analysis, error, message):
    model = Plain()
    fitted = []
    before = snapshot(model)
    with pytest.raises(error, match=message):
        compresskit.compress(model, toy(analysis), ratio=3, on_progress=fitted.append)
    assert_unchanged(model, before)
    assert [step.name for step in fitted if step.stage == "fit"] == (
        ["embed", "first.0"] if analysis is FailingAnalysis else []
    )
    assert "broken" not in compresskit.methods()


def test_factors_that_the_dtype_cannot_hold_are_refused():
    model = Plain()
    compresskit.compress(model, toy(UnevenAnalysis), ratio=3)  # float32 can
    model = Plain().half()
    before = snapshot(model)
    with pytest.raises(WeightError, match=r"factors of 'embed' are too large for torch\.float16"):
        compresskit.compress(model, toy(UnevenAnalysis), ratio=3)
    assert_unchanged(model, before)


@pytest.mark.parametrize("stage", ["analyse", "fit"])
@pytest.mark.parametrize("done", [1, 9])
def test_ctrl_c_changes_nothing(stage, done):
    def interrupt(step):
        if (step.stage, step.done) == (stage, done):
            raise KeyboardInterrupt

    model = build("gpt2")
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        compresskit.compress(model, "svd", ratio=3, on_progress=interrupt)
    assert_unchanged(model, before)
    assert compresskit.compress(model, "svd", ratio=3).ratio >= 3


def renamed():
    return nn.Sequential(build("bert"))


def hooked():
    model = build("bert")
    model.encoder.layer[0].attention.self.query.register_forward_hook(lambda *args: None)
    return model


@pytest.mark.parametrize(
    ("make", "family", "message"),
    [
        (lambda: build("gpt2"), "bert", "made for a model of 48,144 parameters, this one has 64,320"),
        (renamed, "bert", r"sites cannot be replaced here as planned: embeddings.word_embeddings \(120 x 48\)"),
        (hooked, "bert", r"1 of its 15 sites .*: encoder.layer.0.attention.self.query \(48 x 48\)$"),
        (lambda: nn.Sequential(Plain()), "plain", "3 of its 3 sites cannot be replaced here"),
    ],
)
def test_a_plan_of_another_model_is_refused(make, family, message):
    planned = compresskit.plan(build(family), "svd", ratio=4)
    model = make()
    before = snapshot(model)
    with pytest.raises(PlanError, match=message):
        compresskit.apply(model, planned)
    assert_unchanged(model, before)


def test_a_plan_is_refused_after_it_was_applied():
    model = build("bert")
    planned = compresskit.plan(model, "svd", ratio=4)
    compresskit.apply(model, planned)
    before = snapshot(model)
    with pytest.raises(PlanError, match="made for a model of 48,144 parameters, this one has"):
        compresskit.apply(model, planned)
    assert_unchanged(model, before)


def test_a_model_that_another_library_has_quantised_is_refused_before_anything_changes():
    class Config:
        quant_method = "bitsandbytes"

    class Quantizer:
        quantization_config = Config()

    model = build("bert")
    planned = compresskit.plan(model, "svd", ratio=4)
    model.hf_quantizer = Quantizer()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match="already quantised by bitsandbytes"):
        compresskit.compress(model, "svd", ratio=4)
    with pytest.raises(CheckpointError, match="already quantised by bitsandbytes"):
        compresskit.apply(model, planned)
    assert_unchanged(model, before)


@pytest.mark.parametrize("method", compresskit.methods())
def test_plan_and_apply_do_what_compress_does(method):
    direct, planned = build("gpt2"), build("gpt2")
    report = compresskit.compress(direct, method, ratio=3)
    by_plan = compresskit.apply(planned, compresskit.plan(planned, method, ratio=3))
    torch.testing.assert_close(dict(planned.state_dict()), dict(direct.state_dict()), rtol=0, atol=0)
    assert by_plan.sites == report.sites
    assert by_plan.left == report.left


def test_progress_counts_every_site_of_both_stages():
    steps: list[Progress] = []
    report = compresskit.compress(build("bert"), "svd", ratio=1.2, on_progress=steps.append)
    analysed = [step for step in steps if step.stage == "analyse"]
    fitted = [step for step in steps if step.stage == "fit"]
    assert steps == analysed + fitted
    assert [(s.done, s.total, s.error) for s in analysed] == [(i + 1, 15, None) for i in range(15)]
    assert [(s.name, s.done, s.total, s.error) for s in fitted] == [
        (site.name, i + 1, len(report.sites), site.relative_error) for i, site in enumerate(report.sites)
    ]
    assert len(report.sites) < 15  # at such a ratio some stay dense


def test_the_report_of_a_small_model_by_hand():
    model = Plain().to(torch.bfloat16)
    report = compresskit.compress(model, SVD(rank=4))
    embedding, linear = 4 * (VOCAB + HIDDEN) + HIDDEN, 4 * (96 + HIDDEN)
    dense = VOCAB * HIDDEN + 2 * 96 * HIDDEN + 96 + HIDDEN + 2 * HIDDEN
    left = embedding + 2 * linear + 96 + HIDDEN + 2 * HIDDEN
    assert (report.params_before, report.params_after) == (dense, left)
    assert (report.bytes_before, report.bytes_after) == (2 * dense, 2 * left)
    assert (report.embedding_params_before, report.embedding_params_after) == (VOCAB * HIDDEN, embedding)
    assert report.ratio == report.bytes_ratio == dense / left
    assert report.site_ratio == (VOCAB * HIDDEN + 2 * 96 * HIDDEN) / (embedding + 2 * linear)
    assert report.body_ratio == (dense - VOCAB * HIDDEN) / (left - embedding)
    macs = 4 * (VOCAB + HIDDEN) + 4 * HIDDEN + 2 * linear  # the head multiplies, the embedding looks rows up
    assert report.macs_ratio == (VOCAB * HIDDEN + 2 * 96 * HIDDEN) / macs
    assert report.coverage == (VOCAB * HIDDEN + 2 * 96 * HIDDEN) / dense
    assert report.time_s > 0
    assert [(s.name, s.names, s.method, s.structure) for s in report.sites] == [
        ("embed", ("embed", "head"), "svd", "low-rank(rank=4)"),
        ("first.0", ("first.0",), "svd", "low-rank(rank=4)"),
        ("first.2", ("first.2",), "svd", "low-rank(rank=4)"),
    ]
    assert unique_params(model) == left


def test_groups_of_a_report_leave_layer_numbers_out():
    report = compresskit.compress(build("bert"), "svd", ratio=8)
    groups = report.by_group()
    assert [s.name for s in groups["encoder.layer.*.output.dense"]] == [
        f"encoder.layer.{i}.output.dense" for i in (0, 1)
    ]
    assert sum(map(len, groups.values())) == len(report.sites)


def test_a_report_is_plain_data():
    report = compresskit.compress(build("bert"), "kronecker", ratio=4)
    data = json.loads(json.dumps(report.to_json()))
    assert data["ratio"] == report.ratio
    assert data["sites"][0]["structure"].startswith("kronecker(left=")
    assert data["left"][0]["reason"] == "fewer than 16 rows or columns"


def test_every_place_of_a_shared_module_is_swapped():
    model = Plain()
    compresskit.compress(model, "svd", ratio=3)
    assert model.again is model.first
    assert isinstance(model.again[0], FactorizedLinear)
    assert isinstance(model.embed, FactorizedEmbedding)
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared})})
    compresskit.compress(model, "svd", ratio=2)
    assert model["a"] is model["b"]["c"]
    assert isinstance(model["a"], FactorizedLinear)


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e6, 1e9])
def test_the_error_of_a_report_does_not_depend_on_scale(scale):
    model = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 48))
    errors = []
    for factor in (1.0, scale):
        copy = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 48))
        with torch.no_grad():
            for mine, theirs in zip(copy, model, strict=True):
                mine.weight.copy_(theirs.weight * factor)
        errors.append(compresskit.compress(copy, "svd", ratio=2).relative_error)
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
