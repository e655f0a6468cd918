"""Objectives are data."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import compresskit
from compresskit.distill import (
    Objective,
    losses,
    make_loss,
    objective_from_data,
    objective_from_json,
    objective_from_toml,
)
from compresskit.errors import OptionError, UnknownNameError

weights = st.floats(1e-6, 1e6)
layers = st.none() | st.lists(st.integers(-12, 11), min_size=1, max_size=4)
anything = st.one_of(
    st.builds(lambda n, w: make_loss(n, {"weight": w}), st.sampled_from(sorted(losses())), weights),
    st.builds(lambda w, x: make_loss("hidden-states", {"weight": w, "layers": x}), weights, layers),
    st.builds(
        lambda t, k: make_loss("logits", {"temperature": t, "kind": k}), weights, st.sampled_from(["kl", "mse", "auto"])
    ),
    st.builds(lambda h: make_loss("relations", {"heads": h}), st.none() | st.integers(1, 64)),
)


@given(st.lists(anything, min_size=1, max_size=5).map(lambda found: Objective(*found)))
def test_round_trips(objective):
    assert objective_from_data(objective.to_data()) == objective
    assert objective_from_json(objective.to_json()) == objective
    assert objective_from_toml(objective.to_toml()) == objective
    assert len(set(objective.names())) == len(objective.losses)


def test_it_reads_well():
    objective = Objective(
        make_loss("hidden-states", {"layers": [0, -1], "projection": "linear"}), make_loss("task", {"weight": 0.5})
    )
    assert objective.to_toml().splitlines() == [
        "[[loss]]",
        'name = "hidden-states"',
        "layers = [0, -1]",
        'projection = "linear"',
        "",
        "[[loss]]",
        'name = "task"',
        "weight = 0.5",
    ]


def test_options_are_described_for_the_command_line():
    found = compresskit.describe_options(losses()["relations"])
    assert found["of"] == ("value or query or key", "value")
    assert found["heads"] == ("integer or none", "none")
    assert found["layers"] == ("integers as AxBx... or none", "none")
    assert found["weight"] == ("number", "1.0")
    for loss in losses().values():
        assert loss.summary
        assert loss.source


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({}, OptionError, "one list called 'loss'"),
        ({"loss": [], "other": 1}, OptionError, "one list called 'loss'"),
        ({"loss": []}, OptionError, "at least one loss"),
        ({"loss": [{"weight": 1}]}, OptionError, "a table with a name and options"),
        ({"loss": ["task"]}, OptionError, "a table with a name and options"),
        ({"loss": [{"name": "tusk"}]}, UnknownNameError, "did you mean 'task'"),
        ({"loss": [{"name": "task", "weight": "much"}]}, OptionError, "'weight' takes number, got 'much'"),
        ({"loss": [{"name": "hidden-states", "layers": ["a"]}]}, OptionError, "'layers' takes integers as AxBx"),
    ],
)
def test_what_is_wrong_is_named(data, error, message):
    with pytest.raises(error, match=message):
        objective_from_data(data)


def test_text_that_cannot_be_read():
    with pytest.raises(OptionError, match="not JSON"):
        objective_from_json("{")
    with pytest.raises(OptionError, match="not TOML"):
        objective_from_toml("[[loss]")
    with pytest.raises(OptionError, match="made of losses"):
        Objective("task")


def test_the_trainer_is_imported_late():
    """`import compresskit` and its objectives do not pay for transformers' Trainer."""
    program = (
        "import sys, compresskit; compresskit.distill.losses(); assert 'transformers.trainer' not in sys.modules; "
        "compresskit.distill.DistillationTrainer; assert 'transformers.trainer' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
