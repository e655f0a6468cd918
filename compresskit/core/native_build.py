"""Compiling the kernel of `native.py` for this machine: once, into the user's cache, by the C++ compiler that is there.

It is not compiled unasked, and not when the package is installed: it fits one version of PyTorch and one processor.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import final

import torch
from torch import nn

from compresskit.core.modules import FactorizedLinear
from compresskit.core.native import kernel
from compresskit.errors import KernelError

SOURCE = Path(__file__).with_name("native.cpp")
INCLUDED = tuple(
    SOURCE.with_name(f"native_{part}.hpp")
    for part in ("products", "tiles", "half", "half_backward", "attention", "training", "python")
)
COMPILERS = ("c++", "g++", "clang++")
TIMEOUT_S = 300


def cache_folder() -> Path:
    """Where compiled kernels are kept: `$COMPRESSKIT_CACHE`, else `compresskit` in the user's cache."""
    if own := os.environ.get("COMPRESSKIT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compresskit"


@cache
def library_path() -> Path:
    """The compiled kernel for this source, this version of PyTorch and this processor; it need not exist."""
    code = [path.read_text("utf-8") for path in (SOURCE, *INCLUDED)]
    said = [*code, torch.__version__, sys.platform, sys.implementation.cache_tag, str(_python_headers()), _processor()]
    key = hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]
    return cache_folder() / f"chain-{key}.so"


def compiler() -> str | None:
    """`$CXX`, else the first C++ compiler that is found."""
    own = os.environ.get("CXX")
    return shutil.which(own) if own else next(filter(None, map(shutil.which, COMPILERS)), None)


@final
@dataclass(frozen=True)
class KernelState:
    """What there is on this machine.

    Args:
        built: whether the kernel is there, for this version of PyTorch and this processor, and can be loaded.
        path: of its file.
        compiler: that would compile it; None without one.
        types: that it computes in, `float32` and, where the processor has units for it, `bfloat16`; none while there is
            no kernel.
        direct: whether calls of it do without PyTorch's dispatcher, some microseconds less for each layer: so where
            Python's headers were there when it was compiled.
    """

    built: bool
    path: Path
    compiler: str | None
    types: tuple[str, ...] = ()
    direct: bool = False


def kernel_state() -> KernelState:
    """Whether layers on this processor have their compiled kernel."""
    types = tuple(str(dtype).removeprefix("torch.") for dtype in kernel.types) if kernel.loaded else ()
    return KernelState(kernel.loaded, library_path(), compiler(), types, kernel.loaded and kernel.direct)


def kernel_advice(model: nn.Module, device: torch.device) -> str | None:
    """What would train this model faster on this device: the kernel, where it is not there yet but could be."""
    natives = [module.structure.native for module in model.modules() if isinstance(module, FactorizedLinear)]
    gains = any(native is not None and (native.trains or native.takes_half(1, training=True)) for native in natives)
    if device.type != "cpu" or not gains or not kernel.allowed or kernel.loaded or compiler() is None:
        return None
    return "layers run by PyTorch's own operations: `compresskit kernels --build`, once, may train them faster here"


def build_kernels(*, force: bool = False) -> Path:
    """Compile the kernel for layers on a processor and use it from now on, in later processes, too: half a minute.

    With it, Kronecker, SVD, Tucker and tensor-train layers in float32 take fewer calls and less memory traffic: the
    smaller the layer and the fewer the tokens, the more it gains (README, Speed); in bfloat16, where the processor has
    units for it (AVX-512 and AMX), likewise. In training the smaller layers gain. Results differ in the last bits.

    Args:
        force: compile it even if it is there; this process then goes on with the one that it has.

    Raises:
        KernelError: no C++ compiler, or it fails; says what it printed.
    """
    path = library_path()
    if force or not kernel.loaded:  # a damaged one is made anew
        _compile(path)
        kernel.load(path)
    if not kernel.loaded:
        raise KernelError(f"{path} was compiled but cannot be loaded; is the compiler of this Python's kind?")
    return path


def _compile(path: Path) -> None:
    """Beside its place first, so that other processes never see half of it."""
    found = compiler()
    if found is None:
        own = os.environ.get("CXX")
        missing = f"CXX is {own}, which is not there" if own else f"none of {', '.join(COMPILERS)} is there"
        raise KernelError(
            f"the kernel needs a C++ compiler: {missing}; install one (Debian: apt install g++). Layers work without it"
        )
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            done = subprocess.run(  # noqa: S603 - our own source, by the user's own compiler
                _command(found, made), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
            if done.returncode != 0:
                raise KernelError(f"{found} cannot compile the kernel:\n{done.stderr.strip()[-2000:]}")
            made.replace(path)
    except subprocess.TimeoutExpired as error:
        raise KernelError(f"{found} has not compiled the kernel in {TIMEOUT_S} s") from error
    except OSError as error:
        raise KernelError(f"the kernel cannot be written to {path.parent}: {error.strerror or error}") from error


def _python_headers() -> Path | None:
    """Those of this Python, with which calls take less; not everyone has them."""
    folder = Path(sysconfig.get_path("include"))
    return folder if (folder / "Python.h").is_file() else None


def _command(found: str, made: Path) -> list[str]:
    root = Path(torch.__file__).parent
    headers = [root / "include", root / "include" / "torch" / "csrc" / "api" / "include"]
    python = _python_headers()
    headers += [python] if python else []
    target = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    return [
        *(found, "-std=c++20", "-O3", target, "-fPIC", "-shared"),
        *(() if sys.platform == "darwin" else ("-fopenmp",)),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(part for folder in headers for part in ("-isystem", str(folder))),
        *(str(SOURCE), "-o", str(made)),
        *(f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-ltorch_cpu", "-lc10"),
        *(("-DCOMPRESSKIT_PYTHON", "-ltorch_python") if python else ()),
    ]


def _processor() -> str:
    """What the compiler makes code for: a cache may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {flags}"
