"""Training in mixed precision: what Trainer does to a model, and attention on a processor."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, final

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import Trainer


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """Give a model its own forward pass back in the end, in place of Trainer's in mixed precision.

    What is scored and used afterwards is then what the saved weights give anywhere else.
    """
    before = model.__dict__.get("forward")
    try:
        yield
    finally:
        for name in ("forward", "_original_forward"):
            model.__dict__.pop(name, None)
        if before is not None:
            model.__dict__["forward"] = before


def trained_attention(args: Any) -> AbstractContextManager[Any]:
    """For the forward pass of a training step: `scaled_dot_product_attention` in float32 where that is faster.

    On a processor the backward pass of PyTorch 2.13 in bfloat16 takes four to eight times what it takes in float32 with
    up to 64 tokens, which is half of a whole step, and as much at 512; without dropout, that is. All else, and passes
    without a gradient, stay as they are. So do steps that compute their activations again (`gradient_checkpointing`) or
    are compiled.

    Args:
        args: `transformers.TrainingArguments` of the training.
    """
    if not args.bf16 or args.device.type != "cpu" or args.gradient_checkpointing or args.torch_compile:
        return nullcontext()
    return _WideAttention()


class PreciseTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer, with attention in the precision that trains fastest."""

    def compute_loss_context_manager(self) -> ExitStack:
        """Trainer's, and that of attention."""
        stack: ExitStack = super().compute_loss_context_manager()
        stack.enter_context(trained_attention(self.args))
        return stack


@final
class _WideAttention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        dropout = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
        if dropout > 0:  # PyTorch has another way there, which is not slow
            return func(*args, **kwargs)
        query = args[0] if args else kwargs["query"]
        with torch.autocast("cpu", enabled=False):
            wide = func(*map(_float32, args), **{name: _float32(value) for name, value in kwargs.items()})
        return wide.to(query.dtype)


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value
