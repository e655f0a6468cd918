"""What becomes of freed memory while something is timed."""


def keep_memory() -> dict[str, str]:
    """Tell the C library to keep freed memory; the reason if it is one that cannot be told."""
    from compresskit import keep_freed_memory

    return {} if keep_freed_memory() else {"memory": "only glibc can be told to keep freed memory"}
