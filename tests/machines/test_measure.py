"""Measuring a machine: constants come back from times that were made with them, and layers are really timed."""

import math
import statistics

import pytest

import compresskit
from compresskit.core.cost import Gemm, Pass, Target
from compresskit.errors import OptionError
from compresskit.machines import closeness, machine, machine_from_data, machine_to_data, measure_machine
from compresskit.machines.measure import best_times_s, fit_speeds, single_operations


def test_constants_come_back_from_the_times_that_they_predict():
    """All that times depend on: other constants may say the same of what was measured."""
    truth, start = machine("cpu-bf16").dense, machine("cpu").dense
    works = [(operation,) for operation in single_operations()]
    found = fit_speeds({work: truth.time_s(work) for work in works}, start)
    works += [(Gemm(64, 512, 512), Pass(10_000)), (Gemm(500, 700, 900),)]  # in between what it was fitted to
    off = [abs(math.log(found.time_s(work) / truth.time_s(work))) for work in works]
    assert statistics.median(off) < 0.05
    assert max(off[:-2]) < 0.5
    assert max(off[-2:]) < 0.1


def test_a_machine_is_measured_by_running_layers():
    rounds = []
    found = measure_machine(
        "mine",
        methods=("kronecker", "svd"),
        shapes=((64, 96),),
        rounds=2,
        on_round=lambda done, total: rounds.append((done, total)),
    )
    assert rounds == [(1, 2), (2, 2)]
    assert (found.machine.name, found.machine.dtype) == ("mine", "float32")
    assert {kind for kind, _ in found.machine.kinds} == {"kronecker", "low-rank"}
    assert {layer[1:3] for layer in found.times_s} == {(64, 96)}
    assert all(seconds > 0 for seconds in found.times_s.values())
    assert sum(of.number for of in found.closeness.values()) == len(found.times_s)
    assert all(1 <= of.off_median <= of.off_90 for of in found.closeness.values())
    assert machine_from_data(machine_to_data(found.machine), "here") == found.machine


@pytest.mark.parametrize(("dtype", "device"), [("int8", "cpu"), ("float32", "tpu"), ("float32", "cuda:99")])
def test_what_cannot_be_measured_says_so(dtype, device):
    with pytest.raises(OptionError, match=dtype if dtype == "int8" else device):
        measure_machine("mine", dtype, device=device)


def test_each_call_is_made_in_each_round():
    calls = []
    times = best_times_s({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert set(times) == {"a", "b"}
    assert calls.count("a") > 6


def test_closeness_counts_what_plans_permit_and_is_slower():
    made = machine("cpu")
    structure = next(s for s in compresskit.decomposition("svd").menu(768, 768) if s.rank == 8)
    plain, layer = (None, 768, 768, 128), (structure, 768, 768, 128)
    dense_s = made.dense.time_s([Gemm(128, 768, 768)])
    expected_s = made.speeds("low-rank").time_s(structure.operations(128))
    assert expected_s < dense_s
    right = closeness(made, {plain: dense_s, layer: expected_s})
    assert right["low-rank"].faster_but_slower == 0
    assert right["low-rank"].off_90 == pytest.approx(1)
    wrong = closeness(made, {plain: dense_s, layer: 2 * dense_s})
    assert wrong["low-rank"].faster_but_slower == 1
    assert wrong["low-rank"].off_median == pytest.approx(2 * dense_s / expected_s)
    assert Target(made).tokens == 128
