"""The Kronecker product of a layer on an NVIDIA GPU, by a Triton kernel where that is expected to be faster.

`fused` does all in one launch: x is read once, y written once, and what lies between the products never leaves the
registers. `mixed` leaves the wide product to cuBLAS, and one pass over memory mixes. Whatever neither takes (no Triton,
another dtype, gradients by PyTorch, a compiler that looks on) is left to PyTorch: `kron.py`. `choose` decides.
"""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal, final, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compresskit.core.kron_form import KronForm
from compresskit.core.native import kernel
from compresskit.errors import OptionError

Way = Literal["fused", "mixed", "pytorch"]
When = Literal["auto", "fused", "mixed", "pytorch"]

MAX_SIDE = 16
MAX_SMALL = 64
"""Kernels take small factors up to these sizes: each entry is an instruction for every tile."""
MAX_MIXED_SIZE = 256
MACS_PER_BYTE = 122.0
"""Multiply-adds of a large 16-bit product that a GPU does while it moves one byte: about this on an H100 or A100."""
FUSED_RATE = 0.5
"""Of the rate of a large cuBLAS product that the fused kernel reaches where multiply-adds are the limit."""
CALL_BYTES = 4e6
"""Bytes that memory moves in the time between the starts of two kernels."""
STEP_BYTES = 5e5
"""Likewise in one step of a tile's loop, each of which waits for what it loads: 0.17 us on an H100."""
FEW_TERMS_TOKENS = 128
"""Up to here several terms are mixed sooner by PyTorch, whose product of small matrices uses tensor cores."""
FEW_TOKENS = 16
"""Up to here calls take longer than products."""
MIN_TRITON = (3, 5)
"""Before it, functions of tuples of tiles could not call themselves."""
REGISTERS = 128
"""Of each thread, that tiles of products may fill; three quarters of it where terms have sums of their own."""
MIN_CAPABILITY = (8, 0)
"""Of bfloat16 and asynchronous copies: A100 and later."""

_when: When = "auto"
_refused: set[tuple[Way, KronForm, torch.dtype]] = set()
"""What Triton could not compile."""


@contextlib.contextmanager
def use_kernels(when: When) -> Iterator[None]:
    """Within it, layers run as is said: for measurements, and where a kernel makes trouble.

    Args:
        when: `auto`: whatever is expected to be fastest. `fused`: on a GPU one Triton kernel, wherever one can.
            `mixed`: a product of cuBLAS, mixed by a Triton kernel, wherever that can. `pytorch`: no kernel of ours, on
            a processor (`build_kernels`) neither.

    Raises:
        OptionError: another word.
    """
    global _when
    if when not in get_args(When):
        raise OptionError(f"kernels are used {', '.join(get_args(When))}; got {when!r}")
    before, _when, allowed = _when, when, kernel.allowed
    kernel.allowed = when != "pytorch"
    try:
        yield
    finally:
        _when, kernel.allowed = before, allowed


@final
@dataclass(frozen=True)
class Tiles:
    """How the fused kernel cuts its work: a program makes `tokens` x p x `wide` numbers, `inner` products at a time."""

    tokens: int
    wide: int
    inner: int
    warps: int
    stages: int


@final
@dataclass(frozen=True)
class Gpu:
    """What the kernels have to know of a GPU: its multiprocessors, and the shared memory that a program may use."""

    processors: int
    shared_bytes: int


