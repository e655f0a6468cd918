"""The cost model: times add up, fall and rise as they must, and do not depend on where they are computed."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

import compresskit
from compresskit import Gemm, Pass, Rates, Speeds
from compresskit.core.cost import dense_lookup_operations, dense_operations
from compresskit.decompositions.kronecker import KroneckerSum
from compresskit.decompositions.svd import LowRank
from compresskit.decompositions.tensor_train import TrainCores
from compresskit.decompositions.tucker import TuckerTensor
from compresskit.machines import machine
from tests.core.toy import Toy

SIZES = st.integers(1, 5000)
PLAIN = Rates(1e9, 0, 0, 0)
BY_HAND = Speeds(PLAIN, PLAIN, PLAIN, 7.0, 2.0, 1.0, 4.0, 8.0, 2.0, element_bytes=4)
CPU = machine("cpu").dense


def test_times_by_hand():
    assert BY_HAND.time_s([]) == 7
    assert BY_HAND.time_s([Pass(6), Pass(6, strided=True)]) == 7 + 1 + 3 + 1 + 12
    assert BY_HAND.time_s([Gemm(2, 3, 5)]) == pytest.approx(7 + 2 + 30e-9 + 10 + 15 + 6)
    assert BY_HAND.time_s([Gemm(2, 3, 5, batch=7)]) == pytest.approx(7 + 2 + 210e-9 + 10 + 7 * 15 + 7 * 6)
    half = dataclasses.replace(BY_HAND, element_bytes=2)
    assert half.time_s([Pass(6)]) == 7 + 1 + 1.5
    assert Rates(1e9, 2, 3, 5).time_s(Gemm(2, 3, 5)) == pytest.approx(8 * 30e-9)  # half the rate on each side


def test_a_product_with_a_vector_and_a_batch_have_rates_of_their_own():
    other = dataclasses.replace(BY_HAND, vector=Rates(1.0, 0, 0, 0), batched=Rates(2.0, 0, 0, 0))
    assert other.time_s([Gemm(1, 3, 5)]) - BY_HAND.time_s([Gemm(1, 3, 5)]) == pytest.approx(15)
    assert other.time_s([Gemm(1, 3, 5, batch=2)]) - BY_HAND.time_s([Gemm(1, 3, 5, batch=2)]) == pytest.approx(15)
    assert other.time_s([Gemm(2, 3, 5)]) == BY_HAND.time_s([Gemm(2, 3, 5)])


@given(SIZES, SIZES, st.integers(2, 5000), SIZES)
def test_more_work_takes_longer(rows, cols, tokens, more):
    def dense(*sizes):
        return CPU.time_s(dense_operations(*sizes))

    time_s = dense(rows, cols, tokens)
    assert time_s > CPU.gemm_call_s
    assert (
        min(dense(rows + more, cols, tokens), dense(rows, cols + more, tokens), dense(rows, cols, tokens + more))
        > time_s
    )
    assert CPU.time_s(dense_lookup_operations(cols + more, tokens)) > CPU.time_s(dense_lookup_operations(cols, tokens))


def test_large_layers_run_near_the_peak_and_narrow_ones_do_not():
    wide, narrow = Gemm(1024, 4096, 4096), Gemm(1024, 2, 4096)
    assert wide.macs / CPU.time_s([wide]) > 0.8 * CPU.single.peak_macs_per_s
    assert narrow.macs / CPU.time_s([narrow]) < 0.2 * CPU.single.peak_macs_per_s


@pytest.mark.parametrize(
    ("structure", "expected"),
    [
        (LowRank(64, 32, 4), [Gemm(10, 4, 32), Gemm(10, 64, 4)]),
        (
            KroneckerSum(64, 32, (2, 4), (32, 8), 3),  # mixes first: the sum of 3 terms is one wide product
            [Gemm(6, 8, 4, batch=10), Gemm(20, 32, 24), Pass(1280)],
        ),
        (
            KroneckerSum(64, 32, (8, 4), (8, 8), 2),  # the wide factor first
            [Gemm(40, 16, 8), Gemm(8, 8, 8, batch=10), Pass(1280)],
        ),
        (
            KroneckerSum(64, 32, (32, 8), (2, 4), 1),
            [Pass(640, strided=True), Gemm(2, 8, 4, batch=10), Gemm(20, 32, 8), Pass(1280, strided=True), Pass(1280)],
        ),
        (
            TuckerTensor(64, 32, (8, 8), (1, 32), (4, 8), (1, 6)),
            [Gemm(10, 6, 32), Gemm(10, 32, 6), Gemm(8, 8, 4, batch=10), Pass(1280)],
        ),
        (
            TrainCores(64, 32, (8, 8), (4, 8), (4, 6, 5)),
            [Gemm(40, 5, 8), Gemm(10, 6, 20), Gemm(10, 32, 6), Gemm(8, 8, 4, batch=10), Pass(1280)],
        ),
    ],
    ids=lambda value: str(value) if not isinstance(value, list) else "",
)
def test_operations_by_hand(structure, expected):
    assert list(structure.operations(10)) == expected
    assert sum(step.macs for step in expected if isinstance(step, Gemm)) == 10 * structure.macs


def test_a_structure_that_says_nothing_gets_two_products_of_its_multiply_adds():
    assert list(Toy(64, 32, 4).operations(10)) == [Gemm(10, 4, 32), Gemm(10, 64, 4)]
    assert list(Toy(64, 32, 4).lookup_operations(10)) == [Pass(80), Gemm(10, 32, 4)]


@pytest.mark.parametrize("method", compresskit.methods())
def test_large_factorised_layers_are_expected_to_be_faster_the_smaller_they_are(method):
    """Of the smallest and the largest quarter of each menu, compared by their medians."""
    menu = sorted(compresskit.decomposition(method).menu(768, 768), key=lambda structure: structure.macs)
    times = [CPU.time_s(structure.operations(128)) for structure in menu]
    quarter = len(times) // 4
    low, high = sorted(times[:quarter])[quarter // 2], sorted(times[-quarter:])[quarter // 2]
    assert low < CPU.time_s(dense_operations(768, 768, 128))
    assert low < high
