"""A weight that is rebuilt only when somebody computes with it.

Model code often asks a layer for `layer.weight.dtype` (T5 does so in every forward pass). Rebuilding the
matrix for that would cost more than the layer itself.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_PROPERTIES = ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_meta", "is_cuda")
_METHODS = ("size", "dim", "numel", "nelement", "element_size", "is_floating_point", "is_complex", "__len__")
_METADATA = {getattr(Tensor, name).__get__ for name in _PROPERTIES} | {getattr(Tensor, name) for name in _METHODS}


@final
class LazyWeight(Tensor):
    """Stand-in for a dense weight: answers shape, dtype and device at once, rebuilds the matrix for all else.

    Gradients flow through the rebuilt matrix to the factors. In-place changes act on the rebuilt copy and are
    lost; assign factors, or call `dequantize`, to change a layer.
    """

    _rebuild: Callable[[], Tensor]
    _is_hf_initialized = True
    """transformers initialises some weights through their parent module; for a rebuilt copy that is lost work."""

    @staticmethod
    def of(shape: Sequence[int], like: Tensor, rebuild: Callable[[], Tensor]) -> "LazyWeight":
        """A lazy tensor of this shape with the dtype and device of `like`; `rebuild` returns the real one."""
        lazy: LazyWeight = Tensor._make_wrapper_subclass(
            LazyWeight, tuple(shape), dtype=like.dtype, device=like.device, requires_grad=like.requires_grad
        )
        lazy._rebuild = rebuild
        return lazy

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(_materialise, (args, dict(kwargs or {})))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map(_materialise, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


def _materialise(value: Any) -> Any:
    return value._rebuild() if type(value) is LazyWeight else value