def choose(form: KronForm, n: int, element_bytes: int, *, tensor_cores: bool) -> Way:
    """The way that is expected to be fastest for n tokens: the rule, in one place.

    Times are counted in bytes moved: those that a way moves, or the multiply-adds that it does meanwhile, whichever
    takes longer; and a constant for each kernel that it starts. Without tensor cores (float32 in full) only few tokens
    are for the kernel: its products are slower than those of cuBLAS.

    Constants and rule were set by what the suite `gpu` measured on an H100 in bfloat16 (four weights, four structures,
    1 to 16,384 tokens): what it chooses takes 1.7 % longer than the best of the three on average, 38 % at worst.

    Args:
        form: sizes of the product.
        n: tokens.
        element_bytes: of one number.
        tensor_cores: whether they take numbers of this type.
    """
    if not n:
        return "pytorch"
    if not tensor_cores:
        return "fused" if n <= FEW_TOKENS and is_fusible(form) else "pytorch"
    rate = MACS_PER_BYTE * 2 / element_bytes
    ends = n * (form.q * form.s + form.p * form.r) * element_bytes
    macs = n * form.terms * form.r * form.s
    between = 2 * n * form.between * element_bytes
    steps = form.terms * -(-form.s // (128 if n <= 128 else 64)) * min(form.p, form.q)
    fused = max(ends, macs * min(form.p, form.q) / (FUSED_RATE * rate)) + CALL_BYTES + steps * STEP_BYTES
    wide = macs * (form.q if form.wide_first else form.p)
    mixed = max(ends + between, wide / rate + between / 2) + 2 * CALL_BYTES
    if is_fusible(form) and (fused <= mixed or not is_mixable(form)):
        return "fused"
    return "mixed" if is_mixable(form) and (form.terms == 1 or n > FEW_TERMS_TOKENS) else "pytorch"


def is_fusible(form: KronForm) -> bool:
    """Whether `fused` takes this form."""
    return max(form.p, form.q) <= MAX_SIDE and form.p * form.q <= MAX_SMALL and form.terms <= 4


def is_mixable(form: KronForm) -> bool:
    """Whether `mixed` takes this form."""
    return form.small_left and max(form.p, form.q) > 1 and form.p * form.q * form.terms <= MAX_MIXED_SIZE


def product(x: Tensor, n: int, small: Tensor, wide: Tensor, bias: Tensor | None, form: KronForm) -> Tensor | None:
    """x (n, q * s) -> (n, p * r), plus bias; None where PyTorch has to do it, or is expected to be faster.

    Args:
        x: contiguous, on a GPU.
        n: tokens.
        small, wide, bias: in the layout of `form`.
        form: sizes of the product.
    """
    if _when == "pytorch" or not n:
        return None
    tensors = (x, small, wide) if bias is None else (x, small, wide, bias)
    if not _is_plain(tensors):
        return None
    gpu = gpu_of(x.device)
    if gpu is None or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return None
    precision = "tf32" if x.dtype == torch.float32 and _allows_tf32() else "ieee"
    tensor_cores = precision == "tf32" or x.dtype != torch.float32
    way, tiles = _planned(form, _power(n), x.element_size(), tensor_cores, gpu, _when)
    if way == "pytorch" or (_refused and (way, form, x.dtype) in _refused):
        return None
    try:
        if x.get_device() != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return _run(way, x, n, small, wide, bias, form, tiles, precision)
        return _run(way, x, n, small, wide, bias, form, tiles, precision)
    except _compile_errors() as error:
        _refused.add((way, form, x.dtype))
        warnings.warn(f"a Kronecker layer runs without Triton, which cannot compile it here: {error}", stacklevel=2)
        return None


@cache
def _planned(form: KronForm, n: int, element_bytes: int, tensor_cores: bool, gpu: Gpu, when: When) -> tuple[Way, Tiles]:
    """How n tokens or a few less are done, and by which tiles if that is `fused`."""
    way = choose(form, n, element_bytes, tensor_cores=tensor_cores) if when == "auto" else when
    possible = {"fused": is_fusible(form), "mixed": is_mixable(form)}.get(way, False)
    return way if possible else "pytorch", tiles_for(form, n, element_bytes, gpu)


def _run(
    way: Way,
    x: Tensor,
    n: int,
    small: Tensor,
    wide: Tensor,
    bias: Tensor | None,
    form: KronForm,
    tiles: Tiles,
    precision: str,
) -> Tensor:
    if way == "mixed":
        return mixed(x, n, small, wide, bias, form)
    return fused(x, n, small, wide, bias, form, tiles, precision)


def _is_plain(tensors: tuple[Tensor, ...]) -> bool:
    """Whether these are contiguous tensors of one type and place, and nobody but us looks on.

    PyTorch derives, transforms and counts what its own operations do; a kernel that it does not know would be passed
    over in silence.
    """
    first = tensors[0]
    training = torch.is_grad_enabled()
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter) or (training and tensor.requires_grad):
            return False
        if tensor.dtype != first.dtype or tensor.device != first.device or not tensor.is_contiguous():
            return False
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
    )


def _allows_tf32() -> bool:
    """Whether the user lets products of float32 be done in tf32, by the new setting or, before PyTorch 2.9, the old."""
    matmul = torch.backends.cuda.matmul
    return bool(matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32)


