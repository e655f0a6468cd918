"""`compresskit kernels`: says what is there, compiles it, and explains what it lacks."""

import json
from pathlib import Path

import pytest

from compresskit.core import native_build
from tests.cli.conftest import Cli


@pytest.mark.skipif(native_build.compiler() is None, reason="the kernel needs a C++ compiler: apt install g++")
def test_it_is_compiled_once_and_then_there(cli: Cli, no_kernel: Path) -> None:
    outcome = cli("kernels")
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.startswith(
        "There is none yet; layers run by PyTorch's own operations. compresskit kernels --build makes one with "
    )
    assert not no_kernel.exists()
    outcome = cli("kernels", "--build", "--json")
    assert (outcome.status, outcome.err) == (0, "")
    found = json.loads(outcome.out)
    types = found.pop("types")
    assert found.pop("direct") is (native_build._python_headers() is not None)
    assert types in (["float32"], ["float32", "bfloat16"])
    assert found == {"built": True, "path": str(native_build.library_path()), "compiler": native_build.compiler()}
    made = Path(found["path"]).stat().st_mtime_ns
    outcome = cli("kernels", "--build")
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.startswith("The kernel for this machine and this version of PyTorch is there and used: ")
    assert f"It computes in {' and '.join(types)};" in outcome.out
    assert Path(found["path"]).stat().st_mtime_ns == made
    assert [path.name for path in no_kernel.iterdir()] == [Path(found["path"]).name]


def test_without_a_compiler_it_says_what_to_install(cli: Cli, no_kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    outcome = cli("kernels")
    assert outcome.status == 0
    assert "once a C++ compiler (g++, clang++) is installed" in outcome.out
    outcome = cli("kernels", "--build")
    assert (outcome.status, outcome.out) == (1, "")
    assert "install one (Debian: apt install g++). Layers work without it" in outcome.err
    assert not no_kernel.exists()


def test_force_alone_means_nothing(cli: Cli, no_kernel: Path) -> None:
    outcome = cli("kernels", "--force")
    assert outcome.status == 2
    assert "--force belongs to --build" in outcome.err
