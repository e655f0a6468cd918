"""From rules and a budget to a plan: what is reached, what is refused, and what the numbers mean."""

import re

import pytest
import torch
from torch import nn

import compresskit
from compresskit import SVD, Gemm, Kronecker
from compresskit.errors import BudgetError, WeightError
from compresskit.machines import machine
from compresskit.surgery import limits
from compresskit.surgery.sites import find_sites
from tests.models import HIDDEN, Plain, build

METHODS = tuple(compresskit.methods())


def reachable_ratio(model, method, **more):
    """The highest ratio that the error message names."""
    with pytest.raises(BudgetError) as caught:
        compresskit.plan(model, method, ratio=1e6, **more)
    return float(re.search(r"the highest ratio that these rules reach is ([\d.e+]+) ", str(caught.value))[1])


def weighted_loss(planned):
    """What the budget minimises: squared relative error times parameters."""
    return sum(p.expected_error**2 * p.site.num_params for p in planned.sites)


class TestBudget:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("uniform", [False, True])
    @pytest.mark.parametrize("family", ["bert-mlm", "gpt2", "whisper"])
    def test_the_highest_ratio_that_an_error_names_is_reached(self, family, method, uniform):
        model = build(family)
        ratio = reachable_ratio(model, method, uniform=uniform)
        planned = compresskit.plan(model, method, ratio=ratio, uniform=uniform)
        assert ratio <= planned.ratio <= 1.001 * ratio
        with pytest.raises(BudgetError, match="the highest ratio"):
            compresskit.plan(model, method, ratio=1.001 * ratio, uniform=uniform)

    def test_thinned_menus_keep_their_smallest_structure(self, monkeypatch):
        monkeypatch.setattr(limits, "MAX_CHOICES", 0)  # the fewest that are left to a site: 32
        model = nn.Sequential(nn.Linear(720, 720), nn.Linear(96, 720), nn.Linear(720, 96))
        ratio = reachable_ratio(model, "kronecker")
        assert compresskit.plan(model, "kronecker", ratio=ratio).ratio >= ratio

    def test_an_unreachable_ratio_says_what_holds_it(self):
        with pytest.raises(BudgetError) as caught:
            compresskit.plan(build("mixtral"), "svd", ratio=4)
        message = str(caught.value)
        assert message.startswith("ratio 4 leaves 34,140 of 136,560 parameters")
        assert "111,216 of them in what no rule touches" in message
        assert "model.layers.0.mlp.experts.gate_up_proj 36,864 (a parameter of its own" in message

    def test_what_was_excluded_is_named_as_held(self):
        with pytest.raises(BudgetError, match=r"word_embeddings 5,760 \(excluded by 'embeddings\.\*'\)"):
            compresskit.plan(build("bert"), "svd", ratio=15, exclude="embeddings.*")

    def test_a_method_without_a_structure_for_a_shape_is_named(self):
        model = nn.Sequential(nn.Linear(17, 19), nn.Linear(32, 32))
        with pytest.raises(BudgetError, match=r"0 323 \(the method has no structure for it\)"):
            compresskit.plan(model, "kronecker", ratio=5, rules={"0": Kronecker(left=(2, 2))})

    @pytest.mark.parametrize("budget", [{"ratio": 1e30}, {"keep": 1e-30}, {"params": 1}])
    def test_absurd_budgets_are_unreachable_not_a_crash(self, budget):
        with pytest.raises(BudgetError, match=r"the highest ratio that these rules reach is 15\.83"):
            compresskit.plan(build("bert"), "svd", **budget)

    def test_ratio_one_has_nothing_to_do(self):
        with pytest.raises(BudgetError, match="every site would stay dense: the budget is too generous"):
            compresskit.plan(build("bert"), "svd", ratio=1)

    def test_a_small_ratio_keeps_layers_dense_and_says_so(self):
        planned = compresskit.plan(build("bert"), "svd", ratio=1.05)
        kept = [r.name for r in planned.left if r.reason == "the budget keeps it dense"]
        assert kept
        assert len(kept) + len(planned.sites) == len(find_sites(build("bert")).sites)
        assert 1.05 <= planned.ratio <= 1.02 * 1.05

    def test_a_site_that_can_hardly_shrink_does_not_stall_the_rest(self):
        model = nn.Sequential(nn.Linear(64, 64), *(nn.Linear(256, 256) for _ in range(4)))
        rules = {"0": SVD(rank=30)}  # 1.07 times smaller, where the rest must become about 50 times smaller
        ratio = reachable_ratio(model, "svd", rules=rules)
        planned = compresskit.plan(model, "svd", ratio=ratio, rules=rules)
        assert planned.ratio >= ratio
        assert planned.sites[0].structure.rank == 30

    def test_parameters_and_shares_mean_the_same_as_ratios(self):
        model = build("bert")
        by_ratio = compresskit.plan(model, "svd", ratio=4)
        assert compresskit.plan(model, "svd", keep=0.25) == by_ratio
        assert compresskit.plan(model, "svd", params=by_ratio.num_params // 4) == by_ratio

    @pytest.mark.parametrize("method", METHODS)
    def test_multiply_adds_are_limited(self, method):
        model = build("bert")
        free = compresskit.plan(model, method, ratio=2)
        limit = int(0.9 * sum(s.num_params * s.multiplied for s in find_sites(model).sites) / 2)
        limited = compresskit.plan(model, method, ratio=2, max_macs=min(limit, int(0.9 * free.macs)))
        assert limited.macs <= 0.9 * free.macs
        assert limited.ratio >= 2
        assert weighted_loss(limited) >= weighted_loss(free) * (1 - free.gap)

    @pytest.mark.parametrize("max_macs", [-1, 0, 5])
    def test_multiply_adds_that_cannot_be_kept(self, max_macs):
        with pytest.raises(BudgetError, match=f"{max_macs} multiply-adds per token cannot be kept"):
            compresskit.plan(build("bert"), "svd", ratio=2, max_macs=max_macs)

    def test_multiply_adds_of_fixed_structures_are_limited_too(self):
        model = build("bert")
        macs = compresskit.plan(model, SVD(rank=4), include="encoder.*").macs
        assert compresskit.plan(model, SVD(rank=4), include="encoder.*", max_macs=macs).macs == macs
        with pytest.raises(BudgetError, match=f"these options take {macs:,} multiply-adds.*more than {macs - 1:,}"):
            compresskit.plan(model, SVD(rank=4), include="encoder.*", max_macs=macs - 1)


def wide_model():
    """Layers so large that their time is that of their products."""
    return nn.Sequential(nn.Linear(512, 1024), nn.Linear(1024, 512), nn.Linear(512, 512))


def highest_speed(model, method, **more):
    """The highest speed-up that the error message names."""
    with pytest.raises(BudgetError) as caught:
        compresskit.plan(model, method, speed=1e6, **more)
    found = re.search(
        r"^speed 1e\+06 .* the highest expected speed-up that these rules reach is ([\d.e+]+)$", str(caught.value)
    )
    return float(found[1])


class TestSpeed:
    @pytest.mark.parametrize("method", ["kronecker", "svd"])
    def test_a_bound_is_kept_at_a_price(self, method):
        model = wide_model()
        free = compresskit.plan(model, method, ratio=3)
        fast = compresskit.plan(model, method, ratio=3, speed=1.2 * free.speedup)
        assert fast.speedup >= 1.2 * free.speedup
        assert fast.ratio >= 3
        assert weighted_loss(fast) > weighted_loss(free) * (1 - free.gap)

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("uniform", [False, True])
    def test_the_highest_speed_that_an_error_names_is_reached(self, method, uniform):
        model = wide_model()
        highest = highest_speed(model, method, ratio=4, uniform=uniform)
        planned = compresskit.plan(model, method, ratio=4, speed=highest, uniform=uniform)
        assert planned.speedup >= highest
        assert planned.ratio >= 4
        with pytest.raises(BudgetError, match="highest expected speed-up"):
            compresskit.plan(model, method, ratio=4, speed=1.01 * highest, uniform=uniform)

    def test_the_speed_can_be_the_only_bound(self):
        planned = compresskit.plan(wide_model(), "svd", speed=4)
        assert 4 <= planned.speedup < 4.2
        assert 3 < planned.ratio < 6
        assert compresskit.plan(wide_model(), "svd", max_macs=planned.macs).macs <= planned.macs

    def test_both_bounds_at_once(self):
        model = wide_model()
        free = compresskit.plan(model, "kronecker", ratio=3)
        macs, speed = int(0.9 * free.macs), 1.1 * free.speedup
        planned = compresskit.plan(model, "kronecker", ratio=3, max_macs=macs, speed=speed)
        assert planned.macs <= macs
        assert planned.speedup >= speed

    def test_layers_that_stay_dense_count(self):
        """Only the first layer is worth keeping, but the bound is on all of them."""
        model = wide_model()
        with torch.no_grad():
            model[1].weight.copy_(torch.outer(torch.ones(512), torch.ones(1024)))
        planned = compresskit.plan(model, "svd", ratio=1.5, speed=2)
        dense = sum(site.num_params for site in find_sites(model).sites)
        replaced = sum(p.site.num_params for p in planned.sites)
        assert planned.speedup >= 2
        assert planned.speedup >= 1 / (1 - 0.5 * dense / replaced) or replaced == dense

    def test_fixed_options_must_keep_the_bound_too(self):
        model = wide_model()
        planned = compresskit.plan(model, SVD(rank=16))
        assert compresskit.plan(model, SVD(rank=16), speed=planned.speedup * 0.999).sites == planned.sites
        with pytest.raises(BudgetError, match=r"speed 1000 cannot be reached .* reach is \d+\.\d+"):
            compresskit.plan(model, SVD(rank=16), speed=1000)

    @pytest.mark.parametrize("speed", [0.5, 0, -1, float("nan"), float("inf")])
    def test_speeds_that_make_no_sense(self, speed):
        with pytest.raises(BudgetError, match=f"at least 1; got {speed:g}"):
            compresskit.plan(wide_model(), "svd", ratio=2, speed=speed)

    def test_nothing_slower_than_dense_is_chosen_though_it_has_fewer_multiply_adds(self):
        """A small factor on the right is transposed twice: with 2 x 1 that takes longer than it saves."""
        slow = Kronecker(right=(2, 1))
        model = nn.Sequential(nn.Linear(64, 4096), nn.Linear(64, 4096))
        structure = next(iter(slow.menu(4096, 64)))
        assert structure.macs < 64 * 4096
        with pytest.raises(
            BudgetError, match=r"every site would stay dense: for '0' and others, every structure .*allow_slower"
        ):
            compresskit.plan(model, slow)
        allowed = compresskit.plan(model, slow, allow_slower=True)
        assert [p.slower for p in allowed.sites] == [True, True]
        assert allowed.speedup < 1

    def test_what_stays_dense_for_its_speed_says_so(self):
        model = nn.Sequential(nn.Linear(64, 4096), nn.Linear(4096, 64))
        planned = compresskit.plan(model, "svd", ratio=1.5, rules={"0": Kronecker(right=(2, 1))})
        assert "expected to run slower than dense" in planned.left[0].reason
        assert not any(p.slower for p in planned.sites)

    def test_tiny_layers_are_not_refused_for_the_overhead_of_calls(self):
        planned = compresskit.plan(build("bert"), "kronecker", ratio=4)
        assert planned.speedup < 1
        assert not any(p.slower for p in planned.sites)

    def test_expected_times_are_those_of_the_committed_machine(self):
        planned = compresskit.plan(nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)), SVD(rank=8)).sites[0]
        times = [
            round(1e9 * machine("cpu").dense.time_s(steps))
            for steps in ([Gemm(128, 512, 512)], planned.structure.operations(128))
        ]
        assert [planned.dense_time_ns, planned.time_ns] == times
        assert planned.speedup == times[0] / times[1] > 1


