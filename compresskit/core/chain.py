"""Chains of products: `x @ W.T` as small products one after the other, and what training keeps of them.

A dense layer keeps its input for the backward pass. PyTorch's own derivatives of a chain keep what every product reads,
up to 14 times as much. Here the input is kept, of what lies between at most half as much, and the rest is computed
again: never the last product, and never what leads to an intermediate that is kept.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from compresskit.core.autograd import is_traced, narrow, with_signature
from compresskit.core.native import WIDEST_TRAINED, Native, Plan, first_axis, last_axis
from compresskit.core.structure import Factor, linear, plain_matrix, tensor_of
from compresskit.errors import StructureError

MOST_TRAINED = 130_000
"""Multiply-adds for a token up to which the compiled kernel trains a layer of at most `WIDEST_TRAINED` inputs: a step
takes .7 to 1.05 times as long as by PyTorch's operations, beyond up to 1.7."""
MOST_TRAINED_HALF = 150_000
"""The same in bfloat16: .5 to .95 times as long, beyond up to 2.4."""
FEW_BYTES = 2**16
"""Between products all is kept if it is at most this large: PyTorch's derivatives take less calls than ours."""


@dataclass(frozen=True)
class Step(ABC):
    """One product: linear in what comes in, and in its factor. Only the first step's input and the last one's output
    have to be (tokens, features); what lies between has the layout that the next product reads.

    Args:
        factor: its name.
        numbers: that come out, for each token.
        macs: multiply-adds for each token.
    """

    factor: str

    @property
    @abstractmethod
    def numbers(self) -> int: ...

    @property
    @abstractmethod
    def macs(self) -> int: ...

    @property
    def native_plan(self) -> Plan | None:
        """The step for the compiled kernel; None if it has none of this kind."""
        return None

    @abstractmethod
    def run(self, x: Tensor, factor: Factor, bias: Tensor | None = None) -> Tensor:
        """The product, plus bias (numbers,) where it is the last one."""

    @abstractmethod
    def input_grad(self, grad: Tensor, factor: Tensor) -> Tensor:
        """Gradient of what came in, from that of what came out."""

    @abstractmethod
    def factor_grad(self, grad: Tensor, x: Tensor) -> Tensor:
        """Gradient of the factor, from that of what came out and what came in."""


@final
@dataclass(frozen=True)
class LastAxis(Step):
    """(..., groups * ins) -> (..., groups * outs): each group times factor (outs, ins) transposed."""

    groups: int
    ins: int
    outs: int

    @property
    def numbers(self) -> int:
        return self.groups * self.outs

    @property
    def macs(self) -> int:
        return self.groups * self.ins * self.outs

    @property
    def native_plan(self) -> Plan:
        return last_axis(self.groups, self.ins, self.outs)

    def run(self, x: Tensor, factor: Factor, bias: Tensor | None = None) -> Tensor:
        if self.groups == 1:
            return linear(x, factor, bias)
        y = linear(x.reshape(*x.shape[:-1], self.groups, self.ins), factor).flatten(-2)
        return y if bias is None else y + bias.to(y.dtype)  # under autocast y is narrower

    def input_grad(self, grad: Tensor, factor: Tensor) -> Tensor:
        return torch.mm(grad.reshape(-1, self.outs), factor).reshape(-1, self.groups * self.ins)

    def factor_grad(self, grad: Tensor, x: Tensor) -> Tensor:
        return torch.mm(grad.reshape(-1, self.outs).t(), x.reshape(-1, self.ins))


@final
@dataclass(frozen=True)
class FirstAxis(Step):
    """(..., ins * width) -> (..., outs * width): factor (outs, ins) times a grid, without a transposed copy.

    Measured against `torch.matmul`, which transposes the grid there and back to make one product of it: 3 x faster
    forward, 2 x with the backward pass (factor 24 x 18 and 48 x 24; 16 to 4096 tokens). The bias goes into the
    product, because a sum of its own would be one more pass over fresh memory.
    """

    ins: int
    outs: int
    width: int

    @property
    def numbers(self) -> int:
        return self.outs * self.width

    @property
    def macs(self) -> int:
        return self.ins * self.outs * self.width

    @property
    def native_plan(self) -> Plan:
        return first_axis(self.ins, self.outs, self.width)

    def run(self, x: Tensor, factor: Factor, bias: Tensor | None = None) -> Tensor:
        small, plane = tensor_of(factor), None if bias is None else bias.view(self.outs, self.width)
        if x.numel() == self.ins * self.width and not is_traced():  # one token: fewer calls
            grid = x.reshape(self.ins, self.width)
            y = torch.mm(small, grid) if plane is None else torch.addmm(plane, small, grid)
            return y.view(*x.shape[:-1], self.numbers)
        grids = x.reshape(-1, self.ins, self.width)
        smalls = small.expand(grids.shape[0], self.outs, self.ins)
        y = torch.bmm(smalls, grids) if plane is None else torch.baddbmm(plane, smalls, grids)
        return y.view(*x.shape[:-1], self.numbers)

    def input_grad(self, grad: Tensor, factor: Tensor) -> Tensor:
        grids = grad.reshape(-1, self.outs, self.width)
        return torch.bmm(factor.t().expand(grids.shape[0], -1, -1), grids).reshape(-1, self.ins * self.width)

    def factor_grad(self, grad: Tensor, x: Tensor) -> Tensor:
        return torch.bmm(grad.reshape(-1, self.outs, self.width), x.reshape(-1, self.ins, self.width).mT).sum(0)


