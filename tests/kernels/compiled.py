"""Run by a test as a process of its own: compiles the kernels for an H100, down to machine code, without having one."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compresskit.core import kron_triton
from compresskit.core.kron_gpu import Gpu, tiles_for
from tests.kernels.cases import structure_of

TYPES = {2: ("bf16", "ieee"), 4: ("fp32", "tf32")}
GPU = Gpu(processors=132, shared_bytes=227 * 2**10)
DIVISIBLE = [["tt.divisibility", 16]]


def compile_fused(form, n, element_bytes, has_bias=True):
    dtype, precision = TYPES[element_bytes]
    tiles = tiles_for(form, n, element_bytes, GPU)
    kernel, constants = kron_triton.plan_fused(form, tiles, has_bias, precision)
    compile_for_h100(
        kernel, dtype, (form.r // constants[0], form.s // constants[1]), constants, tiles.warps, tiles.stages
    )


def compile_for_h100(kernel, dtype, sizes, constants, warps, stages):
    names = kernel.arg_names
    tensors = len(names) - 1 - len(sizes) - len(constants)
    types = [*["*" + dtype] * tensors, *["i32"] * (1 + len(sizes)), *["constexpr"] * len(constants)]
    divisible = [*range(tensors), *(tensors + 1 + i for i, size in enumerate(sizes) if size % 16 == 0)]
    source = ASTSource(
        kernel,
        dict(zip(names, types, strict=True)),
        constexprs=dict(zip(names[-len(constants) :], constants, strict=True)),
        attrs={(i,): DIVISIBLE for i in divisible},
    )
    done = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": warps, "num_stages": stages})
    assert done.metadata.shared <= GPU.shared_bytes, f"{kernel} {constants}: {done.metadata.shared} bytes shared"


def main():
    for small, wide, terms, left in (
        ((2, 2), (384, 384), 1, True),
        ((8, 8), (96, 96), 4, True),
        ((8, 2), (96, 384), 1, False),
        ((2, 8), (384, 96), 2, True),
        ((1, 16), (768, 48), 1, True),
    ):
        form = structure_of(small, wide, terms, left)._form
        for n, element_bytes in ((1, 2), (16384, 2), (16384, 4)):
            compile_fused(form, n, element_bytes)
    compile_for_h100(kron_triton.mix, "bf16", (24,), (16, 8, 32, True, 1, 256), 4, 1)


if __name__ == "__main__":
    main()
