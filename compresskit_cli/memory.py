"""Memory that is freed goes back to the system, where the C library would keep it for later."""

import ctypes
import sys

BLOCK_BYTES = 4 * 2**20
"""Blocks from this size on are the system's own; activations of a forward pass that is timed are smaller."""
M_MMAP_THRESHOLD = -3
"""Parameter of glibc's `mallopt`, see `man mallopt`."""


def return_large_blocks() -> bool:
    """Whether this process will give large blocks back as soon as they are free.

    glibc raises its threshold for that up to 32 MiB with every larger block, and then keeps what threads that work side
    by side have freed: with Tucker at bert-base shapes about a tenth of all memory. Other C libraries are left alone.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(M_MMAP_THRESHOLD, BLOCK_BYTES) == 1
