"""Training in mixed precision: what Trainer does to a model, and attention on a processor."""

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, final

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import Trainer

from compresskit.core.native_attention import attention
from compresskit.errors import OutputError


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
    """For the forward pass of a training step: `scaled_dot_product_attention` as it is fastest in bfloat16.

    By the compiled kernel where there is one. Else in float32: on a processor the backward pass of PyTorch 2.13 in
    bfloat16 takes four to eight times what it takes in float32 with up to 64 tokens, which is half of a whole step, and
    as much at 512. All that without dropout; with it, and in passes without a gradient that have no kernel, attention
    stays as it is. So do steps that compute their activations again (`gradient_checkpointing`) or are compiled.

    Args:
        args: `transformers.TrainingArguments` of the training.
    """
    if not args.bf16 or args.device.type != "cpu" or args.gradient_checkpointing or args.torch_compile:
        return nullcontext()
    return _Attention()


class PreciseTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer, with attention in the precision that trains fastest."""

    def compute_loss_context_manager(self) -> ExitStack:
        """Trainer's, and that of attention."""
        stack: ExitStack = super().compute_loss_context_manager()
        stack.enter_context(trained_attention(self.args))
        return stack

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"no checkpoint could be written below {self.args.output_dir}: {error}") from error


@final
class _Attention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        try:
            asked = _ARGUMENTS.bind(*args, **kwargs).arguments
        except TypeError:  # what another version of PyTorch may take besides, or nothing that it takes
            return func(*args, **kwargs)
        if asked.get("dropout_p", 0.0) > 0:  # PyTorch has another way there, which is not slow
            return func(*args, **kwargs)
        if (made := _by_kernel(**asked)) is not None:
            return made
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            wide = func(**{name: _float32(value) for name, value in asked.items()})
        return wide.to(asked["query"].dtype)


def _by_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """What `scaled_dot_product_attention` is asked for, by the compiled kernel, or None."""
    if dropout_p > 0 or enable_gqa or (is_causal and attn_mask is not None):
        return None
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    return attention(query, key, value, attn_mask, scale)


_ARGUMENTS = inspect.signature(_by_kernel)
"""Those of `scaled_dot_product_attention`, which has no signature of its own."""


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
