"""What single operations take here, and the constants that predict them. Imports torch: import it late."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from scipy.optimize import least_squares
from torch.nn import functional as F

from compresskit import Gemm, Machine, Pass, Rates

SAMPLE_S = 3e-4
"""A call is repeated until a sample takes this long, so that the clock does not matter."""
SIDES = (8, 32, 96, 256, 768, 3072)
TOKENS = (1, 16, 128, 1024)
MIXES = ((2, 384, 2), (4, 192, 4), (8, 96, 8), (16, 48, 16), (2, 384, 16), (16, 384, 2), (16, 192, 1), (8, 384, 8))
"""m, n, k of the products that a token has of its own."""
GRIDS = ((2, 384), (8, 96), (16, 48), (384, 8))
MAX_MACS = 5e8
WIDEST = float(np.log(100))
"""How far a constant may move from where the search starts, as a logarithm."""

LEAST = 1e-7
"""Where the search for a constant starts that is zero."""

Call = Callable[[], object]
Operation = Gemm | Pass


def best_times_s(calls: Mapping[Any, Call], rounds: int) -> dict[Any, float]:
    """Least time of each call over rounds in which they take turns: whatever else the machine does only adds to it."""
    best: dict[Any, float] = {}
    repeats: dict[Any, int] = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, round(SAMPLE_S / _time(call, 1)))
    for _ in range(rounds):
        for name, call in calls.items():
            best[name] = min(best.get(name, np.inf), _time(call, repeats[name]))
    return best


def _time(call: Call, repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return max(time.perf_counter() - started, 1e-9) / repeats


def single_operations() -> dict[Operation, Call]:
    """A grid of operations, each with a call that does just this."""
    calls: dict[Operation, Call] = {}
    for m, n, k in itertools.product(TOKENS, SIDES, SIDES):
        if m * n * k <= MAX_MACS:
            calls[Gemm(m, n, k)] = _product(torch.randn(m, k), torch.randn(n, k))
    for (m, n, k), batch in itertools.product(MIXES, TOKENS[1:]):
        calls[Gemm(m, n, k, batch=batch)] = _mixing(torch.randn(m, k), torch.randn(batch, k, n))
    for (a, b), tokens in itertools.product(GRIDS, TOKENS):
        grid = torch.randn(tokens, a, b)
        calls[Pass(2 * grid.numel(), strided=True)] = _transposition(grid)
        calls[Pass(2 * grid.numel())] = _copy(grid)
    return calls


def _product(x: torch.Tensor, weight: torch.Tensor) -> Call:
    return lambda: F.linear(x, weight)


def _mixing(small: torch.Tensor, grid: torch.Tensor) -> Call:
    return lambda: torch.matmul(small, grid)


def _transposition(grid: torch.Tensor) -> Call:
    return lambda: grid.mT.contiguous()


def _copy(grid: torch.Tensor) -> Call:
    return lambda: grid.clone()


def fit_machine(measured: Mapping[Operation, float], start: Machine) -> Machine:
    """The constants whose predictions are nearest, by the logarithm of the ratio; outliers count less."""
    operations, times = list(measured), np.log(list(measured.values()))

    def miss(logs: Any) -> Any:
        machine = _machine(np.exp(logs))
        return np.log([machine.time_s([operation]) for operation in operations]) - times

    begin = np.log(np.maximum(_constants(start), LEAST))
    found = least_squares(miss, begin, bounds=(begin - WIDEST, begin + WIDEST), loss="soft_l1", f_scale=0.3)
    return _machine(np.exp(found.x))


def _constants(machine: Machine) -> list[float]:
    """The constants as one list, of vector products without `half_m`, which has no meaning there."""
    vector = machine.vector
    return [
        *dataclasses.astuple(machine.single),
        *dataclasses.astuple(machine.batched),
        *(vector.peak_macs_per_s, vector.half_n, vector.half_k),
        *(machine.call_s, machine.gemm_bytes_per_s, machine.pass_bytes_per_s, machine.strided_bytes_per_s),
    ]


def _machine(constants: Any) -> Machine:
    numbers = [float(constant) for constant in constants]
    peak, half_n, half_k = numbers[8:11]
    return Machine(Rates(*numbers[:4]), Rates(*numbers[4:8]), Rates(peak, 0.0, half_n, half_k), *numbers[11:])
