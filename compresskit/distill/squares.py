"""Sums of squared differences with a backward pass of their own, because what they pass over is large.

Written out in operations of PyTorch, scores are passed over some fifteen times, forward and backward; here five times,
and one tensor of their size is kept. On a processor a step of distilling MiniLM takes a twelfth less. In bfloat16 the
compiled kernel, where there is one, does it without writing them down, with all gradients at once (`KnownGradients`). A
teacher gets no gradient, and gradients have none.
"""

import math
from typing import Any, final

import torch
from torch import Tensor

from compresskit.errors import DistillError


@final
class DifferenceSquares(torch.autograd.Function):
    """sum(mask * (student - teacher)^2), in float32.

    `apply(student, teacher, mask)`: two tensors of one shape, and a mask that broadcasts to it.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        difference = torch.sub(student.float(), teacher.float()).masked_fill_(~mask, 0)
        ctx.save_for_backward(difference)
        ctx.dtype = student.dtype
        return _squared_sum(difference)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _only_once()
        (difference,) = ctx.saved_tensors
        return (difference * (2 * grad)).to(ctx.dtype), None, None


@final
class ScoreSquares(torch.autograd.Function):
    """sum(pairs * (scores of the student - scores of the teacher)^2), in float32.

    `apply(query, key, teacher_query, teacher_key, pairs)`: queries and keys (batch, time, heads, size), whose sizes may
    differ between the models, and a mask (batch, 1, time, time). Scores are query @ key / sqrt(size).
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, teacher_query: Tensor, teacher_key: Tensor, pairs: Tensor
    ) -> Tensor:
        batch, time, heads, _ = query.shape
        q, k, other_q, other_k = map(_by_head, (query, key, teacher_query, teacher_key))
        difference = torch.baddbmm(q.new_zeros(()), q, k.mT, beta=0, alpha=_scale(query))  # (batch * heads, time, time)
        difference.baddbmm_(other_q, other_k.mT, alpha=-_scale(teacher_query))
        difference.view(batch, heads, time, time).masked_fill_(~pairs, 0)
        ctx.save_for_backward(difference, q, k)
        ctx.scale, ctx.shape, ctx.dtype = _scale(query), (batch, heads, time, -1), query.dtype
        return _squared_sum(difference)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _only_once()
        difference, q, k = ctx.saved_tensors
        factor = 2 * ctx.scale * grad

        def back(product: Tensor) -> Tensor:
            found: Tensor = product.mul_(factor).view(ctx.shape).transpose(1, 2).to(ctx.dtype)
            return found

        needs_query, needs_key, *_ = ctx.needs_input_grad
        query_grad = back(torch.bmm(difference, k)) if needs_query else None
        key_grad = back(torch.bmm(difference.mT, q)) if needs_key else None
        return query_grad, key_grad, None, None, None


@final
class KnownGradients(torch.autograd.Function):
    """A number whose gradients were computed with it: `apply(query, key, total, query_grad, key_grad)` is the total."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, total: Tensor, query_grad: Tensor, key_grad: Tensor) -> Tensor:
        ctx.save_for_backward(query_grad, key_grad)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _only_once()
        scaled = [
            (found * grad).to(found.dtype) if needed else None
            for found, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True)
        ]
        return (*scaled, None, None, None)


def _scale(query: Tensor) -> float:
    return 1 / math.sqrt(query.shape[-1])


def _by_head(states: Tensor) -> Tensor:
    """(batch, time, heads, size) -> (batch * heads, time, size), contiguous and float32, in one pass."""
    batch, time, heads, size = states.shape
    made = torch.empty(batch, heads, time, size, dtype=torch.float32, device=states.device)
    return made.copy_(states.transpose(1, 2)).view(batch * heads, time, size)


def _squared_sum(tensor: Tensor) -> Tensor:
    """Row by row, so that nothing is written and rounding stays small."""
    total: Tensor = torch.linalg.vector_norm(tensor.flatten(1), dim=1).square().sum()
    return total


def _only_once() -> None:
    if torch.is_grad_enabled():  # only with create_graph
        raise DistillError("losses of distillation have no second derivatives: leave out create_graph")
