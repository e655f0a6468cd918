"""Layers on a processor by a compiled kernel, where `build_kernels` has made one for this machine.

PyTorch needs a call, a meeting of all threads and a pass over memory for each product of a layer; the kernel
(`native.cpp`) does all of them for some tokens at a time, each thread alone, with what lies between in its cache. It
computes in float32 and, where the processor has units for it, in bfloat16, also where autocast says so, forward and
backward; in a compiled model that is not trained it is one operation. Everything else is PyTorch's: other types and
devices, transformations, exports.
"""

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from compresskit.core.autograd import narrow_type

Plan = tuple[int, ...]
"""Steps of a chain as the kernel reads them, four numbers each: see `last_axis`, `first_axis` and `swap`."""


HALF_LARGEST = 2**20
"""Numbers of a factor from which PyTorch's own products are as fast in bfloat16 or faster, ..."""
HALF_FEW, HALF_MANY = 64, 256
"""... unless at most so few rows, as `FEW_ROWS` in native_half.hpp, or at least so many are multiplied by it."""
WIDEST_TRAINED = 1536
"""Inputs up to which the kernel trains a layer in float32: measured on 2 cores, 16 to 1024 tokens; steps of wider ones
take up to 1.5 times as long as by PyTorch."""
HALF_DEPTH = 32
"""Numbers that the units add up at once; fewer have to be pairs. As `DEPTH` in native_tiles.hpp."""


