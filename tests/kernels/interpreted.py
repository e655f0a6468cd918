"""Run by a test as a process of its own, because TRITON_INTERPRET counts for a whole process: kernels on a CPU."""

import itertools
import sys

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from compresskit.core import kron_gpu, kron_triton
from compresskit.core.kron_gpu import Gpu
from tests.kernels.cases import BOUNDS, SMALL, WIDE, error, exact, layer_of, structure_of

TOKENS = (1, 3, 17, 130)
GPUS = (Gpu(132, 227 * 2**10), Gpu(2, 99 * 2**10))
"""Small tiles, so that each processor has work, and large ones."""


def mend_the_interpreter():
    """Triton 3.6 reads a loop's bound as numpy 2.4 forbids, and multiplies bfloat16 as the integers that hold it."""
    patch, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def wide(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = interpreter._convert_float(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(data.reshape(handle.data.shape), tl.float32)

    def create_dot(self, a, b, *arguments):
        return dot(self, wide(a), wide(b), *arguments)

    interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot = patch_lang_tensor, create_dot


def cases(small):
    """Both sides and every number of terms; storage, tokens, types, biases and tiles in turn."""
    sides = itertools.product((True, False), (1, 2, 3, 4))
    kinds = [(tokens, gpu) for tokens in TOKENS for gpu in GPUS if tokens < 100 or gpu == GPUS[-1]]
    for i, (left, terms) in enumerate(sides, start=SMALL.index(small)):
        structure = structure_of(small, WIDE[i % 2 ^ i // 4 % 2], min(terms, small[0] * small[1]), left)
        tokens, gpu = kinds[i % len(kinds)]
        yield structure, tokens, list(BOUNDS)[i % 3], i % 5 < 3, gpu


def check(name, found, wanted, dtype, *what):
    off = error(found, wanted)
    assert off < BOUNDS[dtype], f"{name} {what}, {dtype}: off by {off}"


def main(small):
    for structure, tokens, dtype, bias, gpu in cases(small):
        layer, form = layer_of(structure, dtype, bias=bias), structure._form
        x = torch.randn(tokens, structure.cols, dtype=dtype)
        factors = (
            layer.small.detach(),
            layer.wide.weight.detach(),
            None if layer.bias is None else layer.bias.detach(),
        )
        tiles = kron_gpu.tiles_for(form, tokens, x.element_size(), gpu)
        y = torch.full((tokens, structure.rows), float("nan"), dtype=dtype)
        kron_triton.fused(x, tokens, *factors, y, form, tiles, "ieee")
        check("fused", y, exact(layer, x), dtype, structure, tokens, tiles)
        if kron_gpu.is_mixable(form):
            check("mixed", kron_gpu.mixed(x, tokens, *factors, form), exact(layer, x), dtype, structure, tokens)


if __name__ == "__main__":
    mend_the_interpreter()
    for place in sys.argv[1:]:
        main(SMALL[int(place)])
