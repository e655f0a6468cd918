"""Checks of weighted fits: worth their name, priced from above, sound where the importance says little or nothing."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from compresskit.core.decomposition import Decomposition, Fitted
from compresskit.core.importance import Importance
from compresskit.errors import ImportanceError, OptionError
from compresskit.testing.cases import (
    Case,
    blaming,
    each_structure,
    expect,
    expect_close,
    expect_raises,
    normal,
    sample_weight,
    spread,
    surroundings,
)

SLACK = 1e-5
"""Share of the energy by which figures may differ: ten times the ridge that fits add."""
OPTIMA = 1.01
"""Alternating fits end in optima of their own: so many times the plain fit's weighted error is still no worse."""


def importances(rows: int, cols: int) -> dict[str, Importance]:
    """Seeded ones of every kind: of many samples and of few, of one side and of both, with zeros."""
    many, few = normal(cols, 3 * cols, seed=11), normal(cols, max(cols // 4, 1), seed=12)
    outputs, frequencies = normal(rows, 2 * rows, seed=13), normal(rows, seed=14).square()
    inputs = many @ many.T / many.shape[1]
    return {
        "inputs": Importance(inputs.float()),
        "few samples": Importance(few @ few.T),
        "a diagonal of inputs": Importance(inputs.diagonal() * (torch.arange(cols) > 0)),
        "frequencies of rows": Importance(rows=frequencies * (torch.arange(rows) > 0)),
        "inputs and outputs": Importance(inputs, outputs @ outputs.T / outputs.shape[1]),
    }


def _aware(check: Callable[[Case], None]) -> Callable[[Case], None]:
    """Decorator: a structure that is fitted by a decomposition without data-aware fit passes."""

    @functools.wraps(check)
    def run(case: Case) -> None:
        if case.decomposition.fitter(case.structure).is_data_aware():
            check(case)

    return run


def _fit(case: Case, importance: Importance, weight: Tensor | None = None) -> Fitted:
    weight = case.weight(torch.float64) if weight is None else weight
    return case.decomposition.fit(weight, structure=case.structure, importance=importance)


def _error_of(case: Case, importance: Importance, weight: Tensor, fitted: Fitted) -> float:
    """The relative weighted error, from the matrix that `matmul` multiplies by."""
    eye = torch.eye(case.structure.cols, dtype=weight.dtype)
    difference = weight - case.structure.matmul(eye, fitted.factors).T
    return float((importance.squared_norm(difference) / importance.squared_norm(weight)) ** 0.5)


def _each_importance(case: Case) -> dict[str, Importance]:
    return importances(case.structure.rows, case.structure.cols)


@each_structure()
@_aware
def better(case: Case) -> None:
    """The weighted error is the one reported, and not above that of the plain fit."""
    weight = case.weight(torch.float64)
    plain = case.fit(weight)
    for name, importance in _each_importance(case).items():
        fitted = _fit(case, importance)
        reported = fitted.weighted_error
        expect(reported is not None, f"{name}: weighted_error is None")
        error, unaware = (_error_of(case, importance, weight, one) for one in (fitted, plain))
        what = f"{name}: weighted_error differs"
        expect_close(torch.tensor(reported), torch.tensor(error), what, rtol=1e-6, atol=1e-6)
        expect(
            error <= OPTIMA * unaware + SLACK, f"{name}: weighted error {error:g}, that of the plain fit {unaware:g}"
        )


@each_structure()
@_aware
def price(case: Case) -> None:
    """The weighted error that was priced is finite and not below the one measured after the fit."""
    for dtype in (torch.float64, torch.float32):
        weight = case.weight(dtype)
        for name, importance in _each_importance(case).items():
            analysis = case.decomposition.analyse_for(weight, importance)
            expect(analysis.squared_errors([]) == [], f"{name}: no structures have no prices")
            (priced,) = analysis.squared_errors([case.structure])
            fitted = case.decomposition.fit_analysed(weight, analysis, case.structure, importance)
            energy = importance.squared_norm(weight)
            measured = _error_of(case, importance, weight, fitted) ** 2 * energy
            expect(
                measured <= priced + SLACK * energy and priced < float("inf"),
                f"{name}: priced at {priced:g} for {dtype}, measured {measured:g}",
            )


@each_structure(count=2)
@_aware
def identity(case: Case) -> None:
    """An importance that is the identity written out fits as well as none."""
    plain = case.fit(case.weight(torch.float64)).relative_error
    rows, cols = case.structure.rows, case.structure.cols
    for importance in (Importance(torch.eye(cols)), Importance(torch.ones(cols), 3 * torch.ones(rows))):
        found = _fit(case, importance)
        expect(
            found.relative_error <= OPTIMA * plain + SLACK,
            f"with the identity as importance the relative error is {found.relative_error:g}, without {plain:g}",
        )


@each_structure(count=2)
@_aware
def scale(case: Case) -> None:
    """Neither the unit of the weight nor that of the importance changes the relative weighted error."""
    for name, importance in _each_importance(case).items():
        wanted = torch.tensor(_fit(case, importance).weighted_error)
        for unit in (1e-6, 1e6):
            cols, rows = (None if m is None else m * unit for m in (importance.cols, importance.rows))
            scaled = Importance(cols, rows)
            what = f"{name}: times {unit:g} fits otherwise"
            found = torch.tensor(_fit(case, scaled, case.weight(torch.float64) * unit).weighted_error)
            expect_close(found, wanted, what, rtol=1e-3, atol=1e-4)


@each_structure(count=2)
@_aware
def zero(case: Case) -> None:
    """Where nothing was seen, or the weight is zero, the weighted error is 0 and the factors are finite."""
    rows, cols = case.structure.rows, case.structure.cols
    nothing = torch.zeros(rows, cols, dtype=torch.float64)
    seen = _each_importance(case)["inputs"]
    cases = (
        ("no input", Importance(torch.zeros(cols, cols)), None),
        ("no frequency", Importance(rows=torch.zeros(rows)), None),
        ("the zero matrix", seen, nothing),
    )
    for name, importance, weight in cases:
        fitted = _fit(case, importance, weight)
        expect(fitted.weighted_error == 0, f"{name}: weighted error {fitted.weighted_error}")
        for factor, tensor in fitted.factors.items():
            expect(bool(tensor.isfinite().all()), f"{name}: factor {factor!r} is not finite")


@each_structure(count=2)
@_aware
def factors(case: Case) -> None:
    """Factors have the promised shapes and the dtype of the weight, and own their memory; nothing else is written."""
    wanted = {name: spec.shape for name, spec in case.structure.factor_specs().items()}
    for name, importance in _each_importance(case).items():
        moments = [m for m in (importance.cols, importance.rows) if m is not None]
        before = [moment.clone() for moment in moments]
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            weight = case.weight(dtype)
            fitted = _fit(case, importance, weight)
            found = {factor: tuple(tensor.shape) for factor, tensor in fitted.factors.items()}
            expect(found == wanted, f"{name}: factor_specs says {wanted}, the fit returns {found}")
            for factor, tensor in fitted.factors.items():
                expect(tensor.dtype == dtype, f"{name}: factor {factor!r} of a {dtype} weight is of {tensor.dtype}")
                expect(tensor.is_contiguous(), f"{name}: factor {factor!r} is not contiguous")
                surplus = tensor.untyped_storage().nbytes() - tensor.numel() * tensor.element_size()
                expect(surplus == 0, f"{name}: factor {factor!r} keeps {surplus} bytes alive that are not its own")
            expect(torch.equal(weight, case.weight(dtype)), f"{name}: the fit writes the {dtype} weight")
        for moment, copy in zip(moments, before, strict=True):
            expect(torch.equal(moment, copy), f"{name}: the fit writes the importance")


@each_structure(count=2)
@_aware
def determinism(case: Case) -> None:
    """One weight and one importance give one fit bit by bit, whatever the generators and torch's defaults are."""
    for name, importance in _each_importance(case).items():
        with surroundings(seed=1, dtype=torch.float32, grad=True):
            first = _fit(case, importance).factors
        with surroundings(seed=2, dtype=torch.float64, grad=False):
            second = _fit(case, importance).factors
        for factor, tensor in first.items():
            expect(torch.equal(tensor, second[factor]), f"{name}: factor {factor!r} differs between two fits")


def refusals(decomposition: Decomposition) -> None:
    """An importance of another layer is refused, and any where there is no data-aware fit."""
    with blaming(decomposition):
        weight = sample_weight(24, 24)
        for structure in spread(decomposition, 24, 24, lookup=False)[:1]:
            fit = functools.partial(decomposition.fit, weight, structure=structure)
            other = functools.partial(fit, importance=Importance(torch.ones(25)))
            expect_raises(ImportanceError, "an importance of 25 columns for 24", other)
            if not decomposition.is_data_aware():
                any_importance = functools.partial(fit, importance=Importance(torch.ones(24)))
                expect_raises(OptionError, "an importance without a data-aware fit", any_importance)
