"""What an error says of the ratio that was asked for."""

import math

import pytest

from compresskit.surgery.limits import shortest_ratio


@pytest.mark.parametrize("total", [22_713_216, 109_482_240, 6_812_943])
@pytest.mark.parametrize("asked", [1.5, 4, 7.7, 19, 40, 300, 5000])
def test_the_ratio_that_was_asked_for_is_found_again(total, asked):
    assert shortest_ratio(total, math.floor(total / asked)) == asked


def test_any_number_of_parameters_has_a_ratio_that_leaves_it():
    total = 1_000_003
    for left in range(1, 3000, 7):
        assert math.floor(total / shortest_ratio(total, left)) == left
    assert shortest_ratio(total, 0) == math.inf
