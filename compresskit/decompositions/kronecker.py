"""Kronecker: W ~ sum_k left_k (x) right_k, the nearest such sum in Frobenius norm.

Sources: Van Loan and Pitsianis, "Approximation with Kronecker products" (1993), for the fit; Tahaei et al.,
"KroneckerBERT" (NAACL 2022), for its use in a transformer. Ours: the small factor stands on the left by
default, which makes the wide factor one large GEMM without a transposed copy and, measured on a pretrained
encoder, fits better; `small=right` is the papers' A (x) B. Weighted by what a layer sees (`importance`), both factors
are fitted in turn, each by exact least squares (core/kron_als.py); there the two orders fit about equally well.

Tried and left out: hidden units of feed-forward networks in the order that suits the products best, which changes no
model (the benchmark unit-order). With KroneckerBERT's shapes (8x2 in, 2x8 out) one product keeps half as much energy
again of all-MiniLM-L6-v2, but what is lost is nearly as much, and nothing follows from it: STS-B .651 and .650 without
training, .785 and .784 after 150 steps of distillation, hidden error .757 and .748. One order of the hidden size for
all layers at once found nothing: the one that is there is a fixed point of the search. Attention heads in the best
order that exchanges find (the benchmark free-choices): one product keeps .300 instead of .285 of the energy of
attention with 2x2, .088 instead of .081 with 4x4. What pays more is `calibration.rotate_values_`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from compresskit.core.autograd import is_traced
from compresskit.core.chain import FirstAxis
from compresskit.core.cost import Gemm, Operation, Pass
from compresskit.core.decomposition import Analysis, Decomposition, squared_norm
from compresskit.core.folding import row_gram
from compresskit.core.grids import Grid, coarsen, cover, cut
from compresskit.core.importance import Importance
from compresskit.core.kron import kron_linear, swaps
from compresskit.core.kron_form import KronForm, are_sizes
from compresskit.core.kron_weighted import Shape, WeightedSums
from compresskit.core.native import Native
from compresskit.core.registry import register
from compresskit.core.structure import Factor, Structure, TensorSpec, linear, plain_matrix
from compresskit.errors import OptionError, StructureError

_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # new in PyTorch 2.7

MAX_SMALL_SIDE = 48
MAX_SMALL_SIZE = 576
"""The menu offers small factors up to this many entries: the side of the Gram matrix that prices them."""
MAX_PADDING = 0.01
"""Share of padded rows that the menu tolerates where the rows have too few divisors."""


@final
@dataclass(frozen=True)
class KroneckerSum(Structure):
    """W (rows, cols) = the first `rows` rows of sum_k left_k (x) right_k, left_k (p, q), right_k (r, s).

    cols = q * s and rows <= p * r; padded rows (50257 = 29 * 1733 has hardly a divisor) are rows of the last
    blocks that are computed and dropped.

    Of the two factors the smaller is `small`, the other `wide`. Stored is what the cheaper order of
    contraction reads without a copy:

    - wide first (multiply by wide, then mix by small): wide (terms * r, s), small (p, q * terms);
    - mix first: small (p * terms, q), wide (r, terms * s).
    """

    kind: ClassVar[str] = "kronecker"

    left: tuple[int, int]
    right: tuple[int, int]
    terms: int

    def validate(self) -> None:
        if len(self.left) != 2 or len(self.right) != 2 or min(*self.left, *self.right, self.terms) < 1:
            raise StructureError(f"Kronecker factors have two sizes each and at least one term, got {self}")
        (p, q), (r, s) = self.left, self.right
        if q * s != self.cols or not _covers(p, r, self.rows):
            raise StructureError(f"({p} x {q}) (x) ({r} x {s}) does not make {self.rows} x {self.cols}")
        if self.terms > min(p * q, r * s):
            raise StructureError(f"{self.terms} terms: {min(p * q, r * s)} already make any weight of this shape")

    @cached_property
    def small_left(self) -> bool:
        return math.prod(self.left) <= math.prod(self.right)

    @property
    def max_rank(self) -> int:
        """The highest rank that the sum can have: that of a product is the product of its factors' ranks."""
        return min(self.terms * min(self.left) * min(self.right), self.rows, self.cols)

    @property
    def small(self) -> tuple[int, int]:
        return self.left if self.small_left else self.right

    @property
    def wide(self) -> tuple[int, int]:
        return self.right if self.small_left else self.left

    @property
    def _order_macs(self) -> tuple[int, int]:
        (p, q), (r, s) = self.small, self.wide
        return self.terms * q * r * (s + p), self.terms * p * s * (q + r)

    @cached_property
    def wide_first(self) -> bool:
        wide_first, mix_first = self._order_macs
        return wide_first <= mix_first

    @property
    def macs(self) -> int:
        return min(self._order_macs)

    @property
    def lookup_macs(self) -> int:
        return self.terms * self.cols

    def operations(self, tokens: int) -> Sequence[Operation]:
        (p, q), (r, s), k = self.small, self.wide, self.terms
        if self.wide_first:
            products = (Gemm(tokens * q, k * r, s), Gemm(p, r, q * k, batch=tokens))
        else:
            products = (Gemm(p * k, s, q, batch=tokens), Gemm(tokens * p, r, k * s))
        read, written = swaps(self._form)
        before = [Pass(2 * tokens * self.cols, strided=True)] if read else []
        after = [Pass(2 * tokens * p * r, strided=True)] if written else []
        return (*before, *products, *after, Pass(2 * tokens * self.rows))

    def factor_specs(self) -> dict[str, TensorSpec]:
        (p, q), (r, s), k = self.small, self.wide, self.terms
        if self.wide_first:
            return {"small": TensorSpec((p, q * k)), "wide": TensorSpec((k * r, s), matrix=True)}
        return {"small": TensorSpec((p * k, q)), "wide": TensorSpec((r, k * s), matrix=True)}

    def pack(self, small: Tensor, wide: Tensor) -> dict[str, Tensor]:
        """Stored layout of small (terms, p, q) and wide (terms, r, s)."""
        (p, q), (r, s), k = self.small, self.wide, self.terms
        if self.wide_first:
            return {"small": small.permute(1, 2, 0).reshape(p, q * k), "wide": wide.reshape(k * r, s)}
        return {"small": small.permute(1, 0, 2).reshape(p * k, q), "wide": wide.permute(1, 0, 2).reshape(r, k * s)}

    def unpack(self, factors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Small (terms, p, q) and wide (terms, r, s), as views."""
        (p, q), (r, s), k = self.small, self.wide, self.terms
        if self.wide_first:
            return factors["small"].view(p, q, k).permute(2, 0, 1), factors["wide"].view(k, r, s)
        return factors["small"].view(p, k, q).permute(1, 0, 2), factors["wide"].view(r, k, s).permute(1, 0, 2)

    def dense(self, factors: Mapping[str, Tensor]) -> Tensor:
        small, wide = self.unpack(factors)
        left, right = (small, wide) if self.small_left else (wide, small)
        product = torch.einsum("kpq,krs->prqs", left, right)
        return product.reshape(-1, self.cols)[: self.rows]

    @cached_property
    def _form(self) -> KronForm:
        (p, q), (r, s) = self.small, self.wide
        return KronForm(p, q, r, s, self.terms, self.wide_first, self.small_left, self.rows)

    @property
    def native(self) -> Native | None:
        return self._form.native if self.rows == self.small[0] * self.wide[0] else None

    def matmul(self, x: Tensor, factors: Mapping[str, Factor], bias: Tensor | None = None) -> Tensor:
        small, wide = plain_matrix(factors["small"]), plain_matrix(factors["wide"])
        traced = _is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if small is None or wide is None or x.is_meta or traced:
            return self._composed(x, factors, bias)
        return kron_linear(x, small, wide, bias, self._form)

    def _composed(self, x: Tensor, factors: Mapping[str, Factor], bias: Tensor | None) -> Tensor:
        """The product for any number of tokens, as an export asks for, or with a wide factor that has to be called."""
        (_, q), (_, s) = self.small, self.wide
        if self.small_left:
            y = self._compose_small_left(x.unflatten(-1, (q, s)), factors)
        else:  # the same product, with both sides of the grid swapped
            grid = x.unflatten(-1, (s, q)).transpose(-1, -2).contiguous()
            y = self._compose_small_left(grid, factors).unflatten(-1, (self.small[0], self.wide[0])).mT.flatten(-2)
        if y.shape[-1] != self.rows:
            y = y[..., : self.rows]
        return y if bias is None else y + bias.to(y.dtype)  # under autocast y is narrower

    def _compose_small_left(self, grid: Tensor, factors: Mapping[str, Factor]) -> Tensor:
        """(..., q, s) -> (..., p * r)."""
        (p, q), (r, s), k = self.small, self.wide, self.terms
        if self.wide_first:
            z = linear(grid, factors["wide"]).flatten(-2)  # (..., q * terms * r)
            return FirstAxis("small", q * k, p, r).run(z, factors["small"])
        z = FirstAxis("small", q, p * k, s).run(grid.flatten(-2), factors["small"])  # (..., p * terms * s)
        return linear(z.unflatten(-1, (p, k * s)), factors["wide"]).flatten(-2)

    def take_rows(self, index: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
        """O(cols * terms) per row: one row of each factor is read, never a factor."""
        (p, q), k = self.small, self.terms
        if p == 1:
            return self._take_wide_rows(index, factors)
        small_index, wide_index = self._factor_rows(index)
        row = torch.embedding(factors["small"].view(p, -1), small_index)
        small = row.unflatten(-1, (q, k)) if self.wide_first else row.unflatten(-1, (k, q)).mT  # (..., q, terms)
        wide = self._wide_rows(wide_index, factors["wide"])  # (..., terms, s)
        before, after = (small, wide) if self.small_left else (wide.mT, small.mT)
        grid: Tensor = before * after if k == 1 else torch.matmul(before, after)  # (..., q, s) or (..., s, q)
        return grid.flatten(-2)

    def _take_wide_rows(self, index: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
        """The same with one small row for all: each operation counts at few tokens, and each pass at many."""
        (_, q), (_, s), k = self.small, self.wide, self.terms
        small, wide = factors["small"], factors["wide"]
        if k == 1:
            row = torch.embedding(wide, index)
            grid = small.view(q, 1) * row.unsqueeze(-2) if self.small_left else row.unsqueeze(-1) * small.view(q)
            return grid.flatten(-2)
        small = small.view(q, k) if self.wide_first else small.view(k, q).t()  # (q, terms)
        rows = self._wide_rows(index, wide)
        if index.numel() == 1 and not is_traced():  # one token: fewer calls
            row = rows.view(k, s)
            grid = torch.mm(small, row) if self.small_left else torch.mm(row.t(), small.t())
            return grid.view(*index.shape, self.cols)
        rows = rows.reshape(-1, k, s)
        smalls = small.expand(rows.shape[0], q, k)
        grid = torch.bmm(smalls, rows) if self.small_left else torch.bmm(rows.mT, smalls.mT)
        return grid.view(*index.shape, self.cols)

    def _factor_rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the small and of the wide factor that make up rows of W."""
        p, r = self.small[0], self.wide[0]
        small, wide = (index // r, index % r) if self.small_left else (index % p, index // p)
        if p * r != self.rows:  # a padded row does not exist either: let the lookup refuse it
            small = small.masked_fill(index >= self.rows, p)
        return small, wide

    def _wide_rows(self, index: Tensor, wide: Tensor) -> Tensor:
        """One row of each term: (...) -> (..., terms, s)."""
        (r, s), k = self.wide, self.terms
        if self.wide_first and k > 1:
            return torch.stack([torch.embedding(term, index) for term in wide.view(k, r, s)], -2)
        rows: Tensor = torch.embedding(wide, index).view(*index.shape, k, s)
        return rows


def _covers(p: int, r: int, rows: int) -> bool:
    """Whether p blocks of r rows hold all rows, and neither fewer blocks nor smaller ones would."""
    return max(p * (r - 1), (p - 1) * r) < rows <= p * r


@register
@final
@dataclass(frozen=True)
class Kronecker(Decomposition):
    """Nearest sum of Kronecker products, by the SVD of the rearranged weight.

    Args:
        terms: number of Kronecker products in the sum.
        small: which factor is the small one: `left` (ours), `right` (the papers' A (x) B), or `both` to let the
            budget choose.
        left: fixed shape (p, q) of the left factor; the right one follows. None: the budget chooses.
        right: fixed shape (r, s) of the right factor.
        rounds: of alternating least squares, at most, where a fit is weighted; 0 solves for the wide factor only.
        full_rank: for linear layers offer only products that can have full rank. What keeps most of a weight is often a
            product like (24 x 1) (x) (16 x 384), of rank 16: as narrow for what is trained afterwards as an SVD.
    """

    name: ClassVar[str] = "kronecker"
    summary: ClassVar[str] = "W ~ sum of `terms` Kronecker products left (x) right"
    source: ClassVar[str] = "Van Loan and Pitsianis 1993; KroneckerBERT, Tahaei et al., NAACL 2022"
    structures: ClassVar[tuple[type[Structure], ...]] = (KroneckerSum,)

    terms: int = 1
    small: Literal["left", "right", "both"] = "left"
    left: tuple[int, int] | None = None
    right: tuple[int, int] | None = None
    rounds: int = 15
    full_rank: bool = False

    def __post_init__(self) -> None:
        if self.terms < 1:
            raise OptionError(f"terms is a number of Kronecker products, at least 1; got {self.terms}")
        if self.rounds < 0:
            raise OptionError(f"rounds is a number of rounds of a weighted fit, at least 0; got {self.rounds}")
        for side in (self.left, self.right):
            if side is not None and not are_sizes(side):
                raise OptionError(f"sizes of a Kronecker factor are two integers from 1 on, as (2, 2); got {side!r}")

    def menu(self, rows: int, cols: int, *, lookup: bool = False) -> Iterable[Structure]:
        offered = self._fixed(rows, cols) if self.left or self.right else self._offered(rows, cols, lookup=lookup)
        narrow = self.full_rank and not lookup
        yield from (structure for structure in offered if not narrow or structure.max_rank == min(rows, cols))

    def _offered(self, rows: int, cols: int, *, lookup: bool) -> Iterator[KroneckerSum]:
        for p, q in _small_shapes(rows, cols, lookup=lookup):
            r, s = -(-rows // p), cols // q
            if self.terms > min(p * q, r * s):
                continue
            if self.small != "right":
                yield KroneckerSum(rows, cols, (p, q), (r, s), self.terms)
            if self.small != "left" and p * q < r * s:
                yield KroneckerSum(rows, cols, (r, s), (p, q), self.terms)

    def _fixed(self, rows: int, cols: int) -> Iterator[KroneckerSum]:
        (p, q) = self.left or (-(-rows // self.right[0]), cols // self.right[1])  # type: ignore[index]
        (r, s) = self.right or (-(-rows // p), cols // q)
        if q * s == cols and _covers(p, r, rows) and self.terms <= min(p * q, r * s):
            yield KroneckerSum(rows, cols, (p, q), (r, s), self.terms)

    def analyse(self, weight: Tensor) -> Analysis:
        return _KroneckerAnalysis(weight)

    def analyse_weighted(self, weight: Tensor, importance: Importance) -> Analysis:
        return _WeightedAnalysis(weight, importance, self.rounds)


def _small_shapes(rows: int, cols: int, *, lookup: bool) -> Iterator[tuple[int, int]]:
    """Shapes of the small factor worth pricing; an embedding keeps one row of its own per word (p = 1)."""
    for p in [1] if lookup else _small_sides(rows):
        for q in _divisors(cols):
            if 1 < p * q <= min(MAX_SMALL_SIZE, -(-rows // p) * (cols // q)):
                yield p, q


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, min(n, MAX_SMALL_SIDE) + 1) if n % d == 0]


def _small_sides(rows: int) -> list[int]:
    """Divisors of `rows`; where they are few, also powers of two that waste next to no padded rows."""
    sides = _divisors(rows)
    if len(sides) >= 5:
        return sides
    powers = (2, 4, 8, 16, 32)
    return sorted({*sides, *(p for p in powers if p <= rows and -rows % p <= MAX_PADDING * rows)})


def _grid(structure: Structure) -> Grid:
    assert isinstance(structure, KroneckerSum)
    return Grid(structure.small_left, *structure.small)


@final
class _KroneckerAnalysis(Analysis):
    """Gram matrices of the blocks of W: one of a fine grid, its partial traces are those of the coarser ones."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._energy = squared_norm(weight)
        self._spectra: dict[Grid, list[float]] = {}

    def squared_errors(self, structures: Sequence[Structure]) -> list[float]:
        self._prepare_spectra({_grid(structure) for structure in structures})
        return [max(self._energy - self._kept(structure), 0.0) for structure in structures]

    def _kept(self, structure: Structure) -> float:
        assert isinstance(structure, KroneckerSum)
        return sum(self._spectra[_grid(structure)][-structure.terms :])

    def _prepare_spectra(self, grids: set[Grid]) -> None:
        """Spectra of all these grids; Gram matrices of one size share a call."""
        missing = sorted(grids - self._spectra.keys())
        by_size: dict[int, list[tuple[Grid, Tensor]]] = {}
        for fine, coarser in cover(tuple(missing), *self._weight.shape, MAX_SMALL_SIZE).items():
            grams = {fine: row_gram(cut(self._weight, fine))}
            for grid, source in coarser:
                grams[grid] = coarsen(grams[source], source, grid)
                by_size.setdefault(grid.size, []).append((grid, grams[grid]))
        for same in by_size.values():
            values = torch.linalg.eigvalsh(torch.stack([gram for _, gram in same]).double())
            self._spectra.update(zip([grid for grid, _ in same], values.tolist(), strict=True))

    def factors(self, structure: Structure) -> dict[str, Tensor]:
        assert isinstance(structure, KroneckerSum)
        (p, q), (r, s), k = structure.small, structure.wide, structure.terms
        blocks = cut(self._weight, _grid(structure))
        _, vectors = torch.linalg.eigh(row_gram(blocks).double())
        top = vectors[:, -k:].flip(-1).T.to(self._weight.dtype)  # (terms, p * q)
        top = top * torch.sign(top.gather(-1, top.abs().argmax(-1, keepdim=True)))  # eigenvectors have no sign
        wide = top @ blocks  # (terms, r * s)
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).sqrt()  # split evenly: both train at one scale
        wide = torch.where(scale > 0, wide / scale, 0.0)
        return structure.pack((top * scale).view(k, p, q), wide.view(k, r, s))


@final
class _WeightedAnalysis(Analysis):
    """Alternating least squares, in core/kron_weighted.py."""

    def __init__(self, weight: Tensor, importance: Importance, rounds: int) -> None:
        self._sums = WeightedSums(weight, importance, rounds)

    def squared_errors(self, structures: Sequence[Structure]) -> list[float]:
        return self._sums.prices([_shape(structure) for structure in structures])

    def squared_errors_beside(self, structures: Sequence[Structure], rivals: Sequence[float]) -> list[float]:
        return self._sums.prices([_shape(structure) for structure in structures], rivals)

    def factors(self, structure: Structure) -> dict[str, Tensor]:
        assert isinstance(structure, KroneckerSum)
        small, wide = self._sums.fit(_shape(structure))
        return structure.pack(small.view(-1, *structure.small), wide.view(-1, *structure.wide))


def _shape(structure: Structure) -> Shape:
    assert isinstance(structure, KroneckerSum)
    return Shape(_grid(structure), structure.terms, structure.num_params)
