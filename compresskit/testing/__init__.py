"""The conformance suite: what every decomposition must keep, shipped so that plug-ins can run it too.

In the tests of a plug-in, one test per check and per set of options:

    @pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
    def test_conformance(check):
        check(MyDecomposition())

or all at once: `check_decomposition(MyDecomposition())`. A check raises AssertionError that names the structure
and what broke; whatever else goes wrong inside a decomposition is turned into one. Weights are tiny and seeded,
so a failure comes back at every run. The decomposition must be registered (`@register`), or its JSON cannot be
read back.
"""

from collections.abc import Mapping
from types import MappingProxyType

from compresskit.core.decomposition import Decomposition
from compresskit.testing import fits, inputs, modules, structures, weighted
from compresskit.testing.cases import Check

__all__ = ["CHECKS", "check_decomposition"]

CHECKS: Mapping[str, Check] = MappingProxyType(
    {
        "menu": structures.menu,
        "json": structures.json_round_trip,
        "matmul": structures.matmul,
        "native": structures.native,
        "take-rows": structures.take_rows,
        "out-of-range": structures.out_of_range,
        "macs": structures.macs,
        "operations": structures.operations,
        "lookup-macs": structures.lookup_macs,
        "gradients": structures.gradients,
        "backward": inputs.backward,
        "twice": inputs.twice,
        "half": inputs.half,
        "own-rows": inputs.own_rows,
        "factors": fits.factors,
        "price": fits.price,
        "error": fits.error,
        "exact": fits.exact,
        "monotone": fits.monotone,
        "ratio": fits.ratio,
        "determinism": fits.determinism,
        "global-state": fits.global_state,
        "weight-untouched": fits.weight_untouched,
        "strides": fits.strides,
        "scale": fits.scale,
        "zero": fits.zero,
        "dtypes": fits.dtypes,
        "bad-weights": fits.bad_weights,
        "weighted-better": weighted.better,
        "weighted-price": weighted.price,
        "weighted-identity": weighted.identity,
        "weighted-scale": weighted.scale,
        "weighted-zero": weighted.zero,
        "weighted-factors": weighted.factors,
        "weighted-determinism": weighted.determinism,
        "weighted-refusals": weighted.refusals,
        "wrong-shapes": inputs.wrong_shapes,
        "size": modules.size,
        "like-linear": modules.like_linear,
        "like-conv1d": modules.like_conv1d,
        "like-embedding": modules.like_embedding,
        "state-dict": modules.state_dict,
        "deepcopy": modules.deepcopy,
        "autocast": modules.autocast,
        "export": modules.export,
        "compile": modules.compile_,
    }
)
"""Every check by name, in the order in which a failure tells most."""


def check_decomposition(decomposition: Decomposition | type[Decomposition]) -> None:
    """Run every check on a decomposition, or on a class with its default options.

    Raises:
        AssertionError: the first broken check; the message names it, the structure, and what was found.
    """
    instance = decomposition() if isinstance(decomposition, type) else decomposition
    for name, check in CHECKS.items():
        try:
            check(instance)
        except AssertionError as error:
            raise AssertionError(f"check {name!r}: {error}") from error
