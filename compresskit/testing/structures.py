"""Checks of the arithmetic: the menu, JSON, and what a structure computes with its factors."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compresskit.core.cost import Gemm
from compresskit.core.decomposition import Decomposition
from compresskit.core.native import Plan
from compresskit.core.registry import structure_from_json
from compresskit.core.structure import Structure, empty_factors
from compresskit.errors import CheckpointError
from compresskit.machines import machine
from compresskit.testing.cases import (
    SHAPES,
    Case,
    blaming,
    count_work,
    each_structure,
    expect,
    expect_close,
    expect_raises,
    normal,
)

_DAMAGE: tuple[Any, ...] = (None, "8", 1.5, True, -1, 0, [], [0], [[]], 2**40)


def menu(decomposition: Decomposition) -> None:
    """The menu offers structures of the right class and shape, each once, the same ones every time."""
    offered = 0
    for rows, cols in SHAPES:
        for lookup in (False, True):
            with blaming(f"{decomposition} ({rows} x {cols}, lookup={lookup})"):
                structures = list(decomposition.menu(rows, cols, lookup=lookup))
                for structure in structures:
                    _check_offer(decomposition, structure, rows, cols)
                expect(len(set(structures)) == len(structures), "the menu offers a structure twice")
                again = list(decomposition.menu(rows, cols, lookup=lookup))
                expect(again == structures, "the menu offers something else when it is asked again")
                offered += 0 if lookup else len(structures)
    shapes = ", ".join(f"{rows} x {cols}" for rows, cols in SHAPES)
    expect(offered > 0, f"{decomposition}: the menu is empty for all of {shapes}, so nothing can be checked")


def _check_offer(decomposition: Decomposition, structure: Structure, rows: int, cols: int) -> None:
    expect(
        isinstance(structure, decomposition.structures),
        f"the menu offers {structure}, whose class is not listed in {type(decomposition).__name__}.structures",
    )
    found = (structure.rows, structure.cols)
    expect(found == (rows, cols), f"the menu offers {structure} for {found[0]} x {found[1]}")


@each_structure()
def json_round_trip(case: Case) -> None:
    """A structure survives JSON; damaged JSON gives a CheckpointError or another sound structure."""
    data = json.loads(json.dumps(case.structure.to_json()))
    expect(structure_from_json(data) == case.structure, f"JSON gave back {structure_from_json(data)}")
    fields = [key for key in data if key != "kind"]
    for field in fields:
        short = {key: value for key, value in data.items() if key != field}
        expect_raises(CheckpointError, f"JSON without {field!r}", structure_from_json, short)
        for value in _DAMAGE:
            with blaming(f"JSON with {field}={value!r}"):
                _check_damaged({**data, field: value})
    expect_raises(CheckpointError, "JSON with a surplus field", structure_from_json, {**data, "surplus": 1})


def _check_damaged(data: dict[str, Any]) -> None:
    try:
        structure = structure_from_json(data)
    except CheckpointError:
        return
    empty_factors(structure, dtype=torch.float32, device="meta")
    expect(structure_from_json(structure.to_json()) == structure, f"{structure} came out, which JSON changes again")


@each_structure()
def matmul(case: Case) -> None:
    """`matmul` is `x @ dense.T + bias` for any leading sizes, none and zero included, and for any strides."""
    structure, factors = case.structure, case.factors()
    rows, cols = structure.rows, structure.cols
    dense = structure.dense(factors)
    expect(tuple(dense.shape) == (rows, cols), f"dense has shape {tuple(dense.shape)}")
    inputs = {
        f"x of shape {(*lead, cols)}": normal(*lead, cols) for lead in ((), (5,), (2, 3), (0,), (2, 0), (2, 1, 3))
    }
    inputs["x with transposed tokens"] = normal(3, 2, cols).transpose(0, 1)
    inputs["x with strided features"] = normal(5, 2 * cols)[:, ::2]
    inputs["x expanded"] = normal(1, cols).expand(4, cols)
    bias = normal(rows, seed=4)
    for what, x in inputs.items():
        with blaming(what):
            expect_close(structure.matmul(x, factors), x @ dense.T, "matmul differs from x @ dense.T")
            expect_close(structure.matmul(x, factors, bias), x @ dense.T + bias, "matmul with bias differs")


@each_structure()
def native(case: Case) -> None:
    """The plans for the compiled kernel, if there are any, are `x @ dense.T`, step for step."""
    found, factors = case.structure.native, case.factors()
    if found is None:
        return
    x = normal(5, case.structure.cols)
    wanted = x @ case.structure.dense(factors).T
    back = found.backward_factors or found.factors
    plans = {
        "plan": (found.plan, found.factors),
        "plan of the way back": (found.way_back(torch.float32), back),
        "plan of the way back in bfloat16": (found.way_back(torch.bfloat16), back),
    }
    for what, (plan, names) in plans.items():
        expect(sorted(names) == sorted(factors), f"the {what} has factors {names}, the structure {(*factors,)}")
        expect_close(
            _by_plan(x, plan, [factors[name] for name in names]), wanted, f"the {what} differs from x @ dense.T"
        )


def _by_plan(x: Tensor, plan: Plan, factors: Sequence[Tensor]) -> Tensor:
    """What the compiled kernel does, by PyTorch; x (tokens, cols)."""
    left = iter(factors)
    for kind, a, b, c in zip(*[iter(plan)] * 4, strict=True):
        if kind == 2:
            x = x.view(-1, a, b).mT.reshape(-1, a * b)
        elif kind == 0:
            x = (x.view(-1, a, b) @ next(left).view(c, b).T).reshape(-1, a * c)
        else:
            x = (next(left).view(b, a) @ x.view(-1, a, c)).view(-1, b * c)
    return x


@each_structure()
def take_rows(case: Case) -> None:
    """`take_rows` is `dense[index]` for any shape of index, scalar and empty included, of int32 or int64."""
    structure, factors = case.structure, case.factors()
    dense = structure.dense(factors)
    every = torch.arange(structure.rows)
    some = torch.randint(structure.rows, (4, 3), generator=torch.Generator().manual_seed(0))
    for index in (every, every.flip(0).int(), some, some.T, every[-1], every[:0], some[:, :0]):
        with blaming(f"index of shape {tuple(index.shape)} and {index.dtype}"):
            expect_close(structure.take_rows(index, factors), dense[index], "take_rows differs from dense[index]")


@each_structure(lookups=(True,))
def out_of_range(case: Case) -> None:
    """An index below 0 or beyond the last row raises IndexError, as nn.Embedding does, and returns no other row."""
    rows, factors = case.structure.rows, case.factors()
    for row in (rows, rows + 1, 2 * rows, -1):
        expect_raises(IndexError, f"row {row}", case.structure.take_rows, torch.tensor([0, row]), factors)


@each_structure()
def macs(case: Case) -> None:
    """`macs` is exactly what matrix products and elementwise products compute in `matmul` for one token."""
    factors = empty_factors(case.structure, dtype=torch.float32, device="meta")
    for tokens in (1, 6):
        x = torch.empty(tokens, case.structure.cols, device="meta")
        work = count_work(case.structure.matmul, x, factors)
        counted = work.matrix + work.elementwise
        expect(
            case.structure.macs * tokens == counted,
            f"macs says {case.structure.macs:,} multiply-adds per token, {counted:,} were counted for {tokens}",
        )


@each_structure()
def operations(case: Case) -> None:
    """`operations` does the multiply-adds that `macs` says, as far as whole sizes allow, and takes some time."""
    structure = case.structure
    for tokens in (1, 6):
        steps = structure.operations(tokens)
        said = sum(step.macs for step in steps if isinstance(step, Gemm))
        expect(
            abs(said - structure.macs * tokens) <= tokens * (structure.rows + structure.cols),
            f"operations do {said:,} multiply-adds for {tokens} tokens, macs says {structure.macs:,} for each",
        )
        for what, found in (("operations", steps), ("lookup_operations", structure.lookup_operations(tokens))):
            seconds = machine().speeds(structure.kind).time_s(found)
            expect(0 < seconds < 1, f"{what}({tokens}) would take {seconds} s")


@each_structure()
def lookup_macs(case: Case) -> None:
    """`lookup_macs` covers the matrix products in `take_rows`, and claims no more than those and elementwise products.

    Elementwise products may be left out where the structure regards them as scaling.
    """
    factors = empty_factors(case.structure, dtype=torch.float32, device="meta")
    for tokens in (1, 6):
        index = torch.empty(tokens, dtype=torch.int64, device="meta")
        work = count_work(case.structure.take_rows, index, factors)
        claimed = case.structure.lookup_macs * tokens
        expect(
            work.matrix <= claimed <= work.matrix + work.elementwise,
            f"lookup_macs says {case.structure.lookup_macs:,} multiply-adds per token; counted for {tokens}: "
            f"{work.matrix:,} in matrix products and {work.elementwise:,} elementwise",
        )


@each_structure(count=2)
def gradients(case: Case) -> None:
    """Gradients of `matmul` and `take_rows` agree with finite differences in float64, and reach every factor."""
    names = list(case.structure.factor_specs())
    tensors = [tensor.requires_grad_() for tensor in case.factors().values()]
    index = torch.arange(case.structure.rows)
    x = normal(2, case.structure.cols).requires_grad_()

    def multiply(x: Tensor, *factors: Tensor) -> Tensor:
        return case.structure.matmul(x, dict(zip(names, factors, strict=True)))

    def look_up(*factors: Tensor) -> Tensor:
        return case.structure.take_rows(index, dict(zip(names, factors, strict=True)))

    for what, y in (("matmul", multiply(x, *tensors)), ("take_rows", look_up(*tensors))):
        found = torch.autograd.grad(y, tensors, normal(*y.shape, seed=5), allow_unused=True)
        for name, grad in zip(names, found, strict=True):
            expect(grad is not None and bool(grad.any()), f"{what} passes no gradient to {name!r}")
    good = torch.autograd.gradcheck(multiply, (x, *tensors), raise_exception=False, fast_mode=True)
    expect(good, "the gradient of matmul differs from finite differences")
    good = torch.autograd.gradcheck(look_up, tuple(tensors), raise_exception=False, fast_mode=True)
    expect(good, "the gradient of take_rows differs from finite differences")
