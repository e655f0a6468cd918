"""The checks of weighted fits catch what they are there for: one sound decomposition, and broken ones."""

from dataclasses import dataclass

import pytest
import torch

from compresskit.core.decomposition import Decomposition, Fitted
from compresskit.core.importance import Importance
from compresskit.testing import CHECKS
from tests.core.toy import ToyAnalysis, ToyDecomposition

WEIGHTED = {name: check for name, check in CHECKS.items() if name.startswith("weighted")}
BROKEN = []


class AwareAnalysis(ToyAnalysis):
    """The truncated SVD of the whitened weight, with the roots taken off again."""

    def __init__(self, weight, importance):
        self.metric, self.dtype = importance.metric(weight), weight.dtype
        super().__init__(self.metric.rows.root().before(self.metric.cols.root().after(weight.double())))

    def squared_errors(self, structures):
        return [self.metric.scale * error for error in super().squared_errors(structures)]

    def factors(self, structure):
        found = super().factors(structure)
        left = self.metric.rows.inverse_root().before(found["left"])
        right = self.metric.cols.inverse_root().after(found["right"])
        return {"left": left.to(self.dtype), "right": right.to(self.dtype)}


@dataclass(frozen=True)
class AwareToy(ToyDecomposition):
    """Sound: it passes every check."""

    def analyse_weighted(self, weight, importance):
        return AwareAnalysis(weight, importance)


def broken(check, match, *, base=AwareToy, analysis=None, **methods):
    """List a decomposition that differs from the sound one in these methods, and the check that must catch it."""
    if analysis:
        kind = type("BrokenAnalysis", (AwareAnalysis,), analysis)
        methods["analyse_weighted"] = lambda self, weight, importance: kind(weight, importance)
    cls = dataclass(frozen=True)(type("Broken", (base,), methods))
    BROKEN.append(pytest.param(check, cls, match, id=f"{check}-{len(BROKEN)}"))


def refit(change):
    """A `fit` that changes what the sound one returns."""

    def fit(self, weight, *, ratio=None, structure=None, importance=None):
        return change(Decomposition.fit(self, weight, ratio=ratio, structure=structure, importance=importance))

    return fit


def reported(change):
    return refit(lambda f: Fitted(f.structure, f.factors, f.relative_error, change(f.weighted_error)))


def replaced(change):
    def changed(fitted):
        factors = {**fitted.factors, "left": change(fitted.factors["left"])}
        return Fitted(fitted.structure, factors, fitted.relative_error, fitted.weighted_error)

    return refit(changed)


def sound(self, structure):
    return AwareAnalysis.factors(self, structure)


def scaled(factor):
    """Factors of which one is multiplied."""
    return {"factors": lambda self, s: {**sound(self, s), "left": factor(self) * sound(self, s)["left"]}}


broken("weighted-better", "inputs: weighted_error is None", fit=reported(lambda error: None))
broken("weighted-better", "inputs: weighted_error differs", fit=reported(lambda error: error and error / 2))
broken("weighted-better", "weighted error .*, that of the plain fit", analysis=scaled(lambda self: 1.3))
unaware = {"analyse_weighted": lambda self, weight, importance: self.analyse(weight)}
broken("weighted-price", "priced at .*, measured", **unaware)
half = {"squared_errors": lambda self, s: [error / 2 for error in AwareAnalysis.squared_errors(self, s)]}
broken("weighted-price", "inputs: priced at .*, measured", analysis=half)
broken("weighted-price", "no structures have no prices", analysis={"squared_errors": lambda self, s: [1e9]})
endless = {"squared_errors": lambda self, s: [float("inf")] * len(s)}
broken("weighted-price", "priced at inf", analysis=endless)
broken("weighted-identity", "the identity as importance", analysis=scaled(lambda self: 1.3))
sized = scaled(lambda self: 1 + 0.5 * (self.metric.scale > 1e3))
broken("weighted-scale", "times 1e\\+06 fits otherwise", analysis=sized)
divided = scaled(lambda self: self.metric.scale / self.metric.scale)
broken("weighted-zero", "ZeroDivisionError", analysis=divided)
broken("weighted-zero", "weighted error 1", fit=reported(lambda error: 1.0))
lost = {"factors": lambda self, s: {k: v / (self.metric.scale > 0) for k, v in sound(self, s).items()}}
broken("weighted-zero", "no input: factor 'left' is not finite", analysis=lost, fit=reported(lambda error: 0.0))
broken("weighted-factors", "of a torch.bfloat16 weight is of torch.float32", fit=replaced(lambda t: t.float()))
broken("weighted-factors", "the fit returns", fit=replaced(lambda t: t[1:].contiguous()))
broken("weighted-factors", "is not contiguous", fit=replaced(lambda t: t.repeat_interleave(2, 1)[:, ::2]))
views = {"factors": lambda self, s: {**sound(self, s), "left": torch.cat([sound(self, s)["left"]] * 2)[: s.rows]}}
broken("weighted-factors", "bytes alive", analysis=views)


def before(action):
    """An `analyse_weighted` that does something else first."""

    def analyse_weighted(self, weight, importance):
        action(weight, importance)
        return AwareAnalysis(weight, importance)

    return analyse_weighted


broken("weighted-factors", "writes the torch.float32 weight", analyse_weighted=before(lambda weight, _: weight.mul_(2)))
doubled = before(lambda _, importance: importance.cols.mul_(2))
broken("weighted-factors", "the fit writes the importance", analyse_weighted=doubled)
drawn = scaled(lambda self: 1 + 1e-3 * torch.rand(()))
broken("weighted-determinism", "'left' differs between two fits", analysis=drawn)


def careless(self, weight, *, ratio=None, structure=None, importance=None):
    return Decomposition.fit(self, weight, ratio=ratio, structure=structure)


broken("weighted-refusals", "25 columns for 24 raised no ImportanceError", fit=careless)


def forgiving(self, weight, *, ratio=None, structure=None, importance=None):
    """Checks the importance and then leaves it out."""
    importance.check(*weight.shape)
    return Decomposition.fit(self, weight, structure=structure)


broken("weighted-refusals", "without a data-aware fit raised no OptionError", base=ToyDecomposition, fit=forgiving)


@pytest.mark.parametrize("check", WEIGHTED)
@pytest.mark.parametrize("decomposition", [AwareToy, ToyDecomposition])
def test_the_sound_ones_pass(check, decomposition):
    WEIGHTED[check](decomposition())


@pytest.mark.parametrize(("check", "decomposition", "match"), BROKEN)
def test_a_broken_one_is_caught(check, decomposition, match):
    with pytest.raises(AssertionError, match=match):
        WEIGHTED[check](decomposition())


def test_every_check_has_something_to_catch():
    assert {case.values[0] for case in BROKEN} == set(WEIGHTED)


def test_the_sound_one_is_data_aware():
    assert AwareToy.is_data_aware()
    assert AwareToy().fit(torch.eye(6), ratio=1.5, importance=Importance(torch.ones(6))).weighted_error is not None
