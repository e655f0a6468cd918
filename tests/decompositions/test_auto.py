"""Auto: the union of the other methods, each asked about its own structures, plug-ins included."""

import math

import pytest
import torch

import compresskit
from compresskit.core import registry
from compresskit.core.importance import Importance
from compresskit.decompositions.auto import MAX_SEARCHES, Auto
from compresskit.decompositions.kronecker import Kronecker
from compresskit.decompositions.svd import SVD
from compresskit.errors import OptionError, UnknownNameError
from compresskit.testing.cases import normal, sample_weight
from tests.core.toy import ToyDecomposition


def test_the_menu_is_the_union_of_all_others():
    union = set(Auto().menu(24, 36))
    for name in registry.decompositions():
        if name != "auto":
            assert set(registry.decomposition(name).menu(24, 36)) <= union
    assert {s.terms for s in union if s.kind == "kronecker"} == {1, 2, 3, 4}


@pytest.mark.parametrize("ratio", [1.5, 3, 8])
def test_as_good_as_the_best_single_method_by_price(ratio):
    weight = sample_weight(32, 48)
    auto = Auto()
    small = [s for s in auto.menu(32, 48) if s.num_params <= 32 * 48 / ratio]
    prices = dict(zip(small, auto.analyse(weight).squared_errors(small), strict=True))
    for name in ("svd", "kronecker", "tucker", "monarch", "blast", "tensor-train"):
        method = registry.decomposition(name)
        own = [s for s in method.menu(32, 48) if s.num_params <= 32 * 48 / ratio]
        assert min(prices.values()) <= min(method.analyse(weight).squared_errors(own)) * (1 + 1e-6)


def test_a_kronecker_weight_gets_kronecker_and_a_low_rank_one_is_kept():
    product = torch.kron(normal(4, 4, seed=1), normal(8, 12, seed=2)).float()
    assert Auto().fit(product, ratio=8).structure.kind == "kronecker"
    low = (normal(32, 2, seed=1) @ normal(2, 48, seed=2)).float()
    assert Auto(methods="svd+kronecker").fit(low + 0.01, ratio=7).relative_error < 1e-2


def test_methods_restrict_it():
    auto = Auto(methods="svd+kronecker")
    assert {type(child) for child in auto.children()} == {SVD, Kronecker}
    assert {s.kind for s in auto.menu(24, 36)} == {"low-rank", "kronecker"}


def test_unknown_methods_and_itself_are_refused():
    with pytest.raises(UnknownNameError, match="did you mean 'svd'"):
        list(Auto(methods="svdd").menu(8, 8))
    with pytest.raises(OptionError, match="auto itself is none of them"):
        Auto(methods="svd+auto")


def test_methods_without_a_data_aware_fit_are_left_out_where_there_is_data(monkeypatch):
    monkeypatch.setitem(registry._decompositions, "toy", ToyDecomposition)
    auto, weight = Auto(methods="svd+toy"), sample_weight(24, 36)
    menu = list(auto.menu(24, 36))
    importance = Importance(cols=torch.rand(36, generator=torch.Generator().manual_seed(0)))
    prices = dict(zip(menu, auto.analyse_for(weight, importance).squared_errors(menu), strict=True))
    assert all(math.isinf(price) == (s.kind != "low-rank") for s, price in prices.items())
    assert {s.kind for s in menu} > {"low-rank"}
    assert all(map(math.isfinite, auto.analyse(weight).squared_errors(menu)))


def test_a_plan_names_the_method_and_what_the_others_could_do():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(48, 32, bias=False) for _ in range(2)]
    layers[0].weight.data = torch.kron(normal(4, 4, seed=1), normal(8, 12, seed=2)).float()
    layers[1].weight.data = (normal(32, 3, seed=1) @ normal(3, 48, seed=2)).float()
    model = torch.nn.Sequential(*layers)
    plan = compresskit.plan(model, "auto", ratio=6, allow_slower=True)
    methods = {planned.site.name: planned.decomposition.name for planned in plan.sites}
    assert methods["0"] == "kronecker"
    first = plan.to_json()["sites"][0]
    assert first["method"] == "kronecker"
    assert set(first["alternatives"]) >= {"kronecker", "svd"}
    best = next(iter(first["alternatives"].items()))
    assert best[0] == "kronecker"
    assert best[1] == pytest.approx(first["expected_error"], abs=1e-6)
    again = compresskit.plan_from_json(plan.to_json(), model)
    assert [p.structure for p in again.sites] == [p.structure for p in plan.sites]
    report = compresskit.apply(model, again)
    assert {site.method for site in report.sites} == set(methods.values())


def test_few_structures_of_a_search_are_priced_where_there_is_data():
    auto, weight = Auto(methods="svd+kronecker"), sample_weight(48, 48)
    importance = Importance(cols=torch.rand(48, generator=torch.Generator().manual_seed(0)))
    menu = list(auto.menu(48, 48))
    prices = auto.analyse_for(weight, importance).squared_errors(menu)
    priced = [s.kind for s, price in zip(menu, prices, strict=True) if math.isfinite(price)]
    assert 2 < priced.count("kronecker") <= MAX_SEARCHES < sum(s.kind == "kronecker" for s in menu)
    assert priced.count("low-rank") == sum(s.kind == "low-rank" for s in menu)


