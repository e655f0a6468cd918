"""The walker: what is a site, what is refused and why, and that nothing is lost between the two."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

import compresskit
from compresskit.surgery.sites import MIN_SIDE, Site, count_params, find_sites, site_weight
from tests.models import FAMILIES, FFN, HIDDEN, LAYERS, VOCAB, Plain, build, unique_params


class LinearOfItsOwn(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


class Tables(nn.Module):
    """Holds the weight of a linear layer once more, as a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 24)
        self.table = self.layer.weight


def beside_a_site(module):
    return nn.Sequential(nn.Linear(32, 24), module)


def with_weight(weight, **more):
    layer = nn.Linear(32, 24)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def with_hook(register):
    layer = nn.Linear(32, 24)
    getattr(layer, register)(lambda *args: None)
    return layer


def with_replaced_forward():
    layer = nn.Linear(32, 24)
    layer.forward = lambda x: x[..., :24]
    return layer


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(32, 24))


def tied_in_two_directions():
    pair = nn.Sequential(Conv1D(32, 32), nn.Linear(32, 32))
    pair[1].weight = pair[0].weight
    return pair


def of_two_tied_one_refused():
    pair = nn.Sequential(nn.Linear(32, 24), LinearOfItsOwn(32, 24))
    pair[1].weight = pair[0].weight
    return pair


REFUSED = {
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(32, 24)), "parametrised", 24 * 32 + 24),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(32, 24)), "parametrised", 24 * 32),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Embedding(40, 32)), "parametrised", 40 * 32),
    "old weight norm": (old_weight_norm, "parametrised", 24 * 32 + 24),
    "subclass": (lambda: LinearOfItsOwn(32, 24), "LinearOfItsOwn is a subclass", 24 * 32),
    "forward hook": (lambda: with_hook("register_forward_hook"), "carries hooks", 24 * 32),
    "forward pre-hook": (lambda: with_hook("register_forward_pre_hook"), "carries hooks", 24 * 32),
    "backward hook": (lambda: with_hook("register_full_backward_hook"), "carries hooks", 24 * 32),
    "backward pre-hook": (lambda: with_hook("register_full_backward_pre_hook"), "carries hooks", 24 * 32),
    "replaced forward": (with_replaced_forward, "forward was replaced", 24 * 32),
    "max_norm": (lambda: nn.Embedding(40, 32, max_norm=1.0), "max_norm or sparse", 40 * 32),
    "sparse": (lambda: nn.Embedding(40, 32, sparse=True), "max_norm or sparse", 40 * 32),
    "few rows": (lambda: nn.Linear(32, MIN_SIDE - 1), "fewer than 16 rows or columns", 32 * (MIN_SIDE - 1)),
    "few columns": (lambda: nn.Embedding(40, MIN_SIDE - 1), "fewer than 16 rows or columns", 40 * (MIN_SIDE - 1)),
    "integers": (lambda: with_weight(torch.ones(24, 32, dtype=torch.int8)), r"\(24, 32\) of torch.int8", 24 * 32),
    "complex": (lambda: with_weight(torch.ones(24, 32, dtype=torch.complex64)), "of torch.complex64", 24 * 32),
    "meta": (lambda: nn.Linear(32, 24, device="meta"), "meta device", 24 * 32),
    "tied to another parameter": (Tables, "no linear layer or embedding", 24 * 32),
    "tied in two directions": (tied_in_two_directions, "different directions", 32 * 32),
    "tied to a refused one": (of_two_tied_one_refused, "LinearOfItsOwn is a subclass", 24 * 32),
    "convolution": (lambda: nn.Conv2d(16, 16, 3), "a parameter of its own", 16 * 16 * 9),
}


@pytest.mark.parametrize("build_refused", REFUSED.values(), ids=REFUSED)
def test_refuses_with_the_reason_and_compresses_the_rest(build_refused):
    make, reason, num_params = build_refused
    model = beside_a_site(make())
    survey = find_sites(model)
    assert [site.name for site in survey.sites] == ["0"]
    (refusal,) = survey.refusals
    assert refusal.name.startswith("1")
    assert refusal.num_params == num_params
    with pytest.raises(compresskit.errors.PlanError, match=f"match only what is left alone: 1.*{reason}"):
        compresskit.plan(model, "svd", ratio=1.1, include="1*")
    kept = model[1]
    compresskit.compress(model, "svd", params=survey.num_params - 100)
    assert model[1] is kept
    assert isinstance(model[0], compresskit.FactorizedLinear)


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_refusals_and_vectors_are_all_there_is(family):
    model = build(family)
    survey = find_sites(model)
    vectors = sum(p.numel() for p in model.parameters() if p.dim() < 2)
    sites, refused = sum(s.num_params for s in survey.sites), sum(r.num_params for r in survey.refusals)
    assert sites + refused + vectors == unique_params(model) == survey.num_params == count_params(model)
    assert survey.coverage == sites / unique_params(model)