class TestPricing:
    @pytest.mark.parametrize("method", METHODS)
    def test_numbers_of_a_plan_are_those_of_the_compressed_model(self, method):
        model = build("t5")
        planned = compresskit.plan(model, method, ratio=3)
        assert planned.gap <= 0.05
        report = compresskit.apply(model, planned)
        assert (report.params_after, report.ratio) == (planned.params_after, planned.ratio)
        assert sum(s.macs_after for s in report.sites) == planned.macs
        assert sum(s.macs_before for s in report.sites) == planned.dense_macs
        assert report.expected_speedup == planned.speedup
        for site in report.sites:
            assert site.relative_error <= site.expected_error * (1 + 1e-4) + 1e-6

    def test_planning_changes_nothing(self):
        model = build("gpt2")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        compresskit.plan(model, "kronecker", ratio=3)
        torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
        assert not any(isinstance(module, compresskit.FactorizedLinear) for module in model.modules())

    def test_the_budget_goes_where_it_saves_error(self):
        """Of two layers of one shape, the one of rank 1 gets next to nothing and the noise what is left."""
        model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(torch.outer(torch.arange(64.0), torch.ones(64)))
        planned = compresskit.plan(model, "svd", ratio=2)
        low, noise = planned.sites
        assert low.expected_error < 1e-3
        assert low.structure.rank <= 4
        assert noise.structure.rank >= 27

    @pytest.mark.parametrize("method", METHODS)
    def test_uniform_gives_one_structure_to_each_shape(self, method):
        model = build("whisper")
        planned = compresskit.plan(model, method, ratio=3, uniform=True)
        structures: dict[tuple, set] = {}
        for p in planned.sites:
            structures.setdefault((p.site.kinds, p.site.rows, p.site.cols), set()).add(p.structure)
        dense = {(s.kinds, s.rows, s.cols) for s in find_sites(model).sites if s.name in {r.name for r in planned.left}}
        assert all(len(found) == 1 for found in structures.values())
        assert not dense & set(structures)
        assert 3 <= planned.ratio <= 3.15  # eight shapes, so few totals
        free = compresskit.plan(model, method, ratio=3)
        assert weighted_loss(free) * (1 - free.gap) <= weighted_loss(planned)

    def test_rules_mix_methods_options_and_layers(self):
        rules = {"*.query": Kronecker(terms=2), "*.key": "kronecker", "*.intermediate.*": "tensor-train"}
        planned = compresskit.plan(build("bert"), "svd", ratio=8, rules=rules)
        kinds = {p.site.name.split(".", 3)[-1]: (p.decomposition, p.structure.kind) for p in planned.sites}
        assert kinds["attention.self.query"] == (Kronecker(terms=2), "kronecker")
        assert kinds["attention.self.key"] == (Kronecker(), "kronecker")
        assert kinds["intermediate.dense"][1] == "tensor-train"
        assert kinds["output.dense"] == (SVD(), "low-rank")
        assert 8 <= planned.ratio <= 8 * 1.02

    def test_slower_structures_only_when_allowed(self):
        model = nn.Sequential(nn.Linear(96, 96), nn.Linear(96, 96))
        method = Kronecker(terms=16)
        fast = compresskit.plan(model, method, ratio=1.6)
        assert all(p.macs <= p.dense_macs for p in fast.sites)
        slow = compresskit.plan(model, method, ratio=1.6, allow_slower=True)
        assert any(p.macs > p.dense_macs for p in slow.sites)
        assert weighted_loss(slow) < weighted_loss(fast)

    def test_embeddings_are_looked_up_not_multiplied(self):
        words = compresskit.plan(build("bert"), "kronecker", ratio=8).sites[0]
        assert words.site.name == "embeddings.word_embeddings"
        assert words.structure.small[0] == 1
        assert (words.macs, words.dense_macs) == (words.structure.lookup_macs, 0)

    def test_tied_weights_are_counted_once_and_multiplied_once(self):
        planned = compresskit.plan(build("plain"), "svd", ratio=3)
        tied = planned.sites[0]
        assert tied.site.names == ("embed", "head")
        assert tied.params == tied.structure.num_params + HIDDEN  # its padding row
        assert tied.macs == tied.structure.macs + tied.structure.lookup_macs

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_weights_that_are_not_finite_are_named(self, bad):
        model = build("gpt2")
        with torch.no_grad():
            model.transformer.h[1].mlp.c_fc.weight[3, 5] = bad
        with pytest.raises(WeightError, match=r"the weight of 'transformer\.h\.1\.mlp\.c_fc' holds"):
            compresskit.plan(model, "svd", ratio=2)


