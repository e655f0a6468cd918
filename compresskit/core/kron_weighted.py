"""Weighted Kronecker fits of one weight: prices of a whole menu, cheaper where it is hopeless, and the fit of a shape.

A price is the error that a few rounds reach, and the fit goes on from there: so it is an upper bound. All shapes get
one round, and only those more that no shape of fewer parameters beats by far. Beside rivals of other kinds all get the
start alone, which is seldom far from what rounds reach, and only those rounds that the rivals do not beat.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from compresskit.core.folding import gram
from compresskit.core.grids import Grid
from compresskit.core.importance import Importance
from compresskit.core.kron_als import Blocks, State
from compresskit.core.kron_refine import Refinement
from compresskit.core.metric import Metric, Moment

STAGES = ((1, 1.8), (3, 0.0))
"""Rounds that a shape is priced by, and how many times the squared error of a smaller one it may have to go on.

On layers of all-MiniLM-L6-v2 squared errors after one round are 1 to 1.8 times those after twelve, after four rounds
1.05 times in the mean."""
STAGES_BESIDE = ((0, 1.15), (1, 1.1), (3, 0.0))
"""The same beside rivals. Squared errors of starts were 1 to 1.25 times those after twelve rounds, mostly
1.02. The rounds are those of STAGES: a fit goes the same way again."""
MAX_SIDE = 2048
"""Beside rivals, shapes with larger normal equations are not priced: one of 4096 takes eight times as long as this."""
REFINE_ROUNDS = 3


@final
@dataclass(frozen=True)
class Shape:
    """What to fit: a grid and a number of terms; `num_params` of the structure, to price by."""

    grid: Grid
    terms: int
    num_params: int


class _Problem(NamedTuple):
    weight: Tensor
    answers: Tensor  # W C
    metric: Metric


@final
class WeightedSums:
    """Sums of Kronecker products for one weight and one importance; small factors that were priced are kept.

    Where each row has a wide row of its own (p = 1), all that the small factors need to know of a tall weight is
    W^T R W: a square root of that stands for the weight, and R is gone. An embedding is fitted so.
    """

    def __init__(self, weight: Tensor, importance: Importance, rounds: int) -> None:
        self._weight = weight
        self._importance = importance
        self._rounds = rounds
        self._known: dict[Shape, State] = {}

    def prices(self, shapes: Sequence[Shape], rivals: Sequence[float] | None = None) -> list[float]:
        """Squared weighted error of each shape, one that `fit` reaches or falls below.

        Args:
            rivals: errors that a shape must fall below to count; those that hardly will have rougher prices, or an
                infinite one.
        """
        if not shapes:
            return []
        metric = self._importance.metric(self._weight)
        new = [shape for shape in dict.fromkeys(shapes) if shape not in self._known]
        limits = None
        if rivals is not None:
            scale = metric.scale or 1.0
            limits = {shape: rival / scale for shape, rival in zip(shapes, rivals, strict=True)}
            new = [shape for shape in new if self._side(shape) <= MAX_SIDE]
        going = new
        for rounds, hopeless in STAGES if limits is None else STAGES_BESIDE:
            for reduced in (True, False):
                alike = [shape for shape in going if self._reducible(shape) is reduced]
                self._descend(metric, alike, min(rounds, self._rounds), reduced=reduced)
            going = self._hopeful(going, hopeless, limits or {})
        for shape in new:  # the wide factors are many, and follow from the small ones
            state = self._known[shape]
            self._known[shape] = State(state.small, state.wide[:0], state.error)
        known = self._known
        return [metric.scale * known[shape].error if shape in known else math.inf for shape in shapes]

    def _side(self, shape: Shape) -> int:
        """Of the normal equations for the wide factors; 0 where they have a closed form."""
        return 0 if shape.grid.q == 1 else shape.terms * (self._weight.shape[1] // shape.grid.q)

    def fit(self, shape: Shape) -> tuple[Tensor, Tensor]:
        """Small (terms, p * q) and wide (terms, r * s), orthogonal terms in falling order, evenly split."""
        if shape not in self._known:
            self.prices([shape])  # the search goes on from there, and so is never worse than it
        metric, reduced = self._importance.metric(self._weight), self._reducible(shape)
        problem = self._problem(metric, reduced=reduced)
        blocks = Blocks(*problem, shape.grid)
        state = self._state(problem, blocks, shape, self._rounds)
        if not blocks.exact:
            state = Refinement(blocks, problem.weight, problem.metric).refine(state, REFINE_ROUNDS)
        wide = self._wide(metric, shape.grid, state.small) if reduced else state.wide.flatten(1)
        small, wide = _ordered(state.small.to(wide.dtype), wide)
        return small.to(self._weight.dtype), wide.to(self._weight.dtype)

    def _reducible(self, shape: Shape) -> bool:
        rows, cols = self._weight.shape
        return shape.grid.p == 1 and rows > cols

    def _problem(self, metric: Metric, *, reduced: bool) -> _Problem:
        """In float64; made for each call, since it takes several times the memory of the weight."""
        if not reduced:
            return _Problem(self._weight.double(), metric.answers(self._weight), metric)
        if metric.rows.values is not None and metric.rows.values.dim() == 2:
            weight = self._weight.double()
            energies = weight.T @ metric.rows.before(weight)
        else:
            energies = gram(Moment.of(metric.rows.root().values, like=self._weight).before(self._weight))
        root = Moment((energies + energies.T) / 2).root().dense(len(energies), like=energies)
        return _Problem(root, metric.cols.after(root), metric.without_rows())

    def _wide(self, metric: Metric, grid: Grid, small: Tensor) -> Tensor:
        """The best wide factors (terms, rows * s) where p = 1: linear in the rows of the weight, one by one."""
        eye = torch.eye(self._weight.shape[1], dtype=torch.float64, device=self._weight.device)
        columns = metric.without_rows()
        maps = Blocks(eye, metric.cols.after(eye), columns, grid).with_small(small).wide  # (terms, cols, s)
        return torch.stack([(self._weight @ one.to(self._weight.dtype)).flatten() for one in maps])

    def _descend(self, metric: Metric, shapes: Sequence[Shape], rounds: int, *, reduced: bool) -> None:
        if not shapes:
            return
        problem = self._problem(metric, reduced=reduced)
        for grid in dict.fromkeys(shape.grid for shape in shapes):
            blocks = Blocks(*problem, grid)
            for shape in (shape for shape in shapes if shape.grid == grid):
                self._known[shape] = self._state(problem, blocks, shape, rounds)

    def _state(self, problem: _Problem, blocks: Blocks, shape: Shape, rounds: int) -> State:
        """After so many rounds from what is known of a shape; with its true error."""
        known = self._known.get(shape)
        if known is None:
            first = blocks.start(shape.terms)
        else:
            first = known if len(known.wide) else blocks.with_small(known.small)
        last = blocks.descend(first, rounds)
        if blocks.exact:
            return last
        refinement = Refinement(blocks, problem.weight, problem.metric)
        return refinement.best(last, first, refinement.plain(shape.terms))

    def _hopeful(self, shapes: Sequence[Shape], hopeless: float, limits: Mapping[Shape, float]) -> list[Shape]:
        """Those that no smaller one, nor their limit, beats by far."""
        least, hopeful = math.inf, []
        for shape in sorted(shapes, key=lambda shape: shape.num_params):
            error = self._known[shape].error
            least = min(least, error)
            if error <= hopeless * min(least, limits.get(shape, math.inf)):
                hopeful.append(shape)
        return hopeful


def _ordered(small: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
    """The same sum of orthogonal terms, the largest first, each split evenly; small has orthonormal rows."""
    turn = torch.linalg.eigh(wide @ wide.T).eigenvectors.flip(-1).T
    small, wide = turn @ small, turn @ wide
    signs = torch.sign(small.gather(-1, small.abs().argmax(-1, keepdim=True)))  # eigenvectors have no sign
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).sqrt()
    return small * signs * scale, torch.where(scale > 0, wide * signs / scale, 0.0)
