"""What becomes of freed memory while something is timed."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's `mallopt`."""


def keep_memory() -> dict[str, str]:
    """Tell the C library to keep freed memory; the reason if it is one that cannot be told."""
    if not sys.platform.startswith("linux"):
        return {"memory": "only glibc can be told to keep freed memory"}
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)):
        return {"memory": "the C library refuses to keep freed memory"}
    return {}
