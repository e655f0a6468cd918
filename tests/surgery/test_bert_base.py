"""Budgets on the shapes of bert-base: 75 sites of 9 shapes, whose menus and exact ties are what real plans meet.

All layers hold the weights of the first, so that each distinct weight is analysed once for all plans.
"""

import pytest
import torch
import transformers

import compresskit
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