def falling(rows, cols, seed):
    """A weight whose singular values fall slowly."""
    left, values, right = torch.linalg.svd(normal(rows, cols, seed=seed), full_matrices=False)
    return (left * (values / torch.arange(1, len(values) + 1) ** 0.2) @ right).float()


def model_of(sides, seed=0):
    """Linear layers of these shapes."""
    layers = [torch.nn.Linear(cols, rows) for rows, cols in sides]
    for i, layer in enumerate(layers):
        layer.weight.data = falling(*layer.weight.shape, seed=seed + i)
    return torch.nn.Sequential(*layers)


@pytest.mark.parametrize("ratio", [1.5, 3])
@pytest.mark.parametrize("uniform", [False, True])
def test_dear_prices_near_the_first_choice_are_enough(monkeypatch, ratio, uniform):
    model = model_of([(96, 96), (96, 192)])
    asked = []
    method = type(registry.decomposition("blast"))
    original = method.analyse

    def analyse(self, weight):
        analysis = original(self, weight)
        prices = analysis.squared_errors
        monkeypatch.setattr(
            analysis, "squared_errors", lambda structures: asked.append(len(structures)) or prices(structures)
        )
        return analysis

    monkeypatch.setattr(method, "analyse", analyse)
    options = {"ratio": ratio, "uniform": uniform, "allow_slower": True}
    near, few = compresskit.plan(model, "auto", **options), sum(asked)
    asked.clear()
    monkeypatch.setattr(method, "prices_dearly", False)
    whole = compresskit.plan(model, "auto", **options)
    assert 0 < few < sum(asked)
    assert any(p.decomposition.name == "blast" for p in near.sites)
    losses = [sum(p.expected_error**2 * p.site.num_params for p in plan.sites) for plan in (near, whole)]
    assert losses[0] <= losses[1] * (1 + max(near.gap, whole.gap) + 1e-6)


def test_a_weight_that_is_dense_at_first_is_priced_with_the_largest_of_a_dear_method(monkeypatch):
    """It may have nothing near the dense size, as that would be slow: its largest structures are the nearest then."""
    model = model_of([(96, 96), (96, 96)])
    blocks = [torch.linalg.qr(normal(24, 24, seed=seed))[0] for seed in range(4)]
    model[1].weight.data = torch.block_diag(*blocks).float()  # no rank can be spared, and blocks are all there is
    method = type(registry.decomposition("blast"))
    menu = method.menu

    def small(self, *shape, **how):
        return [structure for structure in menu(self, *shape, **how) if structure.num_params < 5000]

    monkeypatch.setattr(method, "menu", small)
    options = {"ratio": 1.6, "allow_slower": True}
    without = compresskit.plan(model, "svd", **options)
    assert [p.site.name for p in without.sites] == ["0"], "the case needs a weight that the others leave dense"
    near = compresskit.plan(model, Auto(methods="svd+blast"), **options)
    monkeypatch.setattr(method, "prices_dearly", False)
    whole = compresskit.plan(model, Auto(methods="svd+blast"), **options)
    losses = [sum(p.expected_error**2 * p.site.num_params for p in plan.sites) for plan in (near, whole, without)]
    assert losses[0] <= losses[1] * (1 + max(near.gap, whole.gap) + 1e-6) < losses[2]


def test_where_the_others_are_too_large_the_smallest_of_a_dear_method_is_priced_at_once(monkeypatch):
    model = model_of([(96, 96)])
    monkeypatch.setattr(type(registry.decomposition("svd")), "prices_dearly", True)
    plan = compresskit.plan(model, Auto(methods="svd+monarch"), ratio=9312 / 300, allow_slower=True)
    assert [p.structure.kind for p in plan.sites] == ["low-rank"]  # of 192 numbers; Monarch's 288 do not fit


def test_structures_without_a_price_do_not_shift_the_others():
    """A tensor train has no data-aware fit: its prices are infinite, and stand before Tucker's in the menu."""
    model = model_of([(32, 48)]).eval()
    moments = compresskit.calibrate(model, [{"input": normal(64, 48, seed=3).float()}])
    plan = compresskit.plan(model, Auto(methods="tensor-train+tucker"), ratio=2, calibration=moments, allow_slower=True)
    planned = plan.sites[0]
    assert planned.decomposition.name == "tucker"
    report = compresskit.apply(model, plan, calibration=moments)
    assert report.sites[0].weighted_error <= planned.expected_error * (1 + 1e-4)


def test_what_takes_memory_is_given_back_and_prices_stay():
    weight = sample_weight(96, 96)
    analysis = Auto(methods="blast").analyse(weight)
    menu = list(Auto(methods="blast").menu(96, 96))
    prices = analysis.squared_errors(menu)
    (kept,) = analysis._dear.values()
    small = set(vars(kept))
    fitted = analysis.factors(menu[-1])
    assert set(vars(kept)) > small  # what the fit works with
    analysis.shrink()
    assert set(vars(kept)) == small
    assert analysis.squared_errors(menu) == prices
    torch.testing.assert_close(analysis.factors(menu[-1]), fitted, rtol=0, atol=0)


def test_progress_names_the_second_look():
    steps = []
    compresskit.compress(model_of([(96, 96), (96, 192)]), "auto", ratio=3, allow_slower=True, on_progress=steps.append)
    assert list(dict.fromkeys(step.stage for step in steps)) == ["analyse", "compare", "fit"]
    assert all(1 <= step.done <= step.total == 2 for step in steps)
