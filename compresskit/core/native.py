"""Layers on a processor by a compiled kernel, where `build_kernels` has made one for this machine.

PyTorch needs a call, a meeting of all threads and a pass over memory for each product of a layer; the kernel
(`native.cpp`) does all of them for some tokens at a time, each thread alone, with what lies between in its cache. It
computes in float32, forward and backward, and in bfloat16 forward where the processor has units for it; in a compiled
model it is one operation. Everything else is PyTorch's: other types and devices, transformations, exports.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

Plan = tuple[int, ...]
"""Steps of a chain as the kernel reads them, four numbers each: see `last_axis`, `first_axis` and `swap`."""


HALF_LARGEST = 2**20
"""Numbers of a factor from which PyTorch's own products are as fast in bfloat16, ..."""
HALF_FEW = 64
"""... unless so few rows are multiplied by it; as `FEW_ROWS` in native_half.hpp."""
HALF_PLAIN = 256
"""Tokens from which PyTorch is as fast at products with nothing between them."""


@final
@dataclass(frozen=True)
class Native:
    """How the kernel does the products of a structure.

    Args:
        plan: the steps.
        factors: names of the factors in their order.
        backward: steps that give the same with less to compute again on the way back; None: PyTorch trains the layer.
        backward_factors: names in the order of these.
    """

    plan: Plan
    factors: tuple[str, ...]
    backward: Plan | None = None
    backward_factors: tuple[str, ...] = ()

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Of each factor of the way back, its place in `factors`."""
        return tuple(self.factors.index(name) for name in self.backward_factors)

    @cached_property
    def _products(self) -> tuple[bool, bool, int, int]:
        """Of the last axis: whether they are all there is, of whole tokens; whether the matrix units are good at them;
        numbers of the largest factor, and in how many rows they cut a token at least."""
        steps = list(zip(*(self.plan[k::4] for k in range(4)), strict=True))
        last = [(rows, ins, outs) for kind, rows, ins, outs in steps if kind == 0]
        plain = len(last) == len(steps) and all(rows == 1 for rows, _, _ in last)
        good = all(ins % 16 == 0 if plain else ins % 2 == 0 and (ins % 8 == 0 or ins < 64) for _, ins, _ in last)
        return plain, good, max((i * o for _, i, o in last), default=0), min((r for r, _, _ in last), default=1)

    def takes_half(self, tokens: int) -> bool:
        """Whether so many tokens in bfloat16 are for the kernel.

        Measured: rows that end oddly within a tile of the matrix units are multiplied up to ten times as slowly;
        factors that no cache holds, and plain products of many tokens, as fast by PyTorch.
        """
        plain, good, numbers, rows = self._products
        return good and (tokens * rows <= HALF_FEW or (numbers < HALF_LARGEST and not (plain and tokens > HALF_PLAIN)))


Product = Callable[..., Tensor]
"""`product(x, bias, *factors)` by PyTorch."""


def last_axis(groups: int, ins: int, outs: int) -> Plan:
    """(groups * ins) -> (groups * outs): each group times a factor (outs, ins), transposed."""
    return 0, groups, ins, outs


def first_axis(ins: int, outs: int, width: int) -> Plan:
    """(ins, width) -> (outs, width): a factor (outs, ins) times the grid."""
    return 1, ins, outs, width


def swap(rows: int, cols: int) -> Plan:
    """(rows, cols) -> (cols, rows): the grid transposed, without a factor. Nothing where one side is 1."""
    return (2, rows, cols, 0) if rows > 1 and cols > 1 else ()


@final
class Kernel:
    """The kernel of this process: loaded when it is first asked for, if there is one."""

    def __init__(self) -> None:
        self.allowed = True
        """`use_kernels` says so."""
        self._ops: Any = None
        self.types: tuple[torch.dtype, ...] = ()
        """That it computes in on this processor, once it is loaded."""
        self._looked = False

    @property
    def loaded(self) -> bool:
        """Whether there is one; looks for it the first time."""
        self.look()
        return self._ops is not None

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
            torch.library.register_fake("compresskit::chain", _chain_of_shapes)
        ops = torch.ops.compresskit
        self.types = (torch.float32, torch.bfloat16) if ops.half_products.default() else (torch.float32,)
        self._ops, self._looked = (ops.chain.default, ops.chain_backward.default), True

    def takes(self, x: Tensor) -> bool:
        """Whether it may compute from this input now: not where a transformation, an export or a mode looks on."""
        if not self.allowed or (self._ops is None and not self.loaded):
            return False
        if x.dtype not in self.types or not x.is_cpu or type(x) is not Tensor or torch.is_autocast_enabled("cpu"):
            return False
        if torch.compiler.is_compiling():
            return not torch.compiler.is_exporting()
        return not (torch._C._get_tracing_state() is not None or _is_watched())

    def chain(
        self, x: Tensor, factors: Sequence[Tensor], native: Native, bias: Tensor | None, product: Product
    ) -> Tensor | None:
        """x (..., cols) -> (..., rows), plus bias, for an x that it `takes` (in bfloat16 `native.takes_half` too).

        None where PyTorch trains the layer.

        Args:
            factors: plain tensors of the type and on the device of x, in the order of the steps.
            product: the same by PyTorch, for derivatives of derivatives.

        Raises:
            RuntimeError: they are of another type or on another device.
        """
        y: Tensor
        if torch.is_grad_enabled() and (
            x.requires_grad or any(f.requires_grad for f in factors) or (bias is not None and bias.requires_grad)
        ):
            if native.backward is None or x.dtype is not torch.float32 or torch.compiler.is_compiling():
                return None
            y = _Chain.apply(self._ops, native, product, x, bias, *factors)  # type: ignore[no-untyped-call]
        else:
            y = self._ops[0](x, factors, native.plan, bias)
        return y


kernel = Kernel()
"""That of this process."""


def _chain_of_shapes(x: Tensor, factors: Sequence[Tensor], plan: Plan, bias: Tensor | None) -> Tensor:
    """What a compiler is told of the kernel: the shape of what it gives."""
    kind, a, b, c = plan[-4:]
    rows = {0: a * c, 1: b * c, 2: a * b}[kind]
    return x.new_empty((*x.shape[:-1], rows))


class _Chain(torch.autograd.Function):
    """A chain that keeps its input and its factors, and computes the rest again."""

    @staticmethod
    def forward(
        ctx: Any, ops: Any, native: Native, product: Product, x: Tensor, bias: Tensor | None, *factors: Tensor
    ) -> Tensor:
        ctx.ops, ctx.native, ctx.product = ops, native, product
        ctx.save_for_backward(x, bias, *factors)
        y: Tensor = ops[0](x, factors, native.plan, bias)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, bias, *factors = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled() or grad.dtype is not torch.float32 or _is_watched():
            return None, None, None, *_derived(ctx.product, grad, (x, bias, *factors), needs)
        order = ctx.native.order
        turned = [factors[i] for i in order]
        wanted = (*needs[:2], *(needs[2 + i] for i in order))
        found = ctx.ops[1](grad, x, turned, ctx.native.backward, wanted)
        gradients = [*found[:2], *(found[2 + order.index(i)] for i in range(len(order)))]
        return None, None, None, *(value if need else None for value, need in zip(gradients, needs, strict=True))


def _derived(product: Product, grad: Tensor, inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Any]:
    """Gradients by PyTorch, which can be differentiated again where that is wanted."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        wanted = [tensor for tensor, need in zip(inputs, needs, strict=True) if need and tensor is not None]
        found = iter(torch.autograd.grad(product(*inputs), wanted, grad, create_graph=again))
    return [next(found) if need else None for need in needs]


def _is_watched() -> bool:
    """Whether PyTorch derives, transforms, counts or records what its own operations do."""
    return bool(
        torch._C._len_torch_dispatch_stack() != 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )
