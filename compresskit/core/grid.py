"""A weight cut into a grid of equal blocks: what structures of blocks share."""

from compresskit.errors import StructureError

Pair = tuple[int, int]


def check_grid(title: str, rows: int, cols: int, blocks: Pair, rank: int) -> None:
    """Raise StructureError unless rows x cols can be cut in these p x q blocks, and the rank is at least 1.

    Args:
        title: of the structure, for the message: `a Monarch matrix`.
    """
    if len(blocks) != 2 or min(*blocks, rank) < 1:
        said = f"blocks {blocks} and rank {rank}"
        raise StructureError(f"{title} has two numbers of blocks and a rank, at least 1, got {said}")
    if rows % blocks[0] or cols % blocks[1]:
        raise StructureError(f"{rows} x {cols} cannot be cut in {blocks[0]} x {blocks[1]} blocks")


def grid_sizes(rows: int, cols: int, blocks: Pair) -> tuple[int, int, int, int]:
    """p, q, and the rows and cols of a block."""
    p, q = blocks
    return p, q, rows // p, cols // q