def test_every_linear_layer_and_embedding_of_bert_is_found():
    survey = find_sites(build("bert"))
    blocks = 4 * HIDDEN**2 + 2 * HIDDEN * FFN
    assert sum(s.num_params for s in survey.sites) == LAYERS * blocks + (VOCAB + 40) * HIDDEN + HIDDEN**2
    assert {s.kinds for s in survey.sites} == {("linear",), ("embedding",)}
    assert [r.name for r in survey.refusals] == ["embeddings.token_type_embeddings"]


TIED = {
    "bert-mlm": ("bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    "roberta": ("roberta.embeddings.word_embeddings", "lm_head.decoder"),
    "albert": ("albert.embeddings.word_embeddings", "predictions.decoder"),
    "gpt2": ("transformer.wte", "lm_head"),
    "t5": ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"),
    "llama-tied": ("model.embed_tokens", "lm_head"),
    "whisper": ("model.decoder.embed_tokens", "proj_out"),
    "plain": ("embed", "head"),
}


@pytest.mark.parametrize("family", TIED)
def test_a_tied_weight_is_one_site_with_all_its_names(family):
    sites = find_sites(build(family)).sites
    site = next(site for site in sites if site.name == TIED[family][0])
    assert site.names == TIED[family]
    assert site.kinds[0] == "embedding"
    assert site.kinds[-1] == "linear"
    assert (site.rows, site.cols) == (VOCAB, 24 if family == "albert" else HIDDEN)
    assert site.lookup
    assert site.multiplied == 1
    assert [s.names for s in sites if len(s.names) > 1] == [TIED[family]]


def test_untied_weights_are_sites_of_their_own():
    names = [site.names for site in find_sites(build("llama")).sites]
    assert ("model.embed_tokens",) in names
    assert ("lm_head",) in names


def test_conv1d_is_seen_as_out_by_in():
    model = build("gpt2")
    site = next(s for s in find_sites(model).sites if s.name.endswith("h.0.attn.c_attn"))
    assert (site.kinds, site.rows, site.cols) == (("conv1d",), 3 * HIDDEN, HIDDEN)
    stored = model.get_submodule(site.name).weight
    weight = site_weight(model, site)
    torch.testing.assert_close(weight, stored.T, rtol=0, atol=0)
    assert weight.data_ptr() == stored.data_ptr()


def test_a_module_in_two_places_is_one_site():
    names = [site.name for site in find_sites(Plain()).sites]
    assert names == ["embed", "first.0", "first.2"]


def test_padding_rows_stay_beside_the_factors():
    tables = nn.Sequential(
        nn.Embedding(40, 32, padding_idx=0), nn.Embedding(40, 32, padding_idx=5), nn.Embedding(40, 32)
    )
    for table in tables:
        table.weight = tables[0].weight
    (site,) = find_sites(tables).sites
    assert site == Site("0", ("0", "1", "2"), ("embedding",) * 3, 40, 32, extra_params=2 * 32)
    assert site.multiplied == 0


def test_fused_experts_are_refused_one_by_one():
    survey = find_sites(build("mixtral"))
    refused = {r.name: r for r in survey.refusals}
    for layer in range(LAYERS):
        experts = f"model.layers.{layer}.mlp.experts"
        assert refused[f"{experts}.gate_up_proj"].num_params == 4 * 2 * FFN * HIDDEN
        assert refused[f"{experts}.down_proj"].num_params == 4 * HIDDEN * FFN
        assert "a parameter of its own" in refused[f"{experts}.down_proj"].reason


def test_attention_of_torch_itself_is_refused():
    survey = find_sites(nn.TransformerEncoderLayer(32, 4, 64))
    assert {r.name: r.reason for r in survey.refusals} == {
        "self_attn.out_proj": "NonDynamicallyQuantizableLinear is a subclass that may compute something else",
        "self_attn.in_proj_weight": "a parameter of its own, not the weight of a linear layer or an embedding",
    }
    assert [s.name for s in survey.sites] == ["linear1", "linear2"]


@pytest.mark.parametrize("method", compresskit.methods())
@pytest.mark.parametrize("family", ["t5", "plain", "whisper"])
def test_factorised_modules_are_no_sites_again(family, method):
    model = build(family)
    dense = find_sites(model)
    compresskit.compress(model, method, ratio=1.5)
    survey = find_sites(model)
    again = {r.name: r.num_params for r in survey.refusals if r.reason == "it is factorised already"}
    done = [s for s in dense.sites if s.name in again]
    assert {s.name for s in survey.sites} == {s.name for s in dense.sites} - set(again)
    assert {name for s in done for name in s.names} == set(again)
    vectors = sum(p.numel() for p in model.parameters() if p.dim() < 2)
    sites, refused = sum(s.num_params for s in survey.sites), sum(r.num_params for r in survey.refusals)
    assert sites + refused + vectors == unique_params(model)


def test_the_whole_model_cannot_be_a_site():
    with pytest.raises(compresskit.errors.PlanError, match=r"\(the model itself\): it is the whole model"):
        compresskit.compress(nn.Linear(32, 24), "svd", ratio=2)


def test_a_model_without_matrices_is_told_so():
    with pytest.raises(compresskit.errors.PlanError, match=r"Nothing here can be replaced: the model has no linear"):
        compresskit.compress(nn.LayerNorm(32), "svd", ratio=2)
