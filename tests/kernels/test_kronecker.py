"""Kronecker products by Triton: in its interpreter and compiled for a GPU that is not here; `test_cuda` runs them."""

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from compresskit import use_kernels
from compresskit.core import kron, kron_gpu
from compresskit.core.kron_gpu import Gpu, choose, tiles_for
from compresskit.errors import OptionError
from tests.kernels.cases import SMALL, layer_of, structure_of

ROOT = Path(__file__).parents[2]
H100 = Gpu(processors=132, shared_bytes=227 * 2**10)
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install --no-deps triton==3.6.0"
)


def python(*arguments, **environment):
    """Runs Python in this repository, and expects that nothing goes wrong."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@needs_triton
@pytest.mark.parametrize("first", [0, 2, 4, 6])
def test_in_the_interpreter(first):
    python("-m", "tests.kernels.interpreted", str(first), str(first + 1), TRITON_INTERPRET="1")


@needs_triton
def test_compiled_for_a_gpu_that_is_not_here():
    python("-m", "tests.kernels.compiled")


def test_nothing_imports_the_kernels_without_a_gpu():
    code = """
import sys, torch, compresskit
layer = compresskit.Kronecker().fit(torch.randn(64, 64), ratio=4).to_module()
with torch.inference_mode(), compresskit.use_kernels("fused"):
    layer(torch.randn(3, 64))
assert "compresskit.core.kron_triton" not in sys.modules
"""
    python("-c", code)


@pytest.mark.parametrize("small", SMALL)
@pytest.mark.parametrize("wide", [(1, 16), (17, 100), (96, 96), (5504, 2048)])
@pytest.mark.parametrize("terms", [1, 4])
@pytest.mark.parametrize("gpu", [H100, Gpu(108, 163 * 2**10), Gpu(20, 99 * 2**10)])
def test_tiles_fit(small, wide, terms, gpu):
    form = structure_of(small, wide, min(terms, *map(lambda a, b: a * b, small, wide)), True)._form
    for n in (1, 17, 1000, 10**6):
        for element_bytes in (2, 4):
            tiles = tiles_for(form, n, element_bytes, gpu)
            held = (form.q if form.terms == 1 else form.p + form.q) if form.q <= form.p else form.p
            loaded = form.q * tiles.tokens + (1 if form.q <= form.p else form.terms) * tiles.wide
            assert held * tiles.tokens * tiles.wide <= 128 * 32 * tiles.warps
            assert loaded * tiles.inner * element_bytes * tiles.stages <= gpu.shared_bytes
            for side in (tiles.tokens, tiles.wide, tiles.inner):
                assert side >= 16
                assert side & (side - 1) == 0


def test_the_rule():
    large = structure_of((2, 2), (2048, 2048), 1, True)._form
    assert choose(large, 0, 2, tensor_cores=True) == "pytorch"
    assert choose(large, 1, 2, tensor_cores=True) == "mixed"
    assert choose(structure_of((2, 2), (384, 384), 1, True)._form, 1, 2, tensor_cores=True) == "fused"
    terms = structure_of((8, 8), (96, 96), 4, True)._form
    assert [choose(terms, n, 2, tensor_cores=True) for n in (1, 1024)] == ["pytorch", "mixed"]
    assert choose(large, 1, 4, tensor_cores=False) == "fused"
    assert choose(large, 1024, 4, tensor_cores=False) == "pytorch"
    middle = structure_of((16, 16), (64, 64), 1, True)._form
    assert choose(middle, 1, 2, tensor_cores=True) == "mixed"
    assert choose(middle, 1024, 2, tensor_cores=True) == "mixed"
    many = structure_of((48, 12), (64, 64), 1, True)._form
    for n in (1, 1024):
        assert choose(many, n, 2, tensor_cores=True) == "pytorch"


def test_another_word_is_refused():
    with (
        pytest.raises(OptionError, match="kernels are used auto, fused, mixed, pytorch; got 'always'"),
        use_kernels("always"),
    ):
        pass


class OnGpu(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


def test_what_somebody_looks_on_is_left_to_pytorch(monkeypatch):
    """Subclasses, gradients, and modes that derive or count what PyTorch does."""
    layer = layer_of(structure_of((2, 2), (8, 8), 1, True), torch.float32)
    x = torch.randn(3, 16)
    tensors = (x, layer.small.detach(), layer.wide.weight.detach())
    assert kron_gpu._is_plain(tensors)
    assert kron_gpu._is_plain((x, layer.small)) is False
    with torch.no_grad():
        assert kron_gpu._is_plain((x, layer.small, layer.wide.weight))
    assert kron_gpu._is_plain((x.as_subclass(OnGpu), *tensors[1:])) is False
    assert kron_gpu._is_plain((x.double(), *tensors[1:])) is False
    assert kron_gpu._is_plain((x.T, *tensors[1:])) is False
    seen = []

    def look(value):
        seen.append(kron_gpu._is_plain(tensors))
        return value

    torch.func.jvp(look, (x,), (x,))
    torch.func.vmap(look)(x)
    with FlopCounterMode(display=False):
        look(x)
    assert seen == [False] * 3


@pytest.mark.parametrize("present", [False, True])
def test_without_triton_or_a_compiler_pytorch_computes(present, monkeypatch):
    """On a tensor that says that it is on a GPU."""
    monkeypatch.setattr(kron_gpu, "_is_plain", lambda tensors: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if present else None)
    monkeypatch.setattr(kron_gpu.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    kron_gpu.gpu_of.cache_clear()
    layer = layer_of(structure_of((2, 2), (8, 8), 2, True), torch.float32)
    x = torch.randn(3, 16)
    with torch.no_grad(), use_kernels("fused"), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = kron.kron_linear(
            x.as_subclass(OnGpu), layer.small, layer.wide.weight, layer.bias, layer.structure._form
        )
        torch.testing.assert_close(found.as_subclass(torch.Tensor), layer(x))
    kron_gpu.gpu_of.cache_clear()


def test_what_triton_cannot_compile_is_done_by_pytorch_after_one_warning(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")

    def fail(*arguments):
        raise OSError("no header")

    monkeypatch.setattr(kron_gpu, "gpu_of", lambda device: H100)
    monkeypatch.setattr(kron_gpu, "fused", fail)
    monkeypatch.setattr(kron_gpu, "_refused", set())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    layer = layer_of(structure_of((2, 2), (8, 8), 1, True), torch.float32)
    arguments = (torch.randn(3, 16), 3, layer.small, layer.wide.weight, layer.bias, layer.structure._form)
    with torch.no_grad(), use_kernels("fused"):
        with pytest.warns(UserWarning, match="runs without Triton, which cannot compile it here: no header"):
            assert kron_gpu.product(*arguments) is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert kron_gpu.product(*arguments) is None


def test_tf32_is_used_only_where_products_of_pytorch_may_use_it():
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    try:
        for precision, allowed in (("highest", False), ("high", True)):
            torch.set_float32_matmul_precision(precision)
            assert kron_gpu._allows_tf32() is allowed
        matmul.allow_tf32 = False
        assert kron_gpu._allows_tf32() is False
    finally:
        torch.set_float32_matmul_precision(before)