@final
@dataclass(frozen=True)
class Chain:
    """Steps that make up `x @ W.T`, W (rows, cols)."""

    cols: int
    steps: tuple[Step, ...]

    @cached_property
    def segments(self) -> tuple[tuple[Step, ...], ...]:
        """The steps, cut where what lies between is kept: at most half of the input, what is dearest to have again."""
        inner = range(1, len(self.steps))
        choices = itertools.chain.from_iterable(
            itertools.combinations(inner, count) for count in range(len(self.steps))
        )
        small = [cuts for cuts in choices if 2 * sum(self.steps[cut - 1].numbers for cut in cuts) <= self.cols]
        best = max(small, key=lambda cuts: sum(self.steps[cut - 1].macs for cut in cuts))
        ends = (0, *best, len(self.steps))
        return tuple(self.steps[start:stop] for start, stop in itertools.pairwise(ends))

    @cached_property
    def _between(self) -> int:
        """Numbers that lie between the steps, for each token."""
        return sum(step.numbers for step in self.steps[:-1])

    @cached_property
    def native(self) -> Native | None:
        """The steps for the compiled kernel; None if it lacks one of them."""
        plans = [plan for step in self.steps if (plan := step.native_plan) is not None]
        if len(plans) < len(self.steps):
            return None
        macs = sum(step.macs for step in self.steps) if self.cols <= WIDEST_TRAINED else math.inf
        return Native(
            tuple(itertools.chain.from_iterable(plans)),
            tuple(step.factor for step in self.steps),
            trains=macs <= MOST_TRAINED,
            trains_half=macs <= MOST_TRAINED_HALF,
        )

    def run(self, x: Tensor, factors: Mapping[str, Factor], bias: Tensor | None = None) -> Tensor:
        """x (..., cols) -> (..., rows), plus bias (rows,).

        Raises:
            StructureError: x has another last size.
        """
        shape = x.shape
        if not shape or shape[-1] != self.cols:
            raise StructureError(
                f"this product takes (..., {self.cols}), got {tuple(shape)}: the last sizes must agree"
            )
        if torch.is_grad_enabled() and not is_traced() and self._is_much(x):
            y = self._recomputed(x.reshape(-1, self.cols), factors, bias)
        else:
            y = _composed(self.steps, x, factors, bias)
        return y if y.dim() == len(shape) else y.view(*shape[:-1], y.shape[-1])

    def _is_much(self, x: Tensor) -> bool:
        """Whether PyTorch would keep more between the steps than may be."""
        return 2 * self._between > self.cols and x.numel() // self.cols * self._between * x.element_size() > FEW_BYTES

    def _recomputed(self, x: Tensor, factors: Mapping[str, Factor], bias: Tensor | None) -> Tensor:
        """The product of x (tokens, cols), which keeps no more than what lies between the segments.

        Under autocast it computes in the dtype that a dense layer would.
        """
        found = [(step.factor, plain_matrix(factors[step.factor])) for step in self.steps]
        plain = {name: tensor for name, tensor in found if tensor is not None}
        if len(plain) < len(found):  # one has to be called
            return _composed(self.steps, x, factors, bias)
        if torch.is_autocast_enabled(x.device.type):
            x, bias = narrow(x), None if bias is None else narrow(bias)
            plain = {name: narrow(tensor) for name, tensor in plain.items()}
        for segment in self.segments:
            own = [plain[step.factor] for step in segment]
            last = bias if segment is self.segments[-1] else None
            if len(segment) > 1 and any(tensor.requires_grad for tensor in own):
                x = _Segment.apply(segment, x, last, *own)  # type: ignore[no-untyped-call]
            else:
                x = _composed(segment, x, plain, last)
        return x


def _composed(steps: Sequence[Step], x: Tensor, factors: Mapping[str, Factor], bias: Tensor | None) -> Tensor:
    *others, last = steps
    for step in others:
        x = step.run(x, factors[step.factor])
    return last.run(x, factors[last.factor], bias)


@with_signature
class _Segment(torch.autograd.Function):
    """Several steps that keep their input only.

    The gradients are differentiable operations on what is saved, so they can be differentiated again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(steps: Sequence[Step], x: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        named = {step.factor: factor for step, factor in zip(steps, factors, strict=True)}
        return _composed(steps, x, named, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.steps, x, _, *factors = inputs
        ctx.save_for_backward(x, *factors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        steps: Sequence[Step] = ctx.steps
        x, *factors = ctx.saved_tensors
        _, needs_x, needs_bias, *needs = ctx.needs_input_grad
        read = [x]
        for i in range(max((i for i in range(len(steps)) if needs[i]), default=0)):
            read.append(steps[i].run(read[-1], factors[i]))
        found: list[Tensor | None] = [None] * len(steps)
        bias_grad = grad.sum(0) if needs_bias else None
        grad = grad.contiguous()
        for i in reversed(range(len(steps))):
            if needs[i]:
                found[i] = steps[i].factor_grad(grad, read[i])
            if not (needs_x or any(needs[:i])):
                return None, None, bias_grad, *found
            grad = steps[i].input_grad(grad, factors[i])
        return None, grad, bias_grad, *found
