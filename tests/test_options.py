"""Options survive their text form, and what does not fit is refused with what would."""

import dataclasses
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compresskit.errors import OptionError, UnknownNameError
from compresskit.options import check_options, describe, describe_options, option_text, option_types, parse_options


@dataclasses.dataclass(frozen=True)
class Options:
    count: int = 1
    share: float = 0.5
    fast: bool = False
    text: str = "a"
    side: Literal["left", "right"] = "left"
    pair: tuple[int, int] = (2, 3)
    many: tuple[int, ...] = (1,)
    limit: int | None = None
    shape: tuple[int, int, int] | None = None


values = st.builds(
    Options,
    count=st.integers(),
    share=st.floats(allow_nan=False),
    fast=st.booleans(),
    text=st.text(),
    side=st.sampled_from(["left", "right"]),
    pair=st.tuples(st.integers(), st.integers()),
    many=st.lists(st.integers(), min_size=1).map(tuple),
    limit=st.none() | st.integers(),
    shape=st.none() | st.tuples(*[st.integers()] * 3),
)


@given(values)
def test_options_survive_their_text_form(options):
    text = {name: option_text(getattr(options, name)) for name in option_types(Options)}
    assert parse_options(Options, text) == options


@given(values)
def test_options_may_be_values_as_they_are(options):
    given_values = {name: getattr(options, name) for name in option_types(Options)}
    assert parse_options(Options, given_values) == options
    assert parse_options(Options, {**given_values, "pair": list(options.pair)}) == options


@pytest.mark.parametrize(
    ("name", "value"), [("count", 2.5), ("fast", 1), ("pair", (2,)), ("pair", 2), ("side", None), ("limit", [1, 2])]
)
def test_a_value_of_another_kind_is_refused(name, value):
    with pytest.raises(OptionError, match=f"option '{name}' takes"):
        parse_options(Options, {name: value})


def test_options_that_are_not_given_keep_their_defaults():
    assert parse_options(Options, {"count": "7"}) == Options(count=7)


@pytest.mark.parametrize(("text", "value"), [("2x3", (2, 3)), ("2X3", (2, 3)), ("2,3", (2, 3)), ("-1x4", (-1, 4))])
def test_sizes_are_written_with_x_or_comma(text, value):
    assert parse_options(Options, {"pair": text}).pair == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("count", "two", "option 'count' takes integer, got 'two'"),
        ("count", "2.5", "option 'count' takes integer"),
        ("count", "", "option 'count' takes integer"),
        ("share", "half", "option 'share' takes number"),
        ("fast", "yes", "option 'fast' takes true or false"),
        ("side", "top", "option 'side' takes left or right, got 'top'"),
        ("pair", "2", "option 'pair' takes 2 integers as AxB"),
        ("pair", "2x3x4", "option 'pair' takes 2 integers as AxB"),
        ("pair", "2xb", "option 'pair' takes 2 integers as AxB"),
        ("many", "", "option 'many' takes integers as AxBx..."),
        ("limit", "low", "option 'limit' takes integer, got 'low'"),
        ("shape", "1x2", "option 'shape' takes 3 integers as AxBxC"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(name, text, message):
    with pytest.raises(OptionError, match=message):
        parse_options(Options, {name: text})


def test_an_unknown_option_is_answered_with_the_known_ones():
    with pytest.raises(UnknownNameError, match=r"Options has no option 'cuont'; its options: count \(integer\), share"):
        parse_options(Options, {"cuont": "1"})


def test_a_class_without_options_says_none():
    empty = dataclasses.make_dataclass("Empty", [], frozen=True)
    with pytest.raises(UnknownNameError, match="its options: none"):
        parse_options(empty, {"count": "1"})


def test_types_are_described_for_people():
    described = {name: describe(hint) for name, hint in option_types(Options).items()}
    assert described == {
        "count": "integer",
        "share": "number",
        "fast": "true or false",
        "text": "text",
        "side": "left or right",
        "pair": "2 integers as AxB",
        "many": "integers as AxBx...",
        "limit": "integer or none",
        "shape": "3 integers as AxBxC or none",
    }


def test_options_are_listed_with_their_defaults_as_text():
    listed = describe_options(Options)
    assert list(listed) == list(option_types(Options))
    assert listed["pair"] == ("2 integers as AxB", "2x3")
    assert listed["limit"] == ("integer or none", "none")
    assert parse_options(Options, {name: default for name, (_, default) in listed.items()}) == Options()


def test_sound_options_pass_the_check():
    check_options(Options)


@pytest.mark.parametrize(
    "hint", [list[int], dict, bytes, Literal[1, 2], tuple[str, str], int | float, int | float | None, set[int]]
)
def test_a_type_without_text_form_is_refused(hint):
    cls = dataclasses.make_dataclass("Odd", [("odd", hint, None)], frozen=True)
    with pytest.raises(OptionError, match=r"option 'odd' of Odd has type .*, which has no text form"):
        check_options(cls)


def test_an_option_without_default_is_refused():
    cls = dataclasses.make_dataclass("Bare", [("bare", int)], frozen=True)
    with pytest.raises(OptionError, match="option 'bare' of Bare has no default"):
        check_options(cls)
