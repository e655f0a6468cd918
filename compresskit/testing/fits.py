"""Checks of the fit: its error, its price, its size, and that it leaves everything else alone."""

import functools
import random

import numpy as np
import tensorly
import torch
from torch import nn

from compresskit.core.decomposition import Decomposition
from compresskit.errors import BudgetError, WeightError
from compresskit.testing.cases import (
    ROUND_SHAPES,
    Case,
    blaming,
    each_shape,
    each_structure,
    expect,
    expect_close,
    expect_raises,
    sample_weight,
    spread,
    surroundings,
)


@each_structure()
def factors(case: Case) -> None:
    """Factors have the promised names and shapes, are contiguous, finite, and each owns its memory."""
    weight = nn.Parameter(case.weight())
    fitted = case.fit(weight)
    expect(fitted.structure == case.structure, f"asked for, but {fitted.structure} came back")
    wanted = {name: spec.shape for name, spec in case.structure.factor_specs().items()}
    found = {name: tuple(tensor.shape) for name, tensor in fitted.factors.items()}
    expect(found == wanted, f"factor_specs says {wanted}, the fit returns {found}")
    memory = {weight.untyped_storage().data_ptr(): "the weight"}
    for name, tensor in fitted.factors.items():
        expect(tensor.is_contiguous(), f"factor {name!r} is not contiguous")
        expect(bool(tensor.isfinite().all()), f"factor {name!r} is not finite")
        expect(tensor.dtype == weight.dtype, f"factor {name!r} is of {tensor.dtype}, the weight of {weight.dtype}")
        expect(not tensor.requires_grad, f"factor {name!r} carries the history of its fit")
        owner = memory.setdefault(tensor.untyped_storage().data_ptr(), f"factor {name!r}")
        expect(owner == f"factor {name!r}", f"factor {name!r} shares memory with {owner}")
    for name, tensor in fitted.factors.items():
        surplus = tensor.untyped_storage().nbytes() - tensor.numel() * tensor.element_size()
        expect(surplus == 0, f"factor {name!r} keeps {surplus} bytes alive that are not its own")


@each_structure()
def price(case: Case) -> None:
    """The error that was priced before the fit is finite and not below the one measured after it."""
    for dtype, slack in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        weight = case.weight(dtype)
        energy = float(weight.double().square().sum())
        analysis = case.decomposition.analyse(weight)
        expect(analysis.squared_errors([]) == [], "no structures have no prices")
        (priced,) = analysis.squared_errors([case.structure])
        measured = case.fit(weight).relative_error ** 2 * energy
        expect(
            measured <= priced + slack * energy and priced < float("inf"),
            f"priced at a squared error of {priced:g} for {dtype}, measured {measured:g}",
        )


@each_structure()
def error(case: Case) -> None:
    """The reported error is the one of the matrix that `matmul` multiplies by."""
    weight = case.weight(torch.float64)
    fitted = case.fit(weight)
    matrix = case.structure.matmul(torch.eye(case.structure.cols, dtype=torch.float64), fitted.factors).T
    expected = torch.linalg.matrix_norm(weight - matrix) / torch.linalg.matrix_norm(weight)
    expect_close(torch.tensor(fitted.relative_error, dtype=torch.float64), expected, "relative_error differs")
    expect(fitted.relative_error <= 1 + 1e-9, f"the fit is worse than zero: relative error {fitted.relative_error:g}")


@each_structure(shapes=ROUND_SHAPES)
def exact(case: Case) -> None:
    """A weight that is exactly of this structure is recovered, if the decomposition says that it can."""
    if not case.decomposition.recovers(case.structure):
        return
    weight = case.structure.dense(case.factors())
    error = case.fit(weight).relative_error
    expect(error < 1e-6, f"a weight of exactly this structure is fitted with relative error {error:g}")


@each_shape
def monotone(decomposition: Decomposition, rows: int, cols: int) -> None:
    """The largest structure of the menu fits no worse than the smallest."""
    ends = spread(decomposition, rows, cols, lookup=False, count=2)
    weight = sample_weight(rows, cols, torch.float64)
    errors = [decomposition.fit(weight, structure=structure).relative_error for structure in ends]
    if errors:
        expect(
            errors[-1] <= errors[0] + 1e-9,
            f"the largest, {ends[-1]}, has relative error {errors[-1]:g}, the smallest, {ends[0]}, {errors[0]:g}",
        )


@each_shape
def ratio(decomposition: Decomposition, rows: int, cols: int) -> None:
    """`fit(ratio=...)` keeps at most 1 / ratio of the parameters, and says BudgetError where no structure does."""
    sizes = [structure.num_params for structure in decomposition.menu(rows, cols)]
    highest = [0.999 * rows * cols / min(sizes)] if sizes else []
    weight = sample_weight(rows, cols)
    for asked in (1.0, 1.5, 3.0, *highest, float(rows * cols)):
        if asked < 1:
            continue
        budget = rows * cols / asked
        if any(size <= budget for size in sizes):
            kept = sum(tensor.numel() for tensor in decomposition.fit(weight, ratio=asked).factors.values())
            expect(kept <= budget, f"ratio {asked:g} leaves {budget:g} parameters, {kept} were kept")
        else:
            refused = f"ratio {asked:g}, which no structure of the menu reaches,"
            expect_raises(BudgetError, refused, functools.partial(decomposition.fit, weight, ratio=asked))


