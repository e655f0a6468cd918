"""The higher-order SVD of a small tensor: what its leading blocks hold, and the sweeps that refine one."""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def leading_energies(core: Tensor, ranks: Sequence[Sequence[int]]) -> dict[tuple[int, ...], float]:
    """Energy of every leading block of the core whose sizes are among these ascending ranks."""
    sums = core.double().square_()
    for axis, own in enumerate(ranks):
        ends = [min(rank, core.shape[axis]) for rank in own]
        if own != [1]:
            parts = [sums.narrow(axis, a, b - a).sum(axis) for a, b in itertools.pairwise([0, *ends])]
            sums = torch.stack(parts, axis).cumsum(axis)
    return dict(zip(itertools.product(*ranks), sums.flatten().tolist(), strict=True))


def hooi(block: Tensor, ranks: Mapping[int, int], sweeps: int) -> tuple[Tensor, dict[int, Tensor]]:
    """Core and orthonormal (size, rank) matrices by axis, from the leading block on; each sweep keeps more energy."""
    start = [torch.eye(block.shape[axis], rank, dtype=block.dtype, device=block.device) for axis, rank in ranks.items()]
    core = block[tuple(slice(ranks.get(axis)) for axis in range(block.dim()))]
    import tensorly as tl  # half a second, for this method only
    from tensorly.decomposition import partial_tucker

    with tl.backend_context("pytorch", local_threadsafe=True):
        (core, rotations), _ = partial_tucker(
            block,
            rank=list(ranks.values()),
            modes=list(ranks),
            n_iter_max=sweeps,
            init=(core, start),
            tol=0,
            random_state=0,
        )
    return core, dict(zip(ranks, rotations, strict=True))
