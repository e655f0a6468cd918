"""Layers and lookups: what counts as possible, what is reported, and suites that name structures that exist."""

import pytest

import compresskit
from benchmarks.experiments import SuiteError
from benchmarks.experiments.layers import Layers, _possible
from benchmarks.experiments.lookups import SIDE, Lookups, _floor
from benchmarks.suites import read_suite


def test_what_is_possible_lies_between_the_limit_and_the_floor():
    assert _possible(0, 4) == pytest.approx(1 / 4)
    assert _possible(0.2, 4) == pytest.approx(0.2 + 0.8 / 4)
    assert _possible(1.5, 4) == 1.5  # a floor above the dense layer leaves nothing to win


def test_a_share_of_the_limit_and_one_of_what_is_possible():
    layers = Layers(method="svd", shape="32x16", structures=("rank=2", "rank=8"), tokens=(1, 4), repeats=1)
    figures = layers.run(None).figures
    assert figures["structures"]["rank=2"]["limit"] == 32 * 16 / (2 * (32 + 16))
    floors = figures["floor"]
    assert set(floors) == {"forward", "step"}
    assert min(floor for of in floors.values() for floor in of.values()) > 0
    floors["forward"] = {"1": 2.0, "4": 2.0}  # the floor takes half of the dense layer's time
    for structure, speed in (("rank=2", 4.0), ("rank=8", 1.0)):
        figures["structures"][structure]["forward"] = {"1": 1.5, "4": 1.0 if structure == "rank=2" else 0.5}
        figures["structures"][structure]["limit"] = speed
    row = Layers.row(
        {
            "method": "svd",
            "shape": "32x16",
            "dtype": "float32",
            "mode": "eager",
            "memory": "kept",
            "tokens": (1, 4),
            "step_tokens": (128,),
        },
        figures,
    )
    assert row["forward, 1 tokens"] == "0.94 (from 0.38); 1.22 (from 0.94)"
    assert row["slower than dense at"] == "none"


def test_a_lookup_is_timed_against_the_dense_one():
    lookups = Lookups(method="kronecker", shape="64x32", structures=("left=1x4",), tokens=(8,), repeats=1)
    figures = lookups.run(None).figures
    assert figures["structures"]["left=1x4"]["macs_per_column"] == 1
    assert figures["structures"]["left=1x4"]["floor"]["8"] > 0
    figures["structures"]["left=1x4"]["time"]["8"] = 2.5
    figures["structures"]["left=1x4"]["floor"]["8"] = 2.1
    row = lookups.row({"method": "kronecker", "shape": "64x32"}, figures)
    assert list(row.values())[-1] == "4.0, 1, 2.5 (above 2) (floor 2.1) at 8"


def test_the_floor_of_a_lookup_is_its_calls_and_the_longer_of_writing_and_multiplying():
    times = {"calls": [1.0, 2.0], "writing": [3.0, 3.0], "product": [4.0, 4.0]}
    assert _floor(times, SIDE**3 // 2) == [4.0, 5.0]
    assert _floor(times, SIDE**3 * 2) == [9.0, 10.0]


def test_options_that_leave_no_structure_are_an_error():
    for kind in (Layers, Lookups):
        with pytest.raises(SuiteError, match="kronecker 'left=5x5' leaves 0 structures for 64x32, not one"):
            kind(method="kronecker", shape="64x32", structures=("left=5x5",)).run(None)


def test_every_structure_of_the_suite_exists():
    for entry in read_suite("layers"):
        layers = entry.experiment
        rows, cols = map(int, layers.shape.split("x"))
        for text in layers.structures:
            options = dict(option.split("=") for option in text.split())
            menu = compresskit.decomposition(layers.method, options).menu(rows, cols, lookup=layers.kind == "lookups")
            assert len(list(menu)) == 1, (entry.name, text)
