"""A sound decomposition in one file, in as few words as the contract allows: what a plug-in looks like."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from compresskit.core.decomposition import Analysis, Decomposition
from compresskit.core.structure import Structure, TensorSpec, linear
from compresskit.errors import StructureError


@dataclass(frozen=True)
class Toy(Structure):
    """W = left @ right, in few words."""

    kind: ClassVar[str] = "toy"

    rank: int

    def validate(self):
        if not 1 <= self.rank <= min(self.rows, self.cols):
            raise StructureError(f"rank {self.rank} is impossible")

    def factor_specs(self):
        return {"left": TensorSpec((self.rows, self.rank)), "right": TensorSpec((self.rank, self.cols), matrix=True)}

    def dense(self, factors):
        return factors["left"] @ factors["right"]

    def matmul(self, x, factors, bias=None):
        return linear(linear(x, factors["right"]), factors["left"], bias)

    def take_rows(self, index, factors):
        return F.embedding(index, factors["left"]) @ factors["right"]

    @property
    def macs(self):
        return self.rank * (self.rows + self.cols)

    @property
    def lookup_macs(self):
        return self.rank * self.cols


class ToyAnalysis(Analysis):
    def __init__(self, weight):
        self.weight = weight
        self.left, self.values, self.right = torch.linalg.svd(weight, full_matrices=False)

    def squared_errors(self, structures):
        return [float(self.values[s.rank :].square().sum()) for s in structures]

    def factors(self, structure):
        r = structure.rank
        return {"left": self.left[:, :r] * self.values[:r], "right": self.right[:r].clone()}


@dataclass(frozen=True)
class ToyDecomposition(Decomposition):
    """Sound: it passes every check."""

    name: ClassVar[str] = "toy"
    summary: ClassVar[str] = "W ~ left @ right"
    source: ClassVar[str] = "the tests"
    structures: ClassVar[tuple[type[Structure], ...]] = (Toy,)
    analysis: ClassVar[type[ToyAnalysis]] = ToyAnalysis

    def menu(self, rows, cols, *, lookup=False):
        for rank in range(1, rows * cols // (rows + cols) + 1):
            yield self.structures[0](rows, cols, rank)

    def analyse(self, weight):
        return self.analysis(weight)
