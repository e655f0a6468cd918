"""Rivals: plans that take one method alone, where a method chooses between several, and come close to what it loses."""

import dataclasses

import pytest
import torch
from torch import nn

from compresskit.decompositions.auto import Auto
from compresskit.decompositions.blast import Blast
from compresskit.decompositions.kronecker import Kronecker
from compresskit.decompositions.svd import SVD
from compresskit.errors import BudgetError
from compresskit.surgery import pricing
from compresskit.surgery.pricing import make_plan
from compresskit.surgery.rivals import CLOSE, rivals_of
from compresskit.surgery.rules import Rule, assign
from compresskit.surgery.sites import find_sites

BOTH = Auto(methods="svd+monarch")


def net():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(48, 48) for _ in range(3)))


def planned(model, assignment, known=None, ratio=2.0, **options):
    survey = find_sites(model)
    return make_plan(
        model,
        assignment,
        num_params=survey.num_params,
        max_params=int(survey.num_params / ratio),
        allow_slower=True,
        known=known,
        **options,
    )


def weights(model):
    return {site.name: float(site.num_params) for site in find_sites(model).sites}


def told(made, *errors):
    """The plan, its sites expecting these errors."""
    sites = tuple(dataclasses.replace(s, expected_error=e) for s, e in zip(made.plan.sites, errors, strict=True))
    return dataclasses.replace(made, plan=dataclasses.replace(made.plan, sites=sites))


def test_close_ones_are_rivals_the_closest_first():
    model = net()
    assignment = assign(model, find_sites(model), [Rule("*", BOTH)])
    made = planned(model, assignment, ratio=3)
    assert len(made.plan.sites) == 3
    near, far = 0.5 * CLOSE**0.5 * 0.99, 0.5 * CLOSE**0.5 * 1.01
    own = told(made, 0.5, 0.5, 0.5)

    def found(counts, **plans):
        def plan_of(other):
            ((name,),) = {method.alone() or (method.methods,) for _, method in other.chosen}
            if name not in plans:
                raise BudgetError("not that small")
            return plans[name]

        rivals = rivals_of(own, assignment, counts, plan_of)
        assert all(rivals[name] is plans[name] for name in rivals)
        return list(rivals)

    alike, heavy = weights(model), {**weights(model), "0": 1e9}
    close, exact, out = (told(made, error, error, error) for error in (near, 0.5, far))
    assert found(alike, svd=close, monarch=exact) == ["monarch", "svd"]
    assert found(alike, svd=exact, monarch=close) == ["svd", "monarch"]
    assert found(alike, svd=out, monarch=exact) == ["monarch"]
    assert found(alike, svd=exact) == ["svd"]
    assert found(alike) == []
    assert found(heavy, svd=told(made, 0.5, 0.9, 0.9), monarch=told(made, 0.9, 0.1, 0.1)) == ["svd"]


def test_other_rules_stay_and_one_method_has_no_rivals():
    model = net()
    survey = find_sites(model)
    mixed = assign(model, survey, [Rule("0", Kronecker()), Rule("*", BOTH)])
    made, asked = planned(model, mixed, ratio=3), []

    def plan_of(other):
        asked.append([method for _, method in other.chosen])
        return made

    assert list(rivals_of(made, mixed, weights(model), plan_of)) == ["svd", "monarch"]
    assert asked == [[Kronecker(), *[Auto(methods=name)] * 2] for name in ("svd", "monarch")]
    for method in (SVD(), Auto(methods="svd")):
        alone = assign(model, survey, [Rule("*", method)])
        assert rivals_of(planned(model, alone), alone, weights(model), pytest.fail) == {}


def test_a_rival_is_the_plan_of_its_method_and_prices_nothing_anew(monkeypatch):
    model, known = net(), {}
    survey = find_sites(model)
    assignment = assign(model, survey, [Rule("*", BOTH)])
    first = planned(model, assignment, known)
    kinds = {site.structure.kind for site in first.plan.sites}
    monkeypatch.setattr(pricing, "_price", pytest.fail)
    for name, kind in (("svd", "low-rank"), ("monarch", "monarch")):
        alone = dataclasses.replace(assignment, chosen=tuple((s, Auto(methods=name)) for s, _ in assignment.chosen))
        rival = planned(model, alone, known).plan
        assert {site.structure.kind for site in rival.sites} == {kind}
        assert all({*dict(site.alternatives)} == {"svd", "monarch"} for site in rival.sites)
        kinds.add(kind)
    again = planned(model, assignment, known)
    assert again.plan == first.plan
    monkeypatch.undo()
    alone = assign(model, survey, [Rule("*", SVD())])
    ours = dataclasses.replace(assignment, chosen=tuple((s, Auto(methods="svd")) for s, _ in assignment.chosen))
    assert [s.structure for s in planned(model, ours, known).plan.sites] == [
        s.structure for s in planned(model, alone).plan.sites
    ]


def test_dear_prices_are_asked_near_the_size_alone(monkeypatch):
    """What a plan of all methods has priced of a dear one does for the plan of that one alone."""
    model, known = net(), {}
    assignment = assign(model, find_sites(model), [Rule("*", Auto(methods="svd+blast"))])
    planned(model, assignment, known)
    before = {name: len(k.prices) for name, k in known.items()}
    alone = dataclasses.replace(assignment, chosen=tuple((s, Auto(methods="blast")) for s, _ in assignment.chosen))
    rival = planned(model, alone, known).plan
    assert {site.structure.kind for site in rival.sites} == {"blast"}
    menu = len(list(Blast().menu(48, 48)))
    for name, k in known.items():
        priced = sum(s.kind == "blast" for s in k.prices)
        assert priced < menu
        assert len(k.prices) - before[name] < menu / 2


def test_a_rival_that_cannot_keep_the_budget_says_so():
    model, known = net(), {}
    assignment = assign(model, find_sites(model), [Rule("*", Auto(methods="svd+kronecker"))])
    planned(model, assignment, known, ratio=12)
    svd = dataclasses.replace(assignment, chosen=tuple((s, Auto(methods="svd")) for s, _ in assignment.chosen))
    with pytest.raises(BudgetError, match="the highest ratio that these rules reach"):
        planned(model, svd, known, ratio=40)
