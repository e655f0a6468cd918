"""What a result was measured on: hardware, versions, commit. Nothing that names a user, a host or a folder."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "tensorly", "scipy", "numpy", "safetensors")


def hardware() -> dict[str, Any]:
    """Processor, cores that this process may use, threads that torch uses, memory."""
    import torch

    from compresskit.machines import processor

    return {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Versions of Python, of compresskit and of what does the arithmetic."""
    import compresskit

    installed = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), "compresskit": compresskit.__version__, **installed}


def commit(results: Path) -> dict[str, Any] | None:
    """The git commit of this tree and whether anything but the results differs from it; None if it has no commit."""
    head = _git("rev-parse", "HEAD")
    if head is None:
        return None
    others = ["."]
    if results.is_relative_to(ROOT):
        others.append(f":(exclude){results.relative_to(ROOT).as_posix()}")
    return {"hash": head, "dirty": bool(_git("status", "--porcelain", "--", *others))}


def peak_memory_bytes(max_rss: int) -> int:
    """`ru_maxrss` in bytes: Linux counts in KiB, macOS in bytes."""
    return max_rss if sys.platform == "darwin" else max_rss * 1024


def _git(*arguments: str) -> str | None:
    """Output of a git command in this tree; None if there is no git, no repository or no commit."""
    git = shutil.which("git")
    if git is None:
        return None
    done = subprocess.run([git, "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None
