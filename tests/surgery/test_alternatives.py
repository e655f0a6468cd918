"""Fronts: what each method could do for a site, and what other sizes of a plan would lose."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import compresskit
from compresskit.decompositions.auto import Auto
from compresskit.decompositions.svd import SVD
from compresskit.surgery.alternatives import best_within, fronts_of, undominated
from compresskit.surgery.pricing import make_plan
from compresskit.surgery.rules import Rule, assign
from compresskit.surgery.sites import find_sites


def model():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(48, 48) for _ in range(4)))


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 1)), max_size=12))
def test_undominated_choices_are_those_that_nothing_smaller_beats(pairs):
    sizes, errors = [size for size, _ in pairs], [error for _, error in pairs]
    kept = undominated(sizes, errors)
    assert [sizes[i] for i in kept] == sorted(sizes[i] for i in kept)
    for i, (size, error) in enumerate(pairs):
        rivals = [e for j, (s, e) in enumerate(pairs) if s <= size and j != i]
        assert i not in kept or all(error <= rival for rival in rivals)
        assert any(sizes[j] <= size and errors[j] <= error for j in kept)


def test_fronts_say_what_each_method_reaches_within_a_size():
    auto, weight = Auto(methods="svd+kronecker"), torch.randn(24, 36, generator=torch.Generator().manual_seed(0))
    menu = list(auto.menu(24, 36))
    errors = auto.analyse(weight).squared_errors(menu)
    found = dict(best_within(fronts_of(auto, menu, errors), 300))
    kinds = {"svd": "low-rank", "kronecker": "kronecker"}
    for name, kind in kinds.items():
        own = [e for s, e in zip(menu, errors, strict=True) if s.kind == kind and s.num_params <= 300]
        assert found[name] == pytest.approx(min(own) ** 0.5)
    assert list(found.values()) == sorted(found.values())
    assert best_within(fronts_of(auto, menu, errors), 0) == ()
    assert fronts_of(SVD(), list(SVD().menu(24, 36)), [0.0] * 13) == {}


@pytest.mark.parametrize("limits", [{"ratio": 3}, {"ratio": 2, "max_macs": 4000}, {"ratio": 1.5, "speed": 1.05}])
def test_the_front_falls_and_goes_through_the_plan(limits):
    plan = compresskit.plan(model(), "svd", **limits, allow_slower=True)
    assert len(plan.front) >= 3
    errors = [point.error for point in plan.front]
    assert errors == sorted(errors, reverse=True)
    assert all(math.isfinite(point.error) and point.gap >= 0 for point in plan.front)
    nearest = min(plan.front, key=lambda point: abs(point.params - plan.params_after))
    squared = [p.expected_error**2 * p.site.num_params for p in plan.sites]
    ours = math.sqrt(sum(squared) / sum(site.num_params for site in find_sites(model()).sites))
    assert nearest.error == pytest.approx(ours, rel=0.1)
    assert plan.to_json()["front"][0]["params"] == plan.front[0].params


def test_sensitive_sites_get_more():
    net = model()
    survey = find_sites(net)
    assignment = assign(net, survey, [Rule("*", SVD())])
    params = {}
    for weights in (None, {site.name: 100.0 if site.name == "2" else 1.0 for site in survey.sites}):
        made = make_plan(
            net, assignment, num_params=survey.num_params, max_params=survey.num_params // 4, sensitivities=weights,
            allow_slower=True,
        )  # fmt: skip
        params[weights is None] = {p.site.name: p.params for p in made.plan.sites}
    assert params[False]["2"] > 1.5 * params[True]["2"]
    assert all(params[False][name] <= params[True][name] for name in params[False] if name != "2")