@final
@dataclass(frozen=True)
class Native:
    """How the kernel does the products of a structure.

    Args:
        plan: the steps.
        factors: names of the factors in their order.
        backward: steps that give the same with less to compute again on the way back; none: the same ones.
        backward_factors: names in the order of these.
        half_backward: other steps with factors in that order, for bfloat16; none: the same ones.
        trains: whether layers in float32 are trained by the kernel, too.
        trains_half: the same in bfloat16.
    """

    plan: Plan
    factors: tuple[str, ...]
    backward: Plan = ()
    backward_factors: tuple[str, ...] = ()
    half_backward: Plan = ()
    trains: bool = False
    trains_half: bool = False

    def way_back(self, dtype: torch.dtype) -> Plan:
        """The steps that the kernel goes back."""
        half = () if dtype is torch.float32 else self.half_backward
        return half or self.backward or self.plan

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Of each factor of the way back, its place in `factors`."""
        return tuple(self.factors.index(name) for name in self.backward_factors or self.factors)

    @cached_property
    def _rows(self) -> int:
        """In how many rows products of the last axis cut a token at least."""
        return min((groups for kind, groups, _, _ in _steps(self.plan) if kind == LAST), default=1)

    @cached_property
    def _largest(self) -> int:
        """Numbers of the largest factor of the last axis."""
        return max((ins * outs for kind, _, ins, outs in _steps(self.plan) if kind == LAST), default=0)

    @cached_property
    def _fits(self) -> bool:
        """Whether the matrix units can add up over the sides of its factors."""
        return all(_pairs(ins) for kind, _, ins, _ in _steps(self.plan) if kind == LAST)

    @cached_property
    def _fits_back(self) -> bool:
        """The same on the way back, where they add up over both sides."""
        steps = _steps(self.way_back(torch.bfloat16))
        return self._fits and all(_pairs(side) for kind, _, *sides in steps if kind == LAST for side in sides)

    @cached_property
    def half_ever(self) -> bool:
        """Whether any number of tokens in bfloat16 is for the kernel, trained or not."""
        return self._fits or self.takes_half(1, training=True)

    def takes_half(self, tokens: int, *, training: bool = False) -> bool:
        """Whether so many tokens in bfloat16 are for the kernel; measured on 2 cores."""
        if training:
            return self.trains_half and self._fits_back
        rows = tokens * self._rows
        return self._fits and (self._largest < HALF_LARGEST or not HALF_FEW < rows < HALF_MANY)


LAST, FIRST, SWAP = range(3)
"""Kinds of steps, as in native.cpp."""


def _steps(plan: Plan) -> list[tuple[int, int, int, int]]:
    return [(plan[i], plan[i + 1], plan[i + 2], plan[i + 3]) for i in range(0, len(plan), 4)]


def _pairs(side: int) -> bool:
    return side % 2 == 0 or side >= HALF_DEPTH


def last_axis(groups: int, ins: int, outs: int) -> Plan:
    """(groups * ins) -> (groups * outs): each group times a factor (outs, ins), transposed."""
    return LAST, groups, ins, outs


def first_axis(ins: int, outs: int, width: int) -> Plan:
    """(ins, width) -> (outs, width): a factor (outs, ins) times the grid."""
    return FIRST, ins, outs, width


def swap(rows: int, cols: int) -> Plan:
    """(rows, cols) -> (cols, rows): the grid transposed, without a factor. Nothing where one side is 1."""
    return (SWAP, rows, cols, 0) if rows > 1 and cols > 1 else ()


@final
@dataclass(frozen=True)
class Calls:
    """What the kernel can be asked to do.

    Args:
        chain: an operation of PyTorch, for compilers and all that looks on.
        trained: the same that can be differentiated.
        now: the same as `chain`, for a call from Python where nothing looks on.
        trained_now: the same as `trained`, likewise.
        is_bare: whether a tensor is one on the processor, no subclass, and neither autocast nor anything else looks on.
    """

    chain: Callable[..., Tensor]
    trained: Callable[..., Tensor]
    now: Callable[..., Tensor]
    trained_now: Callable[..., Tensor]
    is_bare: Callable[[Tensor], bool]


@final
class Kernel:
    """The kernel of this process: loaded when it is first asked for, if there is one."""

    def __init__(self) -> None:
        self.allowed = True
        """`use_kernels` says so."""
        self._calls: Calls | None = None
        self._module: Any = None  # of calls from Python
        self.types: tuple[torch.dtype, ...] = ()
        """That it computes in on this processor, once it is loaded."""
        self._looked = False

    @property
    def loaded(self) -> bool:
        """Whether there is one; looks for it the first time."""
        self.look()
        return self._calls is not None

    @property
    def direct(self) -> bool:
        """Whether calls from Python do without PyTorch's dispatcher; so where Python's headers were there."""
        return self._module is not None

    def look(self) -> None:
        """Load it if there is one, the first time."""
        if self._looked or torch.compiler.is_compiling():
            return
        from compresskit.core.native_build import library_path

        path = library_path()
        self._looked = True
        if path.is_file():
            self.load(path)

    def load(self, path: Path) -> None:
        """Take the kernel from a file that `build_kernels` made; where that fails, PyTorch goes on computing.

        A process takes one once: what is compiled anew is for the next.
        """
        if not hasattr(torch.ops.compresskit, "chain"):
            try:
                torch.ops.load_library(str(path))
            except OSError as error:
                warnings.warn(f"layers run without the compiled kernel, which cannot be loaded: {error}", stacklevel=2)
                return
            self._module = _module(path)
            torch.library.register_fake("compresskit::chain", _chain_of_shapes)
        ops = torch.ops.compresskit
        self.types = (torch.float32, torch.bfloat16) if ops.half_products.default() else (torch.float32,)
        chain, trained = ops.chain.default, ops.trained.default
        module = self._module
        if module:
            self._calls = Calls(chain, trained, module.chain, module.trained, module.is_bare)
        else:
            self._calls = Calls(chain, trained, chain, trained, _unknown)
        self._looked = True

    def takes(self, x: Tensor) -> torch.dtype | None:
        """The type in which it may compute from this input now, autocast's where that is on.

        None where a transformation, an export or a mode looks on, and for types and devices that it does not know.
        """
        if not self.allowed or (self._calls is None and not self.loaded):
            return None
        compiling = torch.compiler.is_compiling()
        if not compiling and self._calls is not None and self._calls.is_bare(x):
            dtype = x.dtype
        elif type(x) is not Tensor or not x.is_cpu or (torch.compiler.is_exporting() if compiling else _is_watched()):
            return None
        else:
            dtype = narrow_type(x) if torch.is_autocast_enabled("cpu") else x.dtype
        return dtype if dtype in self.types else None

    def chain(
        self,
        x: Tensor,
        dtype: torch.dtype,
        factors: Sequence[Tensor],
        native: Native,
        bias: Tensor | None,
    ) -> Tensor | None:
        """x (..., cols) -> (..., rows), plus bias, in the type in which the kernel `takes` x.

        None where PyTorch is faster or trains the layer.

        Args:
            dtype: that type.
            factors: plain tensors on the device of x, in the order of the steps.

        Raises:
            RuntimeError: they are of another type or on another device.
        """
        training = torch.is_grad_enabled() and (
            x.requires_grad or any(f.requires_grad for f in factors) or (bias is not None and bias.requires_grad)
        )
        if training and (torch.compiler.is_compiling() or (dtype is torch.float32 and not native.trains)):
            return None
        if dtype is not torch.float32 and not native.takes_half(x.numel() // max(x.shape[-1], 1), training=training):
            return None
        calls = self._calls
        assert calls is not None, "`takes` has said a type"
        x = x if x.dtype is dtype else x.to(dtype)
        seen = torch.compiler.is_compiling() or torch._C._is_torch_function_mode_enabled()
        if training:
            trained = calls.trained if seen else calls.trained_now
            return trained(x, factors, native.plan, bias, native.way_back(dtype), native.order)
        if factors[0].dtype is not dtype and torch.is_autocast_enabled("cpu"):  # under which parameters are wider
            factors, bias = [factor.to(dtype) for factor in factors], None if bias is None else bias.to(dtype)
        return (calls.chain if seen else calls.now)(x, factors, native.plan, bias)


kernel = Kernel()
"""That of this process."""


def _chain_of_shapes(x: Tensor, factors: Sequence[Tensor], plan: Plan, bias: Tensor | None) -> Tensor:
    """What a compiler is told of the kernel: the shape of what it gives."""
    kind, a, b, c = plan[-4:]
    rows = {LAST: a * c, FIRST: b * c, SWAP: a * b}[kind]
    return x.new_empty((*x.shape[:-1], rows))


def _module(path: Path) -> Any:
    """The functions of a compiled kernel for calls from Python; None where it has none."""
    spec = importlib.util.spec_from_file_location("compresskit_chain", path)
    assert spec is not None
    try:
        return importlib.util.module_from_spec(spec)
    except ImportError:
        return None


def _unknown(_: Tensor) -> bool:
    """`Calls.is_bare` where nobody can say it in one call."""
    return False


def _is_watched() -> bool:
    """Whether PyTorch derives, transforms, counts or records what its own operations do."""
    return bool(
        torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() != 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )
