"""Attention and the loss of its scores in training steps in bfloat16, by the compiled kernel where there is one.

Scores of queries and keys are tensors of time x time, which PyTorch's operations pass over again and again; in bfloat16
its attention is slow to differentiate on a processor besides. The kernel (`native_attention.hpp`) does one head after
the other, forward and backward, with all of that in its caches.
"""

import math
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from compresskit.core.native import kernel

_MASKS = (torch.bool, torch.float32, torch.bfloat16)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor | None:
    """softmax(query @ key.T * scale + mask) @ value, rounded once; Vaswani et al. 2017, eq. 1.

    None where it is not for the kernel: other types than bfloat16, other devices, keys of another number than queries.

    Args:
        query, key, value: (batch, heads, time, size); the size of values may differ.
        mask: broadcasts to (batch, heads, time, time): bool, false where a pair does not count, or what is added;
            without a gradient.
        scale: 1 / sqrt(size) unless it is given.
    """
    if not (_fit(query, key) and _fit(value) and value.shape[:3] == query.shape[:3] and _masks(mask, query)):
        return None
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    found: Tensor = _Attention.apply(query, key, value, mask, scale)  # type: ignore[no-untyped-call]
    return found


def score_squares(
    query: Tensor, key: Tensor, other_query: Tensor, other_key: Tensor, pairs: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The sum over pairs of the squared difference of two models' scores, query @ key / sqrt(size), and its gradients.

    None where it is not for the kernel; the others may be in float32, and are rounded.

    Args:
        query, key, other_query, other_key: (batch, time, heads, size), of which `size` may differ between the models.
        pairs: (batch, 1, time, time) bool: which ones count.

    Returns:
        The sum, float32, and its gradients with respect to query and key, like these.
    """
    ours = [states.detach().transpose(1, 2) for states in (query, key)]
    if not _fit(*ours) or pairs.dtype is not torch.bool:
        return None
    theirs = [states.detach().to(torch.bfloat16).transpose(1, 2) for states in (other_query, other_key)]
    if not _fit(*theirs) or theirs[0].shape[:3] != ours[0].shape[:3]:
        return None
    total, *gradients = torch.ops.compresskit.score_squares.default(*ours, *theirs, pairs)
    return total, gradients[0].transpose(1, 2), gradients[1].transpose(1, 2)


@final
class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        made: Tensor
        made, logs = torch.ops.compresskit.attention.default(query, key, value, mask, scale)
        ctx.save_for_backward(query, key, value, mask, logs)
        ctx.scale = scale
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *given, logs = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        gradients = torch.ops.compresskit.attention_backward.default(grad, *given, logs, ctx.scale)
        return (*gradients, None, None)


def _fit(first: Tensor, *others: Tensor) -> bool:
    """Whether all are alike and of a kind that the kernel reads as it lies."""
    return (
        type(first) is Tensor
        and first.dim() == 4
        and first.is_cpu
        and first.dtype is torch.bfloat16
        and first.numel() > 0
        and first.shape[-1] % 2 == 0
        and first.stride(-1) == 1
        and kernel.allowed
        and kernel.loaded
        and torch.bfloat16 in kernel.types
        and all(_alike(first, other) for other in others)
    )


def _alike(first: Tensor, other: Tensor) -> bool:
    return other.shape == first.shape and other.dtype is first.dtype and other.stride(-1) == 1 and other.is_cpu


def _masks(mask: Tensor | None, query: Tensor) -> bool:
    """Whether the kernel knows such a mask."""
    if mask is None:
        return True
    wanted = (*query.shape[:2], query.shape[2], query.shape[2])
    known = mask.dtype in _MASKS and mask.is_cpu and not mask.requires_grad and mask.dim() <= len(wanted)
    sides = zip(reversed(mask.shape), reversed(wanted), strict=False)
    return known and all(side in (1, whole) for side, whole in sides)