@cache
def gpu_of(device: torch.device) -> Gpu | None:
    """What the kernels have to know of a GPU; None if they do not run there."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < MIN_CAPABILITY or not _has_triton():
        return None
    found = torch.cuda.get_device_properties(device)
    return Gpu(found.multi_processor_count, getattr(found, "shared_memory_per_block_optin", 99 * 2**10))


def _has_triton() -> bool:
    """Whether Triton and the C compiler that it starts are there."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or importlib.util.find_spec("triton") is None:
        return False
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= MIN_TRITON


def _power(number: int) -> int:
    """The least power of two that is at least this, and at least 16."""
    return max(16, 1 << (number - 1).bit_length())


SHAPES = (
    *((128, 128, 8), (64, 128, 8), (128, 64, 8), (64, 64, 4), (64, 64, 8)),
    *((64, 32, 4), (32, 64, 4), (32, 32, 4), (16, 32, 4)),
)
"""Tokens and wide rows of a tile, and warps, from large to small: the large ones read x least often."""
WASTE = 1.25
"""Rows that are computed / those that there are, at most, if a smaller tile does better."""


def tiles_for(form: KronForm, n: int, element_bytes: int, gpu: Gpu) -> Tiles:
    """The largest tiles that fit into registers and shared memory and still give each processor work."""
    n = _power(n)
    p, q, k = form.p, form.q, form.terms
    wide_first = q <= p
    held = _held(form)
    room = gpu.shared_bytes - 8192  # less what swaps layouts

    def row_bytes(tokens: int, wide: int) -> int:
        """Of what one step of the innermost loop loads, for each of the numbers that it sums up."""
        return element_bytes * (q * tokens + (1 if wide_first else k) * wide)

    fits = [
        (tokens, wide, warps)
        for tokens, wide, warps in SHAPES
        if held * tokens * wide <= warps * 32 * REGISTERS
        and 3 * 16 * row_bytes(tokens, wide) <= room
        and tokens <= n
        and _padded(form.r, wide) <= max(WASTE * form.r, 32)
    ] or [SHAPES[-1]]
    enough = [shape for shape in fits if -(-n // shape[0]) * -(-form.r // shape[1]) >= gpu.processors]
    tokens, wide, warps = enough[0] if enough else fits[-1]
    few = tokens == 16
    if few and n * form.r < 16 * 32 * gpu.processors:
        wide = 16
    row = row_bytes(tokens, wide)
    sizes = (128, 64, 32) if few else (64, 32)
    inner = next((i for i in sizes if 3 * i * row <= room and _padded(form.s, i) <= WASTE * form.s), 16)
    stages = max(2, min(4, room // (inner * row), 1 + -(-form.s // inner)))
    return Tiles(tokens, wide, inner, warps, stages)


def _held(form: KronForm) -> int:
    """Tiles that fill registers at once, with some room where rows of the output are summed or joined there."""
    if form.q > form.p:
        return form.p if form.small_left else 2 * form.p
    return form.q if form.terms == 1 and form.small_left else 4 * (form.p + form.q) // 3


def _padded(size: int, tile: int) -> int:
    return -(-size // tile) * tile


def _compile_errors() -> tuple[type[Exception], ...]:
    """What Triton raises where it cannot compile; PyTorch then computes the same."""
    from triton.errors import TritonError

    return OSError, subprocess.CalledProcessError, TritonError


def fused(
    x: Tensor, n: int, small: Tensor, wide: Tensor, bias: Tensor | None, form: KronForm, tiles: Tiles, precision: str
) -> Tensor:
    """`product` by one kernel; float32 in `precision`, `ieee` or `tf32`."""
    from compresskit.core import kron_triton

    y = x.new_empty(n, form.p * form.r)
    kron_triton.fused(x, n, small, wide, bias, y, form, tiles, precision)
    return y


def mixed(x: Tensor, n: int, small: Tensor, wide: Tensor, bias: Tensor | None, form: KronForm) -> Tensor:
    """`product` by a wide product of PyTorch and a kernel that mixes, in the order in which the factors are stored."""
    from compresskit.core import kron_triton

    p, q, r, s, k = form.p, form.q, form.r, form.s, form.terms
    if form.wide_first or (k == 1 and q <= p):  # factors of one term are stored alike for both orders
        z, y = F.linear(x.view(n * q, s), wide), x.new_empty(n, p * r)
        kron_triton.mixed(z, n, small, bias, y, r)
        return y
    z = x.new_empty(n * p, k * s)
    kron_triton.mixed(x, n, small, None, z, s)
    y = F.linear(z, wide).view(n, p * r)
    return y if bias is None else y.add_(bias)
