"""The compiled kernel for processors, made once for the tests that use it; all others run without it."""

import dataclasses
import os

import pytest
import torch
from filelock import FileLock

from compresskit.core import native_build
from compresskit.core.native import kernel


@pytest.fixture(scope="session")
def kernel_folder(tmp_path_factory):
    """A cache that holds the compiled kernel, one for all processes that test."""
    if native_build.compiler() is None:
        pytest.skip("the kernel needs a C++ compiler: apt install g++")
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "kernels"
    with FileLock(f"{folder}.lock"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPRESSKIT_CACHE", str(folder))
        native_build.library_path.cache_clear()
        native_build.build_kernels()
        calls = kernel._calls
    native_build.library_path.cache_clear()
    kernel._calls = None
    return folder, calls


@pytest.fixture
def native(kernel_folder, monkeypatch):
    """The names of what the kernel computes, one after the other."""
    folder, given = kernel_folder
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(folder))
    native_build.library_path.cache_clear()
    calls = []

    def counted(name, op):
        def call(*given):
            calls.append(name)
            return op(*given)

        return call

    names = {"chain": "forward", "now": "forward", "backward": "backward"}
    counts = {field: counted(name, getattr(given, field)) for field, name in names.items()}
    monkeypatch.setattr(kernel, "_calls", dataclasses.replace(given, **counts))
    monkeypatch.setattr(kernel, "_looked", True)
    yield calls
    native_build.library_path.cache_clear()


@pytest.fixture
def half(native, monkeypatch):
    """The same, on a processor where the kernel also computes in bfloat16."""
    if not torch.ops.compresskit.half_products.default():
        pytest.skip("this processor multiplies no bfloat16 (AVX-512 with bfloat16, or AMX)")
    monkeypatch.setattr(kernel, "types", (torch.float32, torch.bfloat16))
    return native


@pytest.fixture
def threads(request):
    """So many threads as a test is parametrised with, indirectly."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
