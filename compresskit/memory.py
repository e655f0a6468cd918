"""What becomes of memory that a step of training frees and the next one asks for again."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's `mallopt`: how much may lie free before it goes back to the system, and how many blocks come from there
one by one."""
MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed, for the rest of this process; whether it can be told, which is glibc.

    By itself it gives large blocks back, and every tensor of every step is fresh memory, whose pages the system clears
    one by one: a step of distillation on a processor then takes 1.17 times as long (benchmarks/README.md, Memory in
    training). `compresskit distill` and `finetune` call this; peaks grow by a tenth. Other allocators (jemalloc,
    tcmalloc) keep it anyway.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, MOST))
