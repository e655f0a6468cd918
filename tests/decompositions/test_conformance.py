"""Every registered decomposition keeps every promise of the conformance suite; a new one is tested unasked."""

import pytest

from compresskit.core.registry import decomposition, decompositions
from compresskit.testing import CHECKS

VARIANTS = {
    "kronecker": ({"terms": "2"}, {"small": "right"}, {"small": "both", "terms": "3"}, {"left": "2x2"}),
    "svd": ({"solver": "randomized"}, {"rank": "2"}),
    "tucker": ({"fold": "cols"}, {"heads": "4", "sweeps": "0"}, {"ranks": "2x3x2"}),
    "tensor-train": ({"ranks": "2x3x2"},),
    "monarch": ({"blocks": "4x4"}, {"blocks": "1x2", "rank": "2"}),
    "blast": ({"blocks": "4x2"}, {"blocks": "2x1", "rank": "2", "rounds": "0"}),
}
"""Options beside the defaults that are worth a run."""

CASES = [
    pytest.param(name, options, id=" ".join([name, *(f"{key}={value}" for key, value in options.items())]))
    for name in decompositions()
    for options in ({}, *VARIANTS.get(name, ()))
]


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("check", CHECKS)
def test_conformance(check, name, options):
    CHECKS[check](decomposition(name, options))


def test_variants_name_registered_decompositions():
    assert set(VARIANTS) <= set(decompositions())
