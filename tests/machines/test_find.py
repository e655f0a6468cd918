"""Machines by name and file: what reads back, and what is refused with a word on why."""

import copy

import pytest

from compresskit.core.cost import Target, dense_operations
from compresskit.errors import OptionError, UnknownNameError
from compresskit.machines import DEFAULT, machine, machine_from_data, machine_text, machine_to_data, machines
from compresskit.tables import read_tables

NAMES = ("cpu", "cpu-bf16", "cpu-bf16-kernel", "cpu-kernel", "h100")


def test_the_default_comes_first_and_files_are_named_like_their_machines():
    found = machines()
    assert next(iter(found)) == DEFAULT == machine().name
    assert {name: made.name for name, made in found.items()} == {name: name for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_machine_reads_back_as_data_and_as_a_file(name, tmp_path):
    made = machine(name)
    assert machine_from_data(machine_to_data(made), "here") == made == machine(made)
    (tmp_path / "own.toml").write_text(machine_text(made), encoding="utf-8")
    assert machine(tmp_path / "own.toml") == made
    assert made.dense.element_bytes == {"float32": 4, "bfloat16": 2}[made.dtype]


def test_kinds_that_are_not_named_run_at_the_speed_of_factorised_layers():
    made = machine("cpu-bf16")
    assert made.speeds("kronecker") == dict(made.kinds)["kronecker"] != made.factorised
    assert made.speeds("of a plug-in") == made.factorised != made.dense
    assert machine("cpu").speeds("kronecker") == machine("cpu").dense


def test_a_target_says_for_what_it_is():
    assert str(Target(machine("cpu"), 1)).startswith("1 token on cpu: two cores of")
    assert str(Target(machine("h100"), 4096)).startswith("4,096 tokens on h100: one NVIDIA H100")


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("cpu-b16", r"no machine is called 'cpu-b16'; did you mean 'cpu-bf16'\?"),
        ("../machines/cpu", "no machine is called"),
        ("none.toml", "there is no machine file none.toml"),
        ("", "no machine is called ''"),
    ],
)
def test_an_unknown_machine_is_named_with_its_nearest(which, message):
    with pytest.raises(UnknownNameError, match=message):
        machine(which)


def changed(path, value):
    """The default machine's data with another value at a path; None: without it."""
    data = copy.deepcopy(machine_to_data(machine()))
    *tables, key = path.split(".")
    inner = data
    for table in tables:
        inner = inner[table]
    if value is None:
        del inner[key]
    else:
        inner[key] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "error", "message"),
    [
        ("dense", None, OptionError, "mine lacks dense"),
        ("dense.single", None, OptionError, "mine: dense lacks single"),
        ("dense.single.half_m", -1, OptionError, "mine: dense.single: half_m is a number of at least 0, got -1"),
        ("dense.single.peak_macs_per_s", 0, OptionError, "peak_macs_per_s is a number above 0, got 0"),
        ("dense.gemm_call_s", float("nan"), OptionError, "gemm_call_s is a number above 0, got nan"),
        ("dense.gemm_call_s", True, OptionError, "gemm_call_s is a number above 0, got True"),
        ("dense.pass_call_s", "fast", OptionError, "pass_call_s is a number above 0, got 'fast'"),
        ("dense.call_s", 1.0, UnknownNameError, "mine: dense has a key 'call_s' that no machine has; did you mean"),
        ("dtype", "int8", OptionError, "mine: dtype is float32, bfloat16, float16, got 'int8'"),
        ("name", "", OptionError, "mine: name is a text, got ''"),
        ("kinds", 3, OptionError, "mine: kinds are tables, got 3"),
        ("kinds", {"kronecker": 3}, OptionError, "mine: kinds.kronecker is no table but 3"),
    ],
)
def test_malformed_machines_say_where(path, value, error, message):
    with pytest.raises(error, match=message):
        machine_from_data(changed(path, value), "mine")


@pytest.mark.parametrize("content", [b"name = [", b"\xff\xfe", b'"a'])
def test_a_file_that_is_no_toml_says_so(content, tmp_path):
    (tmp_path / "bad.toml").write_bytes(content)
    with pytest.raises(OptionError, match=r"bad\.toml is not TOML"):
        machine(tmp_path / "bad.toml")


def test_files_are_for_people_to_read():
    text = machine_text(machine("h100"))
    assert "peak_macs_per_s = 4.64e14\n" in text
    assert read_tables(text) == machine_to_data(machine("h100"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [1, 16, 128])
def test_a_layer_of_a_small_model_is_not_tiny(name, tokens):
    """384 x 384, MiniLM's: it must not become slower unasked."""
    made = machine(name)
    dense_s = made.dense.time_s(dense_operations(384, 384, tokens))
    assert made.is_slower(dense_s + 2 * made.notable_s + 1e-6, dense_s)
    assert not made.is_slower(dense_s, dense_s)
