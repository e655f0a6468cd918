"""Structures from JSON: the way back works, and whatever else comes in is a CheckpointError."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compresskit.core import registry
from compresskit.core.registry import MAX_SIDE, decompositions, structure_from_json
from compresskit.core.structure import Structure, TensorSpec, empty_factors
from compresskit.decompositions.svd import LowRank
from compresskit.errors import CheckpointError, StructureError

EXAMPLES = [
    structure
    for cls in decompositions().values()
    for rows, cols in ((24, 12), (53, 12))
    for structure in list(cls().menu(rows, cols, lookup=rows == 53))[:3]
]
KINDS = sorted({structure.kind for structure in EXAMPLES})
FIELDS = sorted({field.name for structure in EXAMPLES for field in dataclasses.fields(structure)})

sizes = st.integers(-2, 60) | st.sampled_from([2**31 - 1, 2**31, 2**63, 10**30])
scalars = st.none() | st.booleans() | st.floats() | st.text(max_size=4) | sizes
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def check_only_checkpoint_errors(data):
    try:
        structure = structure_from_json(data)
    except CheckpointError:
        return
    assert isinstance(structure, Structure)
    assert structure_from_json(structure.to_json()) == structure
    empty_factors(structure, dtype=None, device="meta")


@given(st.sampled_from(EXAMPLES))
def test_a_structure_comes_back_equal(structure):
    assert structure_from_json(json.loads(json.dumps(structure.to_json()))) == structure


@given(anything | st.dictionaries(st.sampled_from(["kind", *FIELDS]), anything))
def test_arbitrary_data_gives_nothing_but_checkpoint_errors(data):
    check_only_checkpoint_errors(data)


@given(st.sampled_from(KINDS), st.dictionaries(st.sampled_from(FIELDS), sizes | st.lists(sizes, max_size=4)))
def test_arbitrary_sizes_give_nothing_but_checkpoint_errors(kind, fields):
    check_only_checkpoint_errors({"kind": kind, **fields})


@given(st.sampled_from(EXAMPLES), st.data())
def test_a_damaged_structure_gives_nothing_but_checkpoint_errors(structure, data):
    damaged = structure.to_json()
    for field in data.draw(st.lists(st.sampled_from([*damaged]), min_size=1, max_size=2, unique=True)):
        damaged[field] = data.draw(anything | sizes | st.lists(sizes | st.lists(sizes, max_size=2), max_size=4))
    check_only_checkpoint_errors(damaged)


def nested(depth):
    return json.loads("[" * depth + "]" * depth)


GOOD = {"kind": "low-rank", "rows": 8, "cols": 6, "rank": 2}
BAD = {
    "no object": ([GOOD], "a structure is an object with a 'kind'"),
    "no kind": ({"rows": 8, "cols": 6, "rank": 2}, "a structure is an object with a 'kind'"),
    "a kind that is no text": ({**GOOD, "kind": ["low-rank"]}, "a structure is an object with a 'kind'"),
    "unknown kind": ({**GOOD, "kind": "low-rnk"}, "unknown structure kind 'low-rnk'; did you mean 'low-rank'.*plug-in"),
    "missing field": ({"kind": "low-rank", "rows": 8, "cols": 6}, r"has fields \['cols', 'rank', 'rows'\], got"),
    "surplus field": ({**GOOD, "terms": 2}, "has fields .* got .*'terms'"),
    "a field that is no text": ({**GOOD, 3: 2}, "has fields .* got .*3"),
    "text": ({**GOOD, "rank": "2"}, "the size 'rank' of a structure is '2'; integers from 0 to 2147483647 are sane"),
    "a truth value": ({**GOOD, "rank": True}, "the size 'rank' of a structure is True"),
    "a fraction": ({**GOOD, "rank": 2.0}, r"the size 'rank' of a structure is 2\.0"),
    "negative": ({**GOOD, "rows": -8}, "the size 'rows' of a structure is -8"),
    "too large": ({**GOOD, "rows": MAX_SIDE + 1}, "the size 'rows' of a structure is 2147483648"),
    "zero": ({**GOOD, "rows": 0}, "is impossible: low-rank: a weight of 0 x 6 does not exist"),
    "impossible": ({**GOOD, "rank": 7}, "is impossible: the rank of a 8 x 6 weight is 1 to 6"),
    "a list": ({**GOOD, "rank": [2]}, "is impossible"),
    "deeply nested": ({**GOOD, "rank": nested(900)}, "the size 'rank' of a structure is nested too deeply"),
}


@pytest.mark.parametrize(("data", "message"), BAD.values(), ids=BAD)
def test_bad_data_is_refused(data, message):
    with pytest.raises(CheckpointError, match=message):
        structure_from_json(data)


def test_a_plug_in_whose_validation_fails_otherwise_is_not_passed_over(monkeypatch):
    """A bug of a structure is not a damaged checkpoint: it comes out as what it is."""

    @dataclasses.dataclass(frozen=True)
    class Buggy(LowRank.__base__):
        kind = "buggy"
        validate = factor_specs = dense = matmul = take_rows = lambda self: {}["bug"]
        macs = lookup_macs = 0

    monkeypatch.setitem(registry._structures, "buggy", Buggy)
    with pytest.raises(KeyError, match="bug"):
        structure_from_json({"kind": "buggy", "rows": 2, "cols": 2})


def test_a_structure_is_a_value():
    structure = LowRank(8, 6, 2)
    assert structure == LowRank(8, 6, 2)
    assert hash(structure) == hash(LowRank(8, 6, 2))
    assert structure != LowRank(8, 6, 3)
    assert str(structure) == "low-rank(rank=2)"
    assert structure.num_params == 8 * 2 + 2 * 6
    with pytest.raises(dataclasses.FrozenInstanceError):
        structure.rank = 3


def test_a_matrix_factor_has_two_dimensions():
    with pytest.raises(StructureError, match="a factor that acts as a matrix has 2 dimensions"):
        TensorSpec((2, 3, 4), matrix=True)
