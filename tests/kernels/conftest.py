"""The compiled kernel for processors, made once for the tests that use it; all others run without it."""

import os

import pytest

from compresskit.core import native_build
from compresskit.core.native import kernel


@pytest.fixture(scope="session")
def kernel_folder(tmp_path_factory):
    """A cache that holds the compiled kernel."""
    if native_build.compiler() is None:
        pytest.skip("the kernel needs a C++ compiler: apt install g++")
    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPRESSKIT_CACHE", str(folder))
        native_build.library_path.cache_clear()
        native_build.build_kernels()
        op = kernel._op
    native_build.library_path.cache_clear()
    kernel._op = None
    return folder, op


@pytest.fixture
def native(kernel_folder, monkeypatch):
    """Counts what the kernel computes."""
    folder, op = kernel_folder
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(folder))
    native_build.library_path.cache_clear()
    calls = []

    def counted(*given):
        calls.append(given)
        return op(*given)

    monkeypatch.setattr(kernel, "_op", counted)
    monkeypatch.setattr(kernel, "_looked", True)
    yield calls
    native_build.library_path.cache_clear()


@pytest.fixture
def no_kernel(tmp_path, monkeypatch):
    """An empty cache, and a process that has not looked into it."""
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(tmp_path / "cache"))
    native_build.library_path.cache_clear()
    monkeypatch.setattr(kernel, "_op", None)
    monkeypatch.setattr(kernel, "_looked", False)
    yield tmp_path / "cache"
    native_build.library_path.cache_clear()
    assert "COMPRESSKIT_CACHE" in os.environ
