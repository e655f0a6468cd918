"""Plans: what pricing and the budget make of rules, and plans as JSON that can be edited and replayed."""

import copy
import json
import re

import pytest
import torch
import transformers
from torch import nn

import compresskit
from compresskit import SVD, Kronecker
from compresskit.errors import BudgetError, OptionError, PlanError, UnknownNameError, WeightError
from compresskit.surgery import pricing
from compresskit.surgery.sites import find_sites
from tests.models import HIDDEN, Plain, build

METHODS = tuple(compresskit.methods())


def reachable_ratio(model, method, **more):
    """The highest ratio that the error message names."""
    with pytest.raises(BudgetError) as caught:
        compresskit.plan(model, method, ratio=1e6, **more)
    return float(re.search(r"the highest ratio that these rules reach is ([\d.e+]+) ", str(caught.value))[1])


def low_rank(**more):
    """JSON of a structure for a weight of 96 x 48."""
    return {"kind": "low-rank", "rows": 96, "cols": 48, "rank": 3, **more}


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
        monkeypatch.setattr(pricing, "MAX_CHOICES", 0)  # the fewest that are left to a site: 32
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
        with pytest.raises(BudgetError, match=r"0 323 \(the method has no structure for its shape\)"):
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


@pytest.fixture(scope="module")
def bert_base():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.BertModel(transformers.BertConfig())


PADDING = 768
"""The exact padding row that stays beside the factors; the papers approximate it like any other."""


class TestKroneckerBert:
    """The shapes of Tahaei et al. (NAACL 2022), whose parameter counts are known, from rules alone."""

    ATTENTION = ("*.self.*", "*.attention.output.*")

    def shapes(self, words, attention, up, down):
        def sides(left, right):
            return Kronecker(small="right", left=left, right=right)

        return {
            "*.word_embeddings": sides(*words),
            **{pattern: sides(*attention) for pattern in self.ATTENTION},
            "*.intermediate.*": sides(*up),
            "*.layer.*.output.dense": sides(*down),
        }

    def planned(self, bert_base, *shapes, **more):
        return compresskit.plan(bert_base, rules={**self.shapes(*shapes), **more})

    K21 = (
        ((30522, 48), (1, 16)),
        ((384, 48), (2, 16)),
        ((16, 2), (192, 384)),
        ((2, 16), (384, 192)),
    )
    K8 = (
        ((30522, 96), (1, 8)),
        ((384, 384), (2, 2)),
        ((8, 2), (384, 384)),
        ((2, 8), (384, 384)),
    )

    def test_k21(self, bert_base):
        planned = self.planned(bert_base, *self.K21)
        assert planned.num_params == 109_482_240
        assert planned.params_after == 5_228_272 + PADDING
        assert planned.ratio == pytest.approx(20.94, abs=0.005)
        assert len(planned.sites) == 1 + 12 * 6
        assert {r.name: r.reason for r in planned.left if r.num_params > 5000} == {
            "embeddings.position_embeddings": "no pattern includes it",
            "pooler.dense": "no pattern includes it",
        }

    def test_k8_with_either_pooler(self, bert_base):
        assert self.planned(bert_base, *self.K8).params_after == 14_654_216 + PADDING
        pooler = Kronecker(small="right", left=(384, 384), right=(2, 2))
        planned = self.planned(bert_base, *self.K8, **{"pooler.*": pooler})
        assert planned.params_after == 14_211_852 + PADDING
        assert planned.ratio == pytest.approx(7.70, abs=0.005)

    def test_a_plan_of_the_paper_survives_json(self, bert_base):
        planned = self.planned(bert_base, *self.K21)
        again = compresskit.plan_from_json(json.loads(json.dumps(planned.to_json())), bert_base)
        assert again.sites == planned.sites
        assert again.params_after == planned.params_after


@pytest.fixture(scope="module")
def model():
    return build("bert-mlm")


@pytest.fixture(scope="module")
def data(model):
    """A plan of that model, as it comes out of a file."""
    rules = {"*.query": Kronecker(terms=2, small="both"), "*.key": "tensor-train", "*.value": "tucker"}
    return json.loads(json.dumps(compresskit.plan(model, "svd", ratio=6, rules=rules).to_json()))


