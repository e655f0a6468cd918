"""What our own `torch.autograd.Function`s share."""

import inspect
from typing import TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=type[torch.autograd.Function])


def is_traced() -> bool:
    """Whether a compiler, an export or a trace looks on, for which a choice by the number of tokens is for ever."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def narrow_type(tensor: Tensor) -> torch.dtype:
    """The type in which autocast, which must be on, would hand a tensor to a matrix product."""
    return tensor.dtype if tensor.dtype == torch.float64 else torch.get_autocast_dtype(tensor.device.type)


def narrow(tensor: Tensor) -> Tensor:
    """The tensor of that type."""
    return tensor.to(narrow_type(tensor))


def with_signature(function: _Function) -> _Function:
    """Decorator: writes down the signature of `forward`, which `apply` otherwise finds anew, in 30 us a call."""
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
    return function
