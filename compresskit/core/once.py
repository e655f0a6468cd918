"""What is computed once, computed before it is asked for."""

from functools import cached_property


def compute_now(thing: object) -> None:
    """Compute the cached properties: before Python 3.12 they take a lock, which torch.compile cannot enter."""
    for cls in type(thing).__mro__:
        for name, value in vars(cls).items():
            if isinstance(value, cached_property):
                getattr(thing, name)
