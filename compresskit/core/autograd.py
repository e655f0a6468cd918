"""What our own `torch.autograd.Function`s share."""

import inspect
from typing import TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=type[torch.autograd.Function])


def is_traced() -> bool:
    """Whether a compiler, an export or a trace looks on, for which a choice by the number of tokens is for ever."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def narrow(tensor: Tensor) -> Tensor:
    """The tensor as autocast, which must be on, would hand it to a matrix product."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.get_autocast_dtype(tensor.device.type))


def with_signature(function: _Function) -> _Function:
    """Decorator: writes down the signature of `forward`, which `apply` otherwise finds anew, in 30 us a call."""
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
    return function
