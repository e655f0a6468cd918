"""Nearest Kronecker products of given shapes, by the public interface."""

from typing import Any

Side = tuple[int, int]


def side(text: str) -> Side:
    """(p, q) of `pxq`."""
    p, q = text.split("x")
    return int(p), int(q)


def nearest_product(weight: Any, small: Side) -> Any:
    """The nearest left (p, q) (x) right to a weight (rows, cols), as a matrix."""
    import compresskit

    method = compresskit.Kronecker(left=small, terms=1)
    (structure,) = method.menu(*weight.shape)
    return structure.dense(method.fit(weight, structure=structure).factors)
