"""Budgets on the shapes of bert-base: 75 sites of 9 shapes, whose menus and exact ties are what real plans meet.

All layers hold the weights of the first, so that each distinct weight is analysed once for all plans.
"""

import json

import pytest
import torch
import transformers

import compresskit
from compresskit import Kronecker
from tests.models import remember_analyses

RATIOS = (7.7, 19, 21)
METHODS = ("kronecker", "svd", "tucker")


@pytest.fixture(scope="module")
def bert_base():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.BertModel(transformers.BertConfig())
    for layer in model.encoder.layer[1:]:
        layer.load_state_dict(model.encoder.layer[0].state_dict())
    with pytest.MonkeyPatch.context() as patch:
        remember_analyses(patch, *(compresskit.methods()[method] for method in METHODS))
        yield model


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("method", METHODS)
def test_the_ratio_is_kept_and_exceeded_by_at_most_two_percent(bert_base, method, ratio):
    planned = compresskit.plan(bert_base, method, ratio=ratio)
    assert planned.num_params == 109_482_240
    assert ratio <= planned.ratio <= 1.02 * ratio
    assert planned.gap < 1e-3
    assert planned.macs < planned.dense_macs / 4


@pytest.mark.parametrize("method", METHODS)
def test_uniform_shapes_come_as_close(bert_base, method):
    planned = compresskit.plan(bert_base, method, ratio=19, uniform=True)
    assert 19 <= planned.ratio <= 1.02 * 19
    assert len({(p.site.kinds, p.site.rows, p.site.cols, p.structure) for p in planned.sites}) <= 6
    assert len(planned.sites) >= 1 + 12 * 6


PADDING = 768
"""The exact padding row that stays beside the factors; the papers approximate it like any other."""


class TestKroneckerBert:
    """The shapes of Tahaei et al. (NAACL 2022), whose parameter counts are known, from rules alone."""

    def shapes(self, words, attention, up, down):
        def sides(left, right):
            return Kronecker(small="right", left=left, right=right)

        return {
            "*.word_embeddings": sides(*words),
            "*.attention.*": sides(*attention),
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
        assert [(p.structure.left, p.structure.right) for p in planned.sites[:7]] == [
            self.K21[i] for i in (0, 1, 1, 1, 1, 2, 3)
        ]
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
