"""What the checks run on: structures spread over the menu, seeded weights and factors, and an exact count of work."""

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from compresskit.core.decomposition import Decomposition, Fitted
from compresskit.core.structure import Structure, empty_factors

Check = Callable[[Decomposition], None]

ROUND_SHAPES = ((24, 24), (32, 12), (16, 36))
"""Square, tall and wide, with many divisors: no structure has to pad."""
SHAPES = (*ROUND_SHAPES, (53, 12), (3, 2))
"""The round ones, a prime number of rows as a vocabulary may have, and a tiny one."""
SPREAD = 4


@final
@dataclass(frozen=True)
class Case:
    """One structure of a decomposition's menu.

    Args:
        decomposition: with its options.
        structure: taken from its menu.
        lookup: true if the menu was the one for embeddings.
    """

    decomposition: Decomposition
    structure: Structure
    lookup: bool

    def __str__(self) -> str:
        menu = "embedding menu, " if self.lookup else ""
        return f"{self.decomposition}: {self.structure} ({menu}{self.structure.rows} x {self.structure.cols})"

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A seeded weight (rows, cols) of the structure's shape."""
        return sample_weight(self.structure.rows, self.structure.cols, dtype)

    def factors(self, dtype: torch.dtype = torch.float64, *, seed: int = 1) -> dict[str, Tensor]:
        """Seeded normal factors of the structure."""
        return {
            name: normal(*tensor.shape, dtype=dtype, seed=seed + i)
            for i, (name, tensor) in enumerate(empty_factors(self.structure, dtype=dtype, device="meta").items())
        }

    def fit(self, weight: Tensor | None = None) -> Fitted:
        """The fit of this structure to `weight`, or to the seeded float32 weight."""
        return self.decomposition.fit(self.weight() if weight is None else weight, structure=self.structure)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal numbers from a generator of their own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sample_weight(rows: int, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A seeded weight (rows, cols) whose spectrum decays, as that of a trained layer does."""
    short = min(rows, cols)
    decay = torch.arange(1, short + 1, dtype=torch.float64).pow(-0.7)
    return (normal(rows, short, seed=2) * decay @ normal(short, cols, seed=3) / short).to(dtype)


def spread(decomposition: Decomposition, rows: int, cols: int, *, lookup: bool, count: int = SPREAD) -> list[Structure]:
    """Up to `count` structures of the menu, from the one with the fewest parameters to the one with the most."""
    menu = sorted(decomposition.menu(rows, cols, lookup=lookup), key=lambda structure: structure.num_params)
    steps = max(count - 1, 1)
    return [menu[i] for i in sorted({(len(menu) - 1) * step // steps for step in range(count)})] if menu else []


def each_structure(
    *,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    lookups: Sequence[bool] = (False, True),
    count: int = SPREAD,
) -> Callable[[Callable[[Case], None]], Check]:
    """Decorator: make a check of one case a check of a decomposition, over `count` structures for each shape."""

    def decorate(check: Callable[[Case], None]) -> Check:
        @functools.wraps(check)
        def run(decomposition: Decomposition) -> None:
            for rows, cols in shapes:
                for lookup in lookups:
                    for structure in spread(decomposition, rows, cols, lookup=lookup, count=count):
                        case = Case(decomposition, structure, lookup)
                        with blaming(case):
                            check(case)

        return run

    return decorate


def each_shape(check: Callable[[Decomposition, int, int], None]) -> Check:
    """Decorator: make a check of one shape a check of a decomposition, over all shapes."""

    @functools.wraps(check)
    def run(decomposition: Decomposition) -> None:
        for rows, cols in SHAPES:
            with blaming(f"{decomposition} ({rows} x {cols})"):
                check(decomposition, rows, cols)

    return run


@contextmanager
def blaming(where: object) -> Iterator[None]:
    """Turn whatever goes wrong inside into an AssertionError that says where."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{where}: {error}") from error
    except Exception as error:
        raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error


@contextmanager
def surroundings(*, seed: int, dtype: torch.dtype, grad: bool) -> Iterator[None]:
    """Seed all global generators, set torch's default dtype and gradient mode; all is put back afterwards."""
    numpy_state, python_state, default = np.random.get_state(), random.getstate(), torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(grad):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
            torch.set_default_dtype(default)


def expect(condition: bool, message: str) -> None:
    """Raise AssertionError, also under `python -O`."""
    if not condition:
        raise AssertionError(message)


def expect_close(actual: Tensor, expected: Tensor, what: str, *, rtol: float = 1e-9, atol: float = 1e-9) -> None:
    """`torch.testing.assert_close` with a message that starts with `what`."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, msg=lambda found: f"{what}: {found}")


def expect_raises(kind: type[Exception], what: str, action: Callable[..., object], *args: Any) -> None:
    """Raise AssertionError unless `action(*args)` raises an error of this kind."""
    try:
        action(*args)
    except kind:
        return
    raise AssertionError(f"{what} raised no {kind.__name__}")


@final
@dataclass(frozen=True)
class Work:
    """Multiply-adds that ran: in matrix products, and as elementwise products of floating-point tensors."""

    matrix: int
    elementwise: int


def count_work(action: Callable[..., object], *args: Any) -> Work:
    """What `action(*args)` computes; on meta tensors it costs nothing."""
    products = _Products()
    with FlopCounterMode(display=False) as flops, products:
        action(*args)
    return Work(flops.get_total_flops() // 2, products.total)


class _Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mul.Tensor, torch.ops.aten.mul_.Tensor) and result.is_floating_point():
            self.total += result.numel()
        return result


def num_params(module: nn.Module) -> int:
    """Parameters of a module, each counted once."""
    return sum(parameter.numel() for parameter in module.parameters())