class TestFixedOptions:
    def test_one_structure_per_layer_needs_no_budget(self):
        planned = compresskit.plan(build("bert"), SVD(rank=8))
        assert {p.structure.rank for p in planned.sites} == {8}
        assert len(planned.sites) == len(find_sites(build("bert")).sites)
        assert planned.gap == 0

    def test_a_choice_needs_a_budget(self):
        with pytest.raises(BudgetError, match=r"svd has \d+ structures for 'embed', nothing to choose by: give ratio"):
            compresskit.plan(Plain(), "svd")

    def test_layers_that_the_options_do_not_fit_stay_dense(self):
        planned = compresskit.plan(build("bert"), SVD(rank=30))
        small = [r.name for r in planned.left if r.reason == "the method has no structure for it"]
        assert "encoder.layer.0.attention.self.query" in small  # rank 30 of 48 x 48 is more than the weight
        assert "encoder.layer.0.intermediate.dense" in [p.site.name for p in planned.sites]

    def test_options_that_fit_nothing(self):
        with pytest.raises(BudgetError, match="every site would stay dense"):
            compresskit.plan(build("bert"), SVD(rank=1000))

    def test_a_budget_beside_fixed_options_must_be_reachable(self):
        ratio = reachable_ratio(build("bert"), SVD(rank=8))
        assert compresskit.plan(build("bert"), SVD(rank=8), ratio=ratio).ratio == pytest.approx(ratio, rel=1e-3)