class TestJson:
    @pytest.fixture
    def edited(self, data):
        return copy.deepcopy(data)

    @staticmethod
    def site(data, name):
        return next(site for site in data["sites"] if site["name"].endswith(name))

    @pytest.mark.parametrize("method", METHODS)
    def test_round_trip(self, model, method):
        planned = compresskit.plan(model, method, ratio=4)
        again = compresskit.plan_from_json(json.loads(json.dumps(planned.to_json())), model)
        assert again.sites == planned.sites
        assert (again.params_after, again.ratio, again.macs) == (planned.params_after, planned.ratio, planned.macs)
        assert again.gap is None
        assert again.coverage == planned.coverage
        assert {r.name for r in again.left} == {r.name for r in planned.left}

    def test_round_trip_of_several_methods_with_options(self, model, data):
        again = compresskit.plan_from_json(data, model)
        assert json.loads(json.dumps(again.to_json()))["sites"] == data["sites"]
        assert again.params_after == data["params_after"]

    def test_the_numbers_are_for_the_reader_only(self, model, edited):
        expected = compresskit.plan_from_json(edited, model)
        edited |= {"num_params": 7, "params_after": 8, "ratio": 9, "left_dense": None}
        for site in edited["sites"]:
            site |= {"params": 1, "dense_params": 2, "macs": 3, "dense_macs": 4}
        assert compresskit.plan_from_json(edited, model) == expected

    def test_an_edited_structure_is_what_the_model_gets(self, edited):
        model = build("bert-mlm")
        site = self.site(edited, "1.intermediate.dense")
        site |= {"method": "svd", "options": {}, "structure": low_rank(rank=5)}
        edited["sites"] = [entry for entry in edited["sites"] if not entry["name"].endswith("word_embeddings")]
        planned = compresskit.plan_from_json(edited, model)
        assert ("bert.embeddings.word_embeddings", "not in the plan") in [(r.name, r.reason) for r in planned.left]
        compresskit.apply(model, planned)
        assert model.bert.encoder.layer[1].intermediate.dense.structure.rank == 5
        assert isinstance(model.bert.embeddings.word_embeddings, nn.Embedding)

    def test_any_name_of_a_tied_site_will_do(self, model, edited):
        expected = compresskit.plan_from_json(edited, model)
        self.site(edited, "word_embeddings")["name"] = "cls.predictions.decoder"
        assert compresskit.plan_from_json(edited, model).sites == expected.sites

    @pytest.mark.parametrize("value", [None, "0.5", float("nan"), True])
    def test_an_error_that_is_no_number_was_not_priced(self, model, edited, value):
        self.site(edited, "0.intermediate.dense")["expected_error"] = value
        planned = compresskit.plan_from_json(edited, model)
        found = next(p for p in planned.sites if p.site.name.endswith("0.intermediate.dense"))
        assert found.expected_error is None

    @pytest.mark.parametrize("whole", [None, 3, "plan", [], {}, {"sites": {}}, {"sites": []}, {"format_version": 1}])
    def test_what_is_no_plan(self, model, whole):
        with pytest.raises(PlanError, match="a plan is a JSON object with a list 'sites' that is not empty"):
            compresskit.plan_from_json(whole, model)

    @pytest.mark.parametrize("version", [2, 0, "1", None])
    def test_another_format_version(self, model, edited, version):
        edited["format_version"] = version
        with pytest.raises(PlanError, match=f"format version {version!r}, this release reads 1"):
            compresskit.plan_from_json(edited, model)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"name": "bert.nothing"}, PlanError, "names 'bert.nothing', which this model does not have; it has bert"),
            ({"name": "bert.embeddings.token_type_embeddings"}, PlanError, "left alone: fewer than 16 rows"),
            ({"name": "bert.encoder.layer.1.intermediate.dense"}, PlanError, "these sites twice: bert.encoder.layer.1"),
            ({"name": "bert.pooler.dense"}, PlanError, "which this model does not have"),
            ({"name": 3}, PlanError, "each site of a plan has 'name', 'method' and 'structure'"),
            ({"method": None}, PlanError, "each site of a plan has 'name', 'method' and 'structure'"),
            ({"structure": [1]}, PlanError, "each site of a plan has 'name', 'method' and 'structure'"),
            ({"method": "svdd"}, UnknownNameError, "no decomposition is called 'svdd'; did you mean 'svd'"),
            ({"method": "kronecker", "options": {}}, PlanError, "kronecker does not fit structures of kind 'low-rank'"),
            ({"options": {"ranks": "3"}}, UnknownNameError, "svd has no option 'ranks'"),
            ({"options": {"rank": "three"}}, OptionError, "option 'rank' takes integer, got 'three'"),
            ({"options": {"rank": 3}}, PlanError, "'options' of 'bert.encoder.layer.0.intermediate.dense' are texts"),
            ({"options": []}, PlanError, "are texts"),
            ({"structure": low_rank(rows=48, cols=96)}, PlanError, "is 96 x 48; the plan's structure is for another"),
            ({"structure": low_rank(rank=49)}, PlanError, "0.intermediate.dense': .* is impossible"),
            ({"structure": low_rank(rank=-1)}, PlanError, "integers from 0"),
            ({"structure": low_rank(rank=2.5)}, PlanError, "integers from 0"),
            ({"structure": low_rank(terms=1)}, PlanError, "has fields"),
            ({"structure": low_rank(kind="low-rang")}, PlanError, "kind 'low-rang'; did you mean 'low-rank'"),
            ({"structure": {}}, PlanError, "a structure is an object with a 'kind'"),
        ],
    )
    def test_edits_that_make_no_sense(self, model, edited, change, error, message):
        site = self.site(edited, "0.intermediate.dense")
        assert site["structure"]["kind"] == "low-rank"
        site |= change
        with pytest.raises(error, match=message):
            compresskit.plan_from_json(edited, model)

    def test_a_site_that_is_no_object(self, model, edited):
        edited["sites"][0] = "bert.embeddings.word_embeddings"
        with pytest.raises(PlanError, match="each site of a plan has"):
            compresskit.plan_from_json(edited, model)

    def test_a_plan_for_another_model(self, edited):
        with pytest.raises(PlanError, match=r"which this model does not have; it has transformer\.wte"):
            compresskit.plan_from_json(edited, build("gpt2"))
