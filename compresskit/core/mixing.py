"""A Kronecker product of two small factors on the last axis, as steps of a chain."""

from compresskit.core.chain import FirstAxis, LastAxis, Step
from compresskit.core.cost import Gemm, Operation, Pass

Pair = tuple[int, int]


def mix_orders(ins: Pair, outs: Pair) -> Pair:
    """Multiply-adds of `mix_steps`: last mode before the first one, and after it."""
    (i1, i2), (o1, o2) = ins, outs
    first, last = i1 != o1, i2 != o2
    return i1 * o2 * (i2 * last + o1 * first), o1 * i2 * (i1 * first + o2 * last)


def mix_operations(ins: Pair, outs: Pair, tokens: int) -> list[Operation]:
    """What `mix_steps` does, a bias as a pass of its own."""
    (i1, i2), (o1, o2) = ins, outs
    if ins == outs:
        return []
    if i1 == o1 == 1:
        return [Gemm(tokens, o2, i2)]
    last_before, last_after = mix_orders(ins, outs)
    width, height = (o2, i1) if last_before <= last_after else (i2, o1)  # of the grid as the other product finds it
    first = [Gemm(o1, width, i1, batch=tokens)] if i1 != o1 else []
    last = [Gemm(tokens * height, o2, i2)] if i2 != o2 else []
    return [*(last + first if last_before <= last_after else first + last), Pass(2 * tokens * o1 * o2)]


def mix_steps(ins: Pair, outs: Pair, first: str, last: str) -> tuple[Step, ...]:
    """(first (x) last) on the last axis, in the cheaper order; a mode whose size stays has no factor."""
    (i1, i2), (o1, o2) = ins, outs
    last_before, last_after = mix_orders(ins, outs)
    first_goes_first = i2 == o2 or last_before > last_after
    by_first = [FirstAxis(first, i1, o1, i2 if first_goes_first else o2)] if i1 != o1 else []
    by_last = [LastAxis(last, o1 if first_goes_first else i1, i2, o2)] if i2 != o2 else []
    return (*by_first, *by_last) if first_goes_first else (*by_last, *by_first)
