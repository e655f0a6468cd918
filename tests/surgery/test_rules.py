"""Rules: patterns against the names of sites, who wins, and what is said of patterns that match nothing."""

import re
from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

import compresskit
from compresskit import SVD, Kronecker
from compresskit.errors import PlanError
from compresskit.surgery.rules import Rule, assign
from compresskit.surgery.sites import find_sites
from tests.models import LAYERS, build

BERT = build("bert-mlm")
SURVEY = find_sites(BERT)
WORDS = "bert.embeddings.word_embeddings"


def chosen(*patterns, model=BERT, survey=SURVEY, exclude=()):
    """Names of the sites that the patterns choose, in the model's order."""
    rules = [Rule(pattern, SVD()) for pattern in patterns]
    return [site.name for site, _ in assign(model, survey, rules, exclude).chosen]


def all_names():
    return [site.name for site in SURVEY.sites]


def test_a_star_matches_every_site():
    assert chosen("*") == all_names()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.query", [f"bert.encoder.layer.{i}.attention.self.query" for i in range(LAYERS)]),
        (
            "*.attention.self.[qk]*",
            [f"bert.encoder.layer.{i}.attention.self.{x}" for i in (0, 1) for x in ("query", "key")],
        ),
        ("*.1.*.valu?", ["bert.encoder.layer.1.attention.self.value"]),
        (
            r"re:bert\.encoder\.layer\.\d+\.output\.dense",
            [f"bert.encoder.layer.{i}.output.dense" for i in range(LAYERS)],
        ),
        (r"re:.*(query|key)", [f"bert.encoder.layer.{i}.attention.self.{x}" for i in (0, 1) for x in ("query", "key")]),
        ("bert.encoder.layer.0.intermediate.dense", ["bert.encoder.layer.0.intermediate.dense"]),
        ("encoder.layer.0.intermediate.dense", ["bert.encoder.layer.0.intermediate.dense"]),
        (r"re:encoder\.layer\.0\.intermediate.*", ["bert.encoder.layer.0.intermediate.dense"]),
        ("embeddings.word*", [WORDS]),
        ("cls.predictions.decoder", [WORDS]),
        ("cls.predictions.transform.*", ["cls.predictions.transform.dense"]),
    ],
)
def test_patterns(pattern, expected):
    assert chosen(pattern) == expected


@pytest.mark.parametrize(
    "pattern", ["*.QUERY", "query", "re:query", "re:encoder", "ert.encoder.*", "layer.0.*", "bert.bert.encoder.*"]
)
def test_whole_names_in_their_case_and_no_other_prefix(pattern):
    with pytest.raises(PlanError, match=f"these patterns match no layer: {re.escape(pattern)}\\."):
        chosen(pattern)


def test_without_a_head_there_is_no_prefix_to_leave_out():
    model = build("bert")
    names = chosen("encoder.layer.0.*", model=model, survey=find_sites(model))
    attention = [f"attention.{part}" for part in ("self.query", "self.key", "self.value", "output.dense")]
    assert names == [f"encoder.layer.0.{part}" for part in (*attention, "intermediate.dense", "output.dense")]
    with pytest.raises(PlanError, match="match no layer: layer"):
        chosen("layer.0.*", model=model, survey=find_sites(model))


def test_the_first_match_wins():
    rules = [Rule("*.0.*.query", Kronecker()), Rule("*.query", SVD(rank=4)), Rule("*", SVD())]
    methods = {site.name: d for site, d in assign(BERT, SURVEY, rules).chosen}
    assert methods.pop("bert.encoder.layer.0.attention.self.query") == Kronecker()
    assert methods.pop("bert.encoder.layer.1.attention.self.query") == SVD(rank=4)
    assert set(methods.values()) == {SVD()}


def test_a_rule_may_be_shadowed_entirely():
    rules = [Rule("*", SVD()), Rule("*.query", Kronecker())]
    assert {d for _, d in assign(BERT, SURVEY, rules).chosen} == {SVD()}


def test_exclude_wins_over_every_rule_and_says_so():
    assignment = assign(BERT, SURVEY, [Rule("*.query", SVD()), Rule("*", SVD())], ["*.query", "embeddings.*"])
    left = {r.name: r.reason for r in assignment.left}
    assert left["bert.encoder.layer.0.attention.self.query"] == "excluded by '*.query'"
    assert left[WORDS] == "excluded by 'embeddings.*'"
    assert not set(left) & {site.name for site, _ in assignment.chosen}


def test_any_name_of_a_tied_site_excludes_it():
    assert WORDS not in chosen("*", exclude=["cls.*"])


def test_what_no_pattern_includes_is_left_with_that_reason():
    left = {r.name: r.reason for r in assign(BERT, SURVEY, [Rule("*.query", SVD())]).left}
    assert left["bert.encoder.layer.0.attention.self.key"] == "no pattern includes it"
    assert left["bert.embeddings.token_type_embeddings"] == "fewer than 16 rows or columns"


