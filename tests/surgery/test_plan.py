"""Plans as JSON that can be edited and replayed."""

import copy
import json

import pytest
from torch import nn

import compresskit
from compresskit import Kronecker
from compresskit.errors import OptionError, PlanError, UnknownNameError
from tests.models import build

METHODS = tuple(compresskit.methods())


def low_rank(**more):
    """JSON of a structure for a weight of 96 x 48."""
    return {"kind": "low-rank", "rows": 96, "cols": 48, "rank": 3, **more}


@pytest.fixture(scope="module")
def model():
    return build("bert-mlm")


@pytest.fixture(scope="module")
def data(model):
    """A plan of that model, as it comes out of a file."""
    rules = {"*.query": Kronecker(terms=2, small="both"), "*.key": "tensor-train", "*.value": "tucker"}
    return json.loads(json.dumps(compresskit.plan(model, "svd", ratio=6, rules=rules).to_json()))


@pytest.fixture
def edited(data):
    return copy.deepcopy(data)


def entry(data, name):
    return next(site for site in data["sites"] if site["name"].endswith(name))


@pytest.mark.parametrize("method", METHODS)
def test_round_trip(model, method):
    planned = compresskit.plan(model, method, ratio=4)
    again = compresskit.plan_from_json(json.loads(json.dumps(planned.to_json())), model)
    assert again.sites == planned.sites
    assert (again.params_after, again.ratio, again.macs) == (planned.params_after, planned.ratio, planned.macs)
    assert again.gap is None
    assert again.coverage == planned.coverage
    assert {r.name for r in again.left} == {r.name for r in planned.left}


def test_round_trip_of_several_methods_with_options(model, data):
    again = compresskit.plan_from_json(data, model)
    assert json.loads(json.dumps(again.to_json()))["sites"] == data["sites"]
    assert again.params_after == data["params_after"]


def test_the_numbers_are_for_the_reader_only(model, edited):
    expected = compresskit.plan_from_json(edited, model)
    edited |= {"num_params": 7, "params_after": 8, "ratio": 9, "left_dense": None}
    for site in edited["sites"]:
        site |= {"params": 1, "dense_params": 2, "macs": 3, "dense_macs": 4}
    assert compresskit.plan_from_json(edited, model) == expected


def test_an_edited_structure_is_what_the_model_gets(edited):
    model = build("bert-mlm")
    site = entry(edited, "1.intermediate.dense")
    site |= {"method": "svd", "options": {}, "structure": low_rank(rank=5)}
    edited["sites"] = [entry for entry in edited["sites"] if not entry["name"].endswith("word_embeddings")]
    planned = compresskit.plan_from_json(edited, model)
    assert ("bert.embeddings.word_embeddings", "not in the plan") in [(r.name, r.reason) for r in planned.left]
    compresskit.apply(model, planned)
    assert model.bert.encoder.layer[1].intermediate.dense.structure.rank == 5
    assert isinstance(model.bert.embeddings.word_embeddings, nn.Embedding)


def test_any_name_of_a_tied_site_will_do(model, edited):
    expected = compresskit.plan_from_json(edited, model)
    entry(edited, "word_embeddings")["name"] = "cls.predictions.decoder"
    assert compresskit.plan_from_json(edited, model).sites == expected.sites


@pytest.mark.parametrize("value", [None, "0.5", float("nan"), True])
def test_an_error_that_is_no_number_was_not_priced(model, edited, value):
    entry(edited, "0.intermediate.dense")["expected_error"] = value
    planned = compresskit.plan_from_json(edited, model)
    found = next(p for p in planned.sites if p.site.name.endswith("0.intermediate.dense"))
    assert found.expected_error is None


@pytest.mark.parametrize("whole", [None, 3, "plan", [], {}, {"sites": {}}, {"sites": []}, {"format_version": 1}])
def test_what_is_no_plan(model, whole):
    with pytest.raises(PlanError, match="a plan is a JSON object with a list 'sites' that is not empty"):
        compresskit.plan_from_json(whole, model)


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_another_format_version(model, edited, version):
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
def test_edits_that_make_no_sense(model, edited, change, error, message):
    site = entry(edited, "0.intermediate.dense")
    assert site["structure"]["kind"] == "low-rank"
    site |= change
    with pytest.raises(error, match=message):
        compresskit.plan_from_json(edited, model)


def test_a_site_that_is_no_object(model, edited):
    edited["sites"][0] = "bert.embeddings.word_embeddings"
    with pytest.raises(PlanError, match="each site of a plan has"):
        compresskit.plan_from_json(edited, model)


def test_a_plan_for_another_model(edited):
    with pytest.raises(PlanError, match=r"which this model does not have; it has transformer\.wte"):
        compresskit.plan_from_json(edited, build("gpt2"))
