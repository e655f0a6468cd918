"""The compiled kernel for processors, made once for the tests that use it; all others run without it."""

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


class Computed:
    """Asked for the chains that the kernel has computed, and back, since it was asked last."""

    def __init__(self):
        self.before = self.so_far()

    @staticmethod
    def so_far():
        return torch.ops.compresskit.computed.default()

    def __call__(self):
        now = self.so_far()
        (forward, backward), (forward_before, backward_before) = now, self.before
        self.before = now
        return forward - forward_before, backward - backward_before


@pytest.fixture
def native(kernel_folder, monkeypatch):
    """What the kernel computes."""
    folder, calls = kernel_folder
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(folder))
    native_build.library_path.cache_clear()
    monkeypatch.setattr(kernel, "_calls", calls)
    monkeypatch.setattr(kernel, "_looked", True)
    yield Computed()
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