def test_sites_and_what_is_left_are_everything():
    assignment = assign(BERT, SURVEY, [Rule("*.query", SVD())], ["*.1.*"])
    names = [site.name for site, _ in assignment.chosen] + [r.name for r in assignment.left]
    assert sorted(names) == sorted([*all_names(), *(r.name for r in SURVEY.refusals)])


@pytest.mark.parametrize("where", ["include", "exclude", "rules"])
def test_an_idle_pattern_is_an_error_with_real_names(where):
    arguments = {"include": "*"} | (
        {"rules": {"*.qwery": "svd"}} if where == "rules" else {where: ["*.query", "*.qwery"]}
    )
    with pytest.raises(PlanError) as caught:
        compresskit.plan(BERT, "svd", ratio=2, **arguments)
    head, names = str(caught.value).split(". Layers look like: ")
    assert head == "these patterns match no layer: *.qwery"
    shown = names.removesuffix(", ...").split(", ")
    assert len(shown) == 6
    assert set(shown) <= {name for site in SURVEY.sites for name in site.names}


def test_a_pattern_that_matches_only_what_is_refused_says_why():
    expected = r"match only what is left alone: \*token_type\*\. bert.embeddings.token_type_embeddings: fewer than 16"
    with pytest.raises(PlanError, match=expected):
        chosen("*.query", "*token_type*")


def test_what_is_left_alone_anyway_may_be_excluded():
    assert chosen("*", exclude=["*token_type*"]) == all_names()


def test_an_unknown_pattern_is_reported_before_a_refused_one():
    with pytest.raises(PlanError, match=r"match no layer: nothing\. "):
        chosen("*token_type*", "nothing")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("", "an empty pattern matches nothing; use '\\*' for all layers"),
        ("re:(", r"'re:\(' is not a regular expression: .*unterminated subpattern"),
        ("re:*", "'re:\\*' is not a regular expression: nothing to repeat"),
    ],
)
@pytest.mark.parametrize("where", ["include", "exclude"])
def test_malformed_patterns(pattern, message, where):
    with pytest.raises(PlanError, match=message):
        compresskit.plan(BERT, "svd", ratio=2, **{where: pattern})


def test_nothing_left_says_what_happened_to_each():
    with pytest.raises(PlanError, match=r"nothing is left to compress: .*excluded by '\*'.*and \d+ more"):
        chosen("*", exclude=["*"])


def test_neither_method_nor_rules():
    with pytest.raises(PlanError, match="give a method or rules"):
        compresskit.plan(BERT, ratio=2)
    with pytest.raises(PlanError, match="give a method or rules"):
        compresskit.plan(BERT, "svd", ratio=2, include=())


def test_rules_come_before_the_method_and_may_be_a_mapping():
    pairs = {"*.query": "kronecker", "*.key": SVD(rank=3)}
    planned = compresskit.plan(BERT, "svd", ratio=6, rules=pairs)
    assert planned == compresskit.plan(BERT, "svd", ratio=6, rules=list(pairs.items()))
    methods = {p.site.name.split(".")[-1]: p.decomposition for p in planned.sites}
    assert methods["query"] == Kronecker()
    assert methods["key"] == SVD(rank=3)
    assert methods["value"] == SVD()


PATTERNS = (
    "*",
    "*.query",
    "*.0.*",
    "bert.*",
    "encoder.*",
    "cls.*",
    "re:.*dense",
    r"re:(bert\.)?embeddings\..*",
    "*.[kv]*",
)


@given(
    st.lists(st.tuples(st.sampled_from(PATTERNS), st.integers(1, 9)), min_size=1, max_size=4),
    st.lists(st.sampled_from(PATTERNS[1:]), max_size=2),
)
def test_assignment_is_the_first_match_of_each_site(pairs, exclude):
    def matches(pattern, site):
        names = {n for name in site.names for n in (name, name.removeprefix("bert."))}
        if pattern.startswith("re:"):
            return any(re.fullmatch(pattern[3:], name) for name in names)
        return any(fnmatchcase(name, pattern) for name in names)

    expected = {}
    for site in SURVEY.sites:
        first = next((rank for pattern, rank in pairs if matches(pattern, site)), None)
        if first is not None and not any(matches(pattern, site) for pattern in exclude):
            expected[site.name] = SVD(rank=first)
    rules = [Rule(pattern, SVD(rank=rank)) for pattern, rank in pairs]
    if not expected:
        with pytest.raises(PlanError, match="nothing is left to compress"):
            assign(BERT, SURVEY, rules, exclude)
    else:
        assert {site.name: d for site, d in assign(BERT, SURVEY, rules, exclude).chosen} == expected