@each_structure(count=2)
def determinism(case: Case) -> None:
    """The same weight gives the same factors bit by bit, whatever the global generators and torch's defaults are."""
    with surroundings(seed=1, dtype=torch.float32, grad=True):
        first = case.fit().factors
    with surroundings(seed=2, dtype=torch.float64, grad=False):
        second = case.fit().factors
    for name, tensor in first.items():
        expect(torch.equal(tensor, second[name]), f"factor {name!r} differs between two fits of one weight")


@each_structure(count=2)
def global_state(case: Case) -> None:
    """A fit leaves the random generators, torch's defaults and tensorly's backend as they were."""
    for seed, dtype, grad in ((1, torch.float32, True), (2, torch.float64, False)):
        with surroundings(seed=seed, dtype=dtype, grad=grad):
            before = _global_state()
            case.fit()
            for what, state in _global_state().items():
                expect(state == before[what], f"the fit changes {what}")


def _global_state() -> dict[str, object]:
    return {
        "torch's random generator": torch.get_rng_state().tolist(),
        "numpy's random generator": str(np.random.get_state()),
        "Python's random generator": random.getstate(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's gradient mode": torch.is_grad_enabled(),
        "torch's number of threads": torch.get_num_threads(),
        "tensorly's backend": tensorly.get_backend(),
    }


@each_structure(count=2)
def weight_untouched(case: Case) -> None:
    """Neither pricing nor fitting writes the weight."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        weight = case.weight(dtype)
        before = weight.clone()
        case.fit(weight)
        expect(torch.equal(weight, before), f"the fit writes the {dtype} weight")


@each_structure(count=2)
def strides(case: Case) -> None:
    """A transposed view (the weight of a Conv1D) is fitted like the same matrix laid out by rows."""
    weight = case.weight(torch.float64)
    view = weight.T.contiguous().T
    wanted, found = case.fit(weight), case.fit(view)
    expect_close(
        case.structure.dense(found.factors), case.structure.dense(wanted.factors), "a transposed view fits otherwise"
    )


@each_structure(count=2)
def scale(case: Case) -> None:
    """The fit of c * W has the relative error of the fit of W, for c from 1e-6 to 1e6."""
    wanted = torch.tensor(case.fit().relative_error)
    for factor in (1e-6, 1e6):
        found = torch.tensor(case.fit(case.weight() * factor).relative_error)
        expect_close(found, wanted, f"the weight times {factor:g} fits otherwise", rtol=1e-3, atol=1e-5)


@each_structure(count=2)
def zero(case: Case) -> None:
    """The zero matrix has error 0 and finite factors."""
    fitted = case.fit(torch.zeros(case.structure.rows, case.structure.cols))
    expect(fitted.relative_error == 0, f"the zero matrix has relative error {fitted.relative_error}")
    for name, tensor in fitted.factors.items():
        expect(bool(tensor.isfinite().all()), f"factor {name!r} of the zero matrix is not finite")


@each_structure(count=2)
def dtypes(case: Case) -> None:
    """Factors have the dtype of the weight; half precision is fitted as well as the same numbers in float32."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        weight = case.weight(dtype)
        fitted = case.fit(weight)
        for name, tensor in fitted.factors.items():
            expect(tensor.dtype == dtype, f"factor {name!r} of a {dtype} weight is of {tensor.dtype}")
        wide = case.fit(weight.to(torch.promote_types(dtype, torch.float32))).relative_error
        expect(fitted.relative_error == wide, f"{dtype} has error {fitted.relative_error:g}, widened first {wide:g}")


def bad_weights(decomposition: Decomposition) -> None:
    """What is not a finite real matrix is refused with WeightError."""
    matrix = sample_weight(24, 24)
    nan, infinite = matrix.clone(), matrix.clone()
    nan[3, 5], infinite[3, 5] = float("nan"), -float("inf")
    bad = {
        "a weight with NaN": nan,
        "a weight with infinity": infinite,
        "a weight with NaN in float16": nan.half(),
        "a vector": matrix[0],
        "a tensor of order 3": matrix[None],
        "a weight without rows": matrix[:0],
        "a weight without columns": matrix[:, :0],
        "an integer weight": matrix.long(),
        "a boolean weight": matrix > 0,
        "a complex weight": matrix + 1j * matrix,
    }
    for what, weight in bad.items():
        with blaming(f"{decomposition}"):
            expect_raises(WeightError, what, functools.partial(decomposition.fit, weight, ratio=2))
