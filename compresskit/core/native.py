"""Chains of small products on a processor by a compiled kernel, where `build_kernels` has made one for this machine.

PyTorch needs a call, a meeting of all threads and a pass over memory for each product of a chain; the kernel
(`native.cpp`) does all of them for some tokens at a time, each thread alone, with what lies between in its cache. It
computes in float32 and without gradients: forward passes, also those of training. Everything else is PyTorch's.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

Plan = tuple[int, ...]
"""Steps of a chain as the kernel reads them, four numbers each: see `last_axis`, `first_axis` and `swap`."""

Native = tuple[Plan, tuple[str, ...]]
"""A plan, and the names of the factors in the order of its steps."""


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
        self._op: Any = None
        self._looked = False

    @property
    def loaded(self) -> bool:
        """Whether there is one; looks for it the first time."""
        if not self._looked:
            from compresskit.core.native_build import library_path

            path = library_path()
            self._looked = True
            if path.is_file():
                self.load(path)
        return self._op is not None

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
        self._op, self._looked = torch.ops.compresskit.chain.default, True

    def ready(self) -> bool:
        """Whether it may compute now: not where PyTorch has to derive or a compiler looks on."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not self.allowed:
            return False
        return self._op is not None or (not self._looked and self.loaded)

    def chain(self, x: Tensor, factors: Sequence[Tensor], plan: Plan, bias: Tensor | None) -> Tensor | None:
        """x (..., cols) -> (..., rows) by the steps of a plan, plus bias; None where PyTorch has to.

        Only when `ready`.

        Args:
            factors: plain tensors of the type and on the device of x, in the order of the steps.

        Raises:
            RuntimeError: they are of another.
        """
        if x.dtype is not torch.float32 or not x.is_cpu or type(x) is not Tensor:
            return None
        if torch.is_autocast_enabled("cpu") or torch._C._get_tracing_state() is not None or _is_watched():
            return None
        y: Tensor = self._op(x, factors, plan, bias)
        return y


kernel = Kernel()
"""That of this process."""


def _is_watched() -> bool:
    """Whether PyTorch derives, transforms, counts or records what its own operations do."""
    return bool(
        torch._C._len_torch_dispatch_stack() != 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )
