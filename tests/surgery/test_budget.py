"""The budget: never above the limit, as good as brute force within the proven gap, plain about what is impossible."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from transformers import AutoModel

import compresskit
from compresskit.decompositions.auto import Auto
from compresskit.errors import BudgetError
from compresskit.surgery import budget, pricing
from compresskit.surgery.budget import Choice, param_budget, sketch, solve

SCALES = (1e-30, 1e-12, 1.0, 1e12, 1e30)
TOTAL = 109_482_240


def limited(groups, max_params, max_macs):
    """All combinations that keep both limits."""
    for combination in itertools.product(*groups):
        params, macs = sum(c.params for c in combination), sum(c.macs for c in combination)
        if params <= max_params and (max_macs is None or macs <= max_macs):
            yield sum(c.loss for c in combination)


def check(groups, max_params, max_macs, solution):
    """The loss of a solution, after its limits and the range of its gap were checked."""
    chosen = [group[pick] for group, pick in zip(groups, solution.picks, strict=True)]
    assert sum(c.params for c in chosen) <= max_params
    assert max_macs is None or sum(c.macs for c in chosen) <= max_macs
    assert 0 <= solution.gap <= 1
    return sum(c.loss for c in chosen)


def unrounded(groups, limit):
    """The limit that is left for certain when the dynamic program rounds each size up; the limit itself if small."""
    return limit if limit <= budget.STEPS else limit - math.ceil(len(groups) * limit / budget.STEPS)


@st.composite
def instances(draw, losses):
    """Groups of choices and a limit between the smallest and the largest total."""
    size = draw(st.sampled_from([3, 40, 10**6, 10**9]))
    numbers = st.integers(0, size)
    choices = st.builds(Choice, numbers, numbers, losses)
    groups = draw(st.lists(st.lists(choices, min_size=1, max_size=5), min_size=1, max_size=5))
    least = sum(min(c.params for c in group) for group in groups)
    most = sum(max(c.params for c in group) for group in groups)
    return groups, draw(st.integers(least, most))


def scaled(instance, scale):
    groups, limit = instance
    return [[Choice(c.params, c.macs, c.loss * scale) for c in group] for group in groups], limit


FRACTIONS = st.floats(0, 1, allow_subnormal=False)
FEW = st.integers(0, 3).map(float)


@settings(max_examples=300)
@given(st.one_of(instances(FRACTIONS), instances(FEW), instances(st.just(1.0))), st.sampled_from(SCALES))
def test_as_good_as_brute_force_and_the_gap_is_a_bound(instance, scale):
    groups, limit = scaled(instance, scale)
    solution = solve(groups, max_params=limit)
    loss, optimum = check(groups, limit, None, solution), min(limited(groups, limit, None))
    assert loss * (1 - solution.gap) <= optimum * (1 + 1e-9)
    assert loss <= min(limited(groups, unrounded(groups, limit), None), default=math.inf) * (1 + 1e-9)


@settings(max_examples=200)
@given(st.one_of(instances(FRACTIONS), instances(FEW)), st.floats(0, 1), st.sampled_from(SCALES))
def test_multiply_adds_are_kept_and_the_gap_is_still_a_bound(instance, share, scale):
    groups, limit = scaled(instance, scale)
    max_macs = int(share * sum(max(c.macs for c in group) for group in groups))
    optimum = min(limited(groups, limit, max_macs), default=None)
    if optimum is None:
        with pytest.raises(BudgetError, match="cannot be kept"):
            solve(groups, max_params=limit, max_macs=max_macs)
        return
    assume(list(limited(groups, unrounded(groups, limit), max_macs)))
    solution = solve(groups, max_params=limit, max_macs=max_macs)
    loss = check(groups, limit, max_macs, solution)
    assert loss * (1 - solution.gap) <= optimum * (1 + 1e-9)


def with_times(groups, seed):
    """The same choices with times that have little to do with their multiply-adds."""
    generator = np.random.default_rng(seed)
    return [
        [Choice(c.params, c.macs, c.loss, int(generator.integers(0, c.params + 2))) for c in group] for group in groups
    ]


@settings(max_examples=200)
@given(instances(FRACTIONS), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_three_limits_are_kept_and_the_gap_is_still_a_bound(instance, macs_share, time_share, seed):
    groups, limit = instance
    groups = with_times(groups, seed)
    max_macs, max_time_ns = (
        int(share * sum(max(getattr(c, what) for c in group) for group in groups))
        for share, what in ((macs_share, "macs"), (time_share, "time_ns"))
    )
    losses = [
        sum(c.loss for c in combination)
        for combination in itertools.product(*groups)
        if sum(c.params for c in combination) <= limit
        and sum(c.macs for c in combination) <= max_macs
        and sum(c.time_ns for c in combination) <= max_time_ns
    ]
    try:
        solution = solve(groups, max_params=limit, max_macs=max_macs, max_time_ns=max_time_ns)
    except BudgetError as error:
        assert not losses or "no plan was found" in str(error) or limit > budget.STEPS  # noqa: PT017
        return
    chosen = [group[pick] for group, pick in zip(groups, solution.picks, strict=True)]
    assert sum(c.time_ns for c in chosen) <= max_time_ns
    assert check(groups, limit, max_macs, solution) * (1 - solution.gap) <= min(losses) * (1 + 1e-9)


def random_groups(seed, count=12, width=15):
    """Menus like real ones: the more parameters, the less loss, not quite in step."""
    generator = np.random.default_rng(seed)
    groups = []
    for _ in range(count):
        size = int(generator.integers(10_000, 1_000_000))
        shares = generator.uniform(0.01, 1, width)
        noise = generator.uniform(0.7, 1.3, (2, width))
        groups.append(
            [
                Choice(int(s * size), int(a * s * size), float(b * (1 - s) ** 2 * size))
                for s, a, b in zip(shares, *noise, strict=True)
            ]
        )
    return groups


def between(groups, share):
    """A limit at this share of the way from the smallest total to the largest."""
    least, most = (sum(pick(c.params for c in group) for group in groups) for pick in (min, max))
    return int(least + share * (most - least))


def milp_optimum(groups, max_params, max_macs):
    flat = [choice for group in groups for choice in group]
    member = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    limits = [([c.params for c in flat], max_params)] + ([([c.macs for c in flat], max_macs)] if max_macs else [])
    constraints = [LinearConstraint(member == np.arange(len(groups))[:, None], 1, 1)]
    constraints += [LinearConstraint(np.array([sizes], dtype=float), -np.inf, limit) for sizes, limit in limits]
    result = milp(
        np.array([c.loss for c in flat]),
        constraints=constraints,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-9, "time_limit": 20},
    )
    assert result.success, result.message
    return result.fun


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_agrees_with_scipy_milp(seed, share):
    groups = random_groups(seed)
    limit = between(groups, share)
    solution = solve(groups, max_params=limit)
    loss, optimum = check(groups, limit, None, solution), milp_optimum(groups, limit, None)
    assert optimum * (1 - 1e-6) <= loss <= optimum * 1.001
    assert loss * (1 - solution.gap) <= optimum * (1 + 1e-6)
    assert solution.gap < 0.02


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_scipy_milp_under_both_limits(seed):
    groups = random_groups(seed)
    limit = between(groups, 0.3)
    free = solve(groups, max_params=limit)
    max_macs = int(0.8 * sum(group[pick].macs for group, pick in zip(groups, free.picks, strict=True)))
    solution = solve(groups, max_params=limit, max_macs=max_macs)
    loss, optimum = check(groups, limit, max_macs, solution), milp_optimum(groups, limit, max_macs)
    assert optimum * (1 - 1e-6) <= loss <= optimum * 1.03
    assert loss * (1 - solution.gap) <= optimum * (1 + 1e-6)


@pytest.fixture(scope="module")
def real_layers(minilm):
    """The first layer of a pretrained encoder, as a model."""
    model = AutoModel.from_pretrained(minilm, num_hidden_layers=1)
    return model.encoder


@pytest.mark.parametrize(("method", "ratio"), [("svd", 2), ("svd", 6), (Auto(methods="svd+kronecker+monarch"), 4)])
def test_agrees_with_scipy_milp_on_the_menus_of_a_pretrained_layer(real_layers, monkeypatch, method, ratio):
    asked = {}

    def spy(groups, *, max_params, **others):
        asked.update(groups=groups, max_params=max_params)
        return solve(groups, max_params=max_params, **others)

    monkeypatch.setattr(pricing, "solve", spy)
    plan = compresskit.plan(real_layers, method, ratio=ratio)
    solution = solve(asked["groups"], max_params=asked["max_params"])
    loss = check(asked["groups"], asked["max_params"], None, solution)
    optimum = milp_optimum(asked["groups"], asked["max_params"], None)
    assert plan.gap == solution.gap
    assert loss * (1 - solution.gap) <= optimum * (1 + 1e-6)
    assert optimum * (1 - 1e-6) <= loss <= optimum * (1 + 1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_a_sketch_keeps_the_limit_and_its_gap_is_a_bound(seed):
    groups = random_groups(seed)
    limit = between(groups, 0.3)
    solution, exact = sketch(groups, max_params=limit), solve(groups, max_params=limit)
    loss, best = check(groups, limit, None, solution), check(groups, limit, None, exact)
    assert best * (1 - 1e-9) <= loss
    assert loss * (1 - solution.gap) <= best * (1 + 1e-9)
    assert sketch(groups, max_params=between(groups, 0) - 1) is None


@pytest.mark.parametrize("seed", range(4))
def test_time_is_a_limit_like_multiply_adds(seed):
    groups = random_groups(seed)
    turned = [[Choice(c.params, 0, c.loss, c.macs) for c in group] for group in groups]
    limit = between(groups, 0.3)
    free = solve(groups, max_params=limit)
    most = int(0.8 * sum(group[pick].macs for group, pick in zip(groups, free.picks, strict=True)))
    assert solve(turned, max_params=limit, max_time_ns=most) == solve(groups, max_params=limit, max_macs=most)


@pytest.mark.parametrize("seed", range(3))
def test_both_further_limits_are_kept_closely(seed):
    groups = with_times(random_groups(seed), seed)
    limit = between(groups, 0.3)
    free = solve(groups, max_params=limit)
    chosen = [group[pick] for group, pick in zip(groups, free.picks, strict=True)]
    macs, time_ns = (int(0.9 * sum(getattr(c, what) for c in chosen)) for what in ("macs", "time_ns"))
    solution = solve(groups, max_params=limit, max_macs=macs, max_time_ns=time_ns)
    loss = check(groups, limit, macs, solution)
    assert sum(group[pick].time_ns for group, pick in zip(groups, solution.picks, strict=True)) <= time_ns
    assert solution.gap < 0.25
    assert loss >= check(groups, limit, None, free) * (1 - free.gap)


def test_too_little_time_is_an_error_with_the_least_that_can_be_kept():
    groups = [[Choice(4, 0, 1.0, 5), Choice(1, 0, 2.0, 50)]] * 2
    with pytest.raises(budget.TimeLimitError, match="9 ns cannot be kept; these rules reach 10 ns") as caught:
        solve(groups, max_params=8, max_time_ns=9)
    assert caught.value.least_time_ns == budget.least_time_ns(groups, 8) == 10
    assert budget.least_time_ns(groups, 5) == 55
    assert solve(groups, max_params=8, max_time_ns=10).picks == (0, 0)


def test_many_equal_groups_are_solved_closely():
    group = [Choice(1 + rank * 1536, rank * 1536, 589_824 / (1 + rank)) for rank in range(80)]
    solution = solve([group] * 73, max_params=73 * 20_000)
    loss = check([group] * 73, 73 * 20_000, None, solution)
    assert solution.gap < 1e-3
    assert loss < 73 * group[12].loss  # rank 12 everywhere fits


def test_a_single_group_takes_the_best_that_fits():
    group = [Choice(9, 0, 0.0), Choice(5, 0, 1.0), Choice(4, 0, 1.5), Choice(1, 0, 8.0)]
    assert [solve([group], max_params=limit).picks for limit in (10, 9, 8, 5, 4, 3, 1)] == [
        (0,), (0,), (1,), (1,), (2,), (3,), (3,)
    ]  # fmt: skip


def test_a_generous_limit_loses_nothing():
    groups = [[Choice(100, 100, 0.0), Choice(10, 10, 1.0)]] * 3
    assert solve(groups, max_params=300) == budget.Solution((0, 0, 0), 0.0)


def test_the_tightest_limit_takes_the_smallest_of_each():
    groups = [[Choice(1_000_003, 1, 0.0), Choice(500_001, 1, 1.0)], [Choice(700_001, 1, 2.0), Choice(333_331, 1, 3.0)]]
    assert solve(groups, max_params=833_332).picks == (1, 1)


@pytest.mark.parametrize("loss", [0.0, 1.0, 1e-300, 1e300])
def test_equal_losses_fit_and_have_no_worse_alternative(loss):
    groups = [[Choice(9, 0, loss), Choice(2, 0, loss), Choice(5, 0, loss)]] * 4
    solution = solve(groups, max_params=8)
    assert solution.picks == (1, 1, 1, 1)
    assert solution.gap == pytest.approx(0, abs=1e-9)


def test_a_limit_of_nothing_takes_choices_that_cost_nothing():
    assert solve([[Choice(0, 0, 3.0), Choice(1, 0, 0.0)]] * 2, max_params=0).picks == (0, 0)
    assert solve([[Choice(0, 0, 3.0), Choice(0, 1, 0.0)]] * 2, max_params=0, max_macs=0).picks == (0, 0)


def test_more_choices_than_a_byte_counts():
    generator = np.random.default_rng(0)
    group = [Choice(3 * i, 0, 3000.0 - 3 * i + float(generator.uniform(0, 0.5))) for i in range(1000)]
    solution = solve([group] * 3, max_params=6001)
    loss = check([group] * 3, 6001, None, solution)
    best = np.full(2001, math.inf)  # least loss of one and then of more groups, by thirds of the parameters
    best[:1000] = [choice.loss for choice in group]
    one = best.copy()
    for _ in range(2):
        best = np.array([(best[: used + 1] + one[used::-1]).min() for used in range(2001)])
    assert loss == pytest.approx(best.min(), rel=1e-12)


def test_too_few_parameters_is_an_error_with_the_numbers():
    with pytest.raises(BudgetError, match=r"smallest structures take 1,200 parameters together, 1,199 are left"):
        solve([[Choice(600, 1, 0.0), Choice(700, 1, 0.0)]] * 2, max_params=1199)


@pytest.mark.parametrize("max_macs", [0, 9])
def test_too_few_multiply_adds_is_an_error_with_the_numbers(max_macs):
    groups = [[Choice(4, 5, 1.0), Choice(1, 50, 2.0)]] * 2
    expected = f"{max_macs} multiply-adds per token cannot be kept with 8 parameters; these rules reach 10"
    with pytest.raises(BudgetError, match=expected):
        solve(groups, max_params=8, max_macs=max_macs)
    assert solve(groups, max_params=8, max_macs=10).picks == (0, 0)


@given(st.integers(1, 10**12), st.floats(1, 1e9))
@example(11, 1.1)
@example(TOTAL, 19.0)
def test_the_ratio_is_never_missed_and_no_parameter_is_wasted(total, ratio):
    left = param_budget(total, ratio=ratio)
    assert left * ratio <= total * (1 + 1e-12)
    assert (left + 1) * ratio > total * (1 - 1e-12)
    assume(left > 0)
    assert total / left >= ratio * (1 - 1e-15)


@given(st.integers(1, 10**12), st.floats(0, 1, exclude_min=True))
def test_keep_is_a_share(total, keep):
    left = param_budget(total, keep=keep)
    assert left <= total * keep < left + 1


def test_params_are_taken_as_they_are():
    assert param_budget(TOTAL, params=5_700_000) == 5_700_000
    assert param_budget(TOTAL, params=TOTAL) == param_budget(TOTAL, ratio=1) == param_budget(TOTAL, keep=1) == TOTAL
    assert param_budget(TOTAL, ratio=21) == 5_213_440


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({}, "give exactly one of ratio, params and keep; got none"),
        ({"ratio": 2, "keep": 0.5}, "give exactly one of ratio, params and keep; got ratio, keep"),
        ({"ratio": 2, "params": 5, "keep": 0.5}, "got ratio, params, keep"),
        ({"ratio": 0.99}, "ratio is original / compressed parameters, a number of at least 1; got 0.99"),
        ({"ratio": -3}, "at least 1; got -3"),
        ({"ratio": 0}, "at least 1; got 0"),
        ({"ratio": math.nan}, "at least 1; got nan"),
        ({"ratio": math.inf}, "at least 1; got inf"),
        ({"keep": 0}, "above 0 and at most 1; got 0"),
        ({"keep": 1.01}, "above 0 and at most 1; got 1.01"),
        ({"keep": math.nan}, "above 0 and at most 1; got nan"),
        ({"params": 0}, "params is 1 to 109,482,240, the model's own number; got 0"),
        ({"params": -5}, "params is 1 to 109,482,240, the model's own number; got -5"),
        ({"params": TOTAL + 1}, "params is 1 to 109,482,240, the model's own number; got 109,482,241"),
    ],
)
def test_senseless_budgets(given_, message):
    with pytest.raises(BudgetError, match=message):
        param_budget(TOTAL, **given_)
