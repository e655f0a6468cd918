"""Options of methods as the suites write them."""

from collections.abc import Iterable
from typing import Any


def pairs(items: Iterable[str]) -> dict[str, str]:
    """`key=value` of each."""
    return dict(item.split("=", 1) for item in items)


def rule(text: str) -> tuple[str, Any]:
    """Pattern and method of `PATTERN=METHOD:KEY=VALUE,...`, as on the command line."""
    import compresskit

    pattern, method = text.split("=", 1)
    name, _, options = method.partition(":")
    return pattern, compresskit.decomposition(name, pairs(filter(None, options.split(","))))
