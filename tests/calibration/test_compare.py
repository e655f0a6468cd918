"""Plans compared by what whole models answer: the one that is made is the nearest, and the report says so."""

import copy
import dataclasses

import pytest
import torch

import compresskit
from compresskit.calibration import calibrate
from compresskit.calibration.compare import MARGIN, TOGETHER, compare_plans
from compresskit.calibration.trials import Trials
from compresskit.calibration.weights import importances_of
from compresskit.decompositions.auto import Auto
from compresskit.errors import CalibrationError
from compresskit.surgery.pricing import Planned
from tests.calibration.test_compress import LINEAR, samples
from tests.calibration.test_search import output_error
from tests.models import assert_unchanged, build, snapshot

BOTH = Auto(methods="svd+monarch")


@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize("ratio", [1.3, 2.5])
def test_the_nearest_is_made_and_said(ratio, robust):
    dense = build("bert").eval()
    moments, before, seen = calibrate(dense, samples()), snapshot(dense), []
    how = {"ratio": ratio, "calibration": moments, "robust": robust, **LINEAR}
    compared = copy.deepcopy(dense)
    report = compresskit.compress(
        compared, BOTH, compare=samples(2), on_progress=lambda s: seen.append(s) if s.stage == "rivals" else None, **how
    )
    errors = dict(report.compared)
    assert_unchanged(dense, before)
    assert TOGETHER in errors
    assert len(errors) > 1
    taken = next(iter(errors.values()))
    assert output_error(compared, dense, samples(2)) == pytest.approx(taken, rel=1e-4)
    assert taken**2 <= min(errors.values()) ** 2 * MARGIN**2
    assert taken <= errors[TOGETHER]
    assert {step.name: step.error for step in seen} == errors
    assert all(0 < step.done <= step.total for step in seen)
    assert report.to_json()["compared"] == errors
    for name in errors:
        small = copy.deepcopy(dense)
        compresskit.compress(small, BOTH if name == TOGETHER else Auto(methods=name), **how)
        assert output_error(small, dense, samples(2)) == pytest.approx(errors[name], rel=1e-3)
    plan = compresskit.plan(dense, BOTH, compare=samples(2), **how)
    assert dict(plan.compared) == pytest.approx(errors, rel=1e-4)
    assert [str(p.structure) for p in plan.sites] == [site.structure for site in report.sites]


def test_a_rival_that_answers_nearer_is_taken():
    dense = build("bert").eval()
    moments = calibrate(dense, samples())
    trials = Trials(dense, samples(1), importances_of(moments, dense))
    small, large = (_planned(dense, moments, ratio) for ratio in (1.5, 1.2))
    errors = compare_plans(trials, small, {"large": large, "same": large})
    assert list(errors) == ["large", TOGETHER, "same"]
    assert errors["large"] == errors["same"] < errors[TOGETHER]
    assert trials.found.planned is large
    assert trials.found.squared_error**0.5 == errors["large"]
    assert {*trials.found.fits} == {site.site.name for site in large.plan.sites}


def test_one_that_hardly_answers_nearer_is_not():
    dense = build("bert").eval()
    moments = calibrate(dense, samples())
    first, nearer = (_planned(dense, moments, ratio) for ratio in (1.5, 1.2))
    for margin, taken in ((1.0, nearer), (1.01, nearer), (1e6, first)):
        trials = Trials(dense, samples(1), importances_of(moments, dense), margin=margin)
        errors = compare_plans(trials, first, {"nearer": nearer})
        assert trials.found.planned is taken
        assert next(iter(errors)) == (TOGETHER if taken is first else "nearer")
        assert {*trials.found.fits} == {site.site.name for site in taken.plan.sites}


@pytest.mark.parametrize("method", ["svd", Auto(methods="svd")])
def test_one_method_is_compared_with_nothing(method):
    plan = compresskit.plan(build("bert"), method, ratio=1.3, compare=samples(1), **LINEAR)
    assert plan.compared == ()
    assert plan.to_json()["compared"] == {}


def test_with_a_search_too_it_is_never_worse_than_either():
    dense = build("bert").eval()
    moments, errors = calibrate(dense, samples()), {}
    for name, how in {
        "search": {"search": samples(2)},
        "compare": {"compare": samples(2)},
        "both": {"search": samples(2), "compare": samples(2)},
    }.items():
        small = copy.deepcopy(dense)
        compresskit.compress(small, BOTH, ratio=2, calibration=moments, **how, **LINEAR)
        errors[name] = output_error(small, dense, samples(2))
    assert errors["both"] <= errors["search"] * (1 + 1e-4)


def test_without_samples_it_says_so():
    with pytest.raises(CalibrationError, match="tried on samples"):
        compresskit.plan(build("bert"), BOTH, ratio=1.3, compare=[], **LINEAR)


def test_what_stays_dense_is_shared_with_trials_and_never_written_to():
    dense = build("bert").eval()
    before, moments = snapshot(dense), calibrate(dense, samples())
    trials = Trials(dense, samples(1), importances_of(moments, dense))
    planned = _planned(dense, moments)
    error = trials.squared_error(planned)
    assert error > 0
    assert trials.squared_error(planned) == error
    assert trials.number == 1
    assert_unchanged(dense, before)


def _planned(dense, moments, ratio=1.5):
    return Planned(compresskit.plan(dense, "svd", ratio=ratio, calibration=moments, **LINEAR), {})


def test_the_plan_says_what_it_was_compared_with():
    dense = build("bert").eval()
    moments = calibrate(dense, samples())
    trials = Trials(dense, samples(1), importances_of(moments, dense))
    trials.squared_error(_planned(dense, moments))
    said = trials.found.saying({"a": 0.5}, {"8 x 8 (linear)": 4.0})
    assert said.planned.plan.compared == (("a", 0.5),)
    assert said.planned.plan.searched == (("8 x 8 (linear)", 4.0),)
    assert dataclasses.replace(said.planned.plan, compared=(), searched=()) == trials.found.planned.plan


def test_what_trials_before_have_fitted_is_not_fitted_again(monkeypatch):
    dense = build("bert").eval()
    moments = calibrate(dense, samples())
    importances = importances_of(moments, dense)
    planned, trials = _planned(dense, moments), Trials(dense, samples(1), importances)
    error = trials.squared_error(planned)
    monkeypatch.setattr("compresskit.calibration.trials.fit_site", pytest.fail)
    assert Trials(dense, samples(1), importances, before=trials).squared_error(planned) == error


def test_a_judge_of_one_s_own_decides():
    """Any number that says how wrong a model is: here the answer to one example alone."""
    dense = build("bert").eval()
    moments, (batch, *_), asked = calibrate(dense, samples()), samples(1), []

    def judge(small):
        assert not torch.is_grad_enabled()
        assert not small.training
        asked.append(output_error(small, dense, [batch]))
        return asked[-1]

    report = compresskit.compress(
        dense_copy := copy.deepcopy(dense),
        Auto(methods="monarch+tucker"),
        ratio=2.5,
        calibration=moments,
        compare=judge,
        **LINEAR,
    )
    assert len({*asked}) == len(asked) == 3
    assert sorted(dict(report.compared).values()) == pytest.approx(sorted(asked))
    assert report.compared[0][1] == pytest.approx(min(asked))
    assert output_error(dense_copy, dense, [batch]) == pytest.approx(min(asked), rel=1e-4)
    searched = copy.deepcopy(dense)
    compresskit.compress(searched, "svd", ratio=2.5, calibration=moments, search=judge, **LINEAR)
    assert output_error(searched, dense, [batch]) == pytest.approx(min(asked[len(report.compared) :]), rel=1e-4)


@pytest.mark.parametrize("said", [-0.1, float("nan"), float("inf")])
def test_a_judge_that_gives_no_measure_is_refused(said):
    model = build("bert").eval()
    before, moments = snapshot(model), calibrate(model, samples())
    with pytest.raises(CalibrationError, match=r"a number of at least 0; got (-0\.1|nan|inf)"):
        compresskit.compress(model, BOTH, ratio=2.5, calibration=moments, compare=lambda _: said, **LINEAR)
    assert_unchanged(model, before)


def test_what_layers_count_is_searched_for_each_method_alone():
    """A judge that wants low rank everywhere, and then few parameters in the feed-forward network."""
    dense = build("bert").eval()
    moments = calibrate(dense, samples())

    def judge(small):
        structures = [getattr(module, "structure", None) for module in small.modules()]
        others = sum(structure is not None and structure.kind != "low-rank" for structure in structures)
        params = sum(p.numel() for name, p in small.named_parameters() if "attention" not in name)
        return others + params / sum(p.numel() for p in small.parameters())

    reports, models = {}, {}
    for name, more in (("compared", {}), ("both", {"search": judge})):
        models[name] = copy.deepcopy(dense)
        how = {"ratio": 2.5, "calibration": moments, "compare": judge, **more, **LINEAR}
        reports[name] = compresskit.compress(models[name], Auto(methods="svd+blast"), **how)
        assert {site.method for site in reports[name].sites} == {"svd"}
        assert reports[name].compared[0][0] == "svd"
        assert judge(models[name]) == pytest.approx(reports[name].compared[0][1])
    assert reports["compared"].searched == ()
    assert judge(models["both"]) < judge(models["compared"])
    assert reports["both"].searched
    assert all(factor > 0 and factor != 1 for _, factor in reports["both"].searched)
