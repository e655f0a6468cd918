"""One pass over the samples: hooks on every layer add up what they see. The model is left as it was."""

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from compresskit.calibration.masks import Masks
from compresskit.calibration.moments import Use
from compresskit.core.folding import strips
from compresskit.errors import CalibrationError
from compresskit.surgery.sites import Site

BYTES = 4
STRIPS = 8
"""Of a second moment: 9/16 of it are multiplied."""


@final
class Sums:
    """Sum of x x^T (or of x^2) and of x over tokens.

    Products are float32 and are added up in float32: after 128 texts that differs from float64 throughout by about 1e-7
    of the trace (a test holds it below 1e-6), at half the memory. Means are float64.
    """

    def __init__(self, width: int, *, full: bool, device: torch.device) -> None:
        self.second = torch.zeros((width, width) if full else (width,), device=device)
        self.first = torch.zeros(width, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Add rows of x (tokens, width), float32.

        Raises:
            FloatingPointError: NaN, infinity, or values whose squares are.
        """
        first, squares = x.sum(0, dtype=torch.float64), x.square().sum(0)
        if not bool(torch.isfinite(first).all() & torch.isfinite(squares.sum())):
            raise FloatingPointError
        if self.second.dim() == 2:
            self._add_products(x)
        else:
            self.second += squares
        self.first += first
        self.tokens += len(x)

    def _add_products(self, x: Tensor) -> None:
        """Add x^T x in strips, each from the diagonal on: little more than half of it is multiplied."""
        for strip in strips(len(self.second), STRIPS):
            self.second[strip, strip.start :].addmm_(x[:, strip].T, x[:, strip.start :])

    def means(self) -> tuple[Tensor, Tensor]:
        """Mean of x x^T (or of x^2) and of x, on the CPU."""
        count = max(self.tokens, 1)
        second = self.second if self.second.dim() == 1 else self.second.triu() + self.second.triu(1).T
        return (second / count).cpu(), (self.first / count).float().cpu()


@final
@dataclass(frozen=True)
class Shape:
    """Name, kind and weight shape of one module."""

    name: str
    site: Site
    embedding: bool


def shapes_of(sites: tuple[Site, ...]) -> list[Shape]:
    """Every module of every site."""
    return [
        Shape(name, site, kind == "embedding")
        for site in sites
        for name, kind in zip(site.names, site.kinds, strict=True)
    ]


@final
class Collector:
    """Sums for each input tensor that layers read, for lookups, and for gradients if asked.

    Layers that read the very same tensor object (query, key and value) share one sum. Who shares is found out in a
    trial pass over one batch that adds nothing up, so the memory is known before any of it is taken.

    Args:
        shapes: of the modules to watch.
        max_width: wider inputs and outputs get the diagonal only.
        share: false: each layer has its own sum.
        gradients: also watch outputs; then a backward pass must follow each forward pass.
    """

    def __init__(self, shapes: list[Shape], *, max_width: int, share: bool, gradients: bool) -> None:
        self._shapes = shapes
        self._max_width = max_width
        self._share = share
        self._gradients = gradients
        self._masks = Masks(None)
        self._leader: dict[str, str] = {}  # layer -> the first that read the same tensor
        self._inputs: dict[str, Sums] = {}  # by leader
        self._outputs: dict[str, Sums] = {}
        self._counts: dict[str, Tensor] = {}
        self._alone: set[str] = set()  # layers that read several tensors, shared with different others
        self._read: list[tuple[weakref.ref[Tensor], str]] = []  # tensors of this forward pass, and who read them first
        self._trial = True
        self._batch = 0
        self.unmasked: set[str] = set()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Hooks on while it lasts."""
        handles: list[Any] = []
        try:
            for shape in self._shapes:
                module = model.get_submodule(shape.name)
                take = self._look_up if shape.embedding else self._take
                handles.append(
                    module.register_forward_pre_hook(functools.partial(_first_argument, take, shape), with_kwargs=True)
                )
                if self._gradients:
                    handles.append(module.register_forward_hook(functools.partial(self._watch_output, shape)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, masks: Masks, *, batch: int, trial: bool = False) -> None:
        """Say what the next forward pass is about."""
        if self._trial and not trial:  # who follows a layer that turned out to be alone finds another leader
            self._leader = {name: by for name, by in self._leader.items() if by == name or by not in self._alone}
        self._masks, self._batch, self._trial = masks, batch, trial
        self._read.clear()

    def memory_bytes(self) -> int:
        """That all sums take once every layer was reached; those that share are known after the trial."""
        total = 0
        for shape in self._shapes:
            rows, cols = shape.site.rows, shape.site.cols
            if shape.embedding:
                total += 8 * rows
            elif self._leader.get(shape.name, shape.name) == shape.name:
                total += BYTES * (cols * cols if cols <= self._max_width else cols) + 8 * cols
            if self._gradients:
                width = cols if shape.embedding else rows
                total += BYTES * (width * width if width <= self._max_width else width)
        return total

    def _take(self, shape: Shape, x: Tensor) -> None:
        leader = self._leader_of(shape.name, x)
        if self._trial:
            if self._leader.setdefault(shape.name, leader) != leader:
                self._alone.add(shape.name)
                self._leader[shape.name] = shape.name
            return
        expected = self._leader.setdefault(shape.name, leader)
        if leader != expected:
            raise CalibrationError(
                f"{shape.name!r} and {expected if expected != shape.name else leader!r} read the same tensor in some "
                "batches but not in all; pass share=False"
            )
        if leader == shape.name:
            self._add(self._inputs, shape.name, x, shape.site.cols, "input")

    def _leader_of(self, name: str, x: Tensor) -> str:
        if self._share and name not in self._alone:
            for reference, reader in self._read:
                if reference() is x:
                    return reader
            self._read.append((weakref.ref(x), name))
        return name

    def _look_up(self, shape: Shape, index: Tensor) -> None:
        if self._trial:
            return
        counts = self._counts.setdefault(shape.name, torch.zeros(shape.site.rows, dtype=torch.float64))
        weights = self._masks.lookups(shape.name, tuple(index.shape))
        if weights is not None:
            weights = weights.cpu()
        counts += torch.bincount(index.flatten().cpu(), weights, minlength=shape.site.rows)

    def _watch_output(self, shape: Shape, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        width = shape.site.cols if shape.embedding else shape.site.rows

        def take(gradient: Tensor) -> None:
            if not self._trial:
                self._add(self._outputs, shape.name, gradient, width, "gradient at the output")

        if output.requires_grad:
            output.register_hook(take)
            return None
        leaf = output.detach().requires_grad_()  # the graph begins here: no gradients of weights are computed
        leaf.register_hook(take)
        return leaf.clone()  # which model code may change in place

    def _add(self, sums: dict[str, Sums], name: str, x: Tensor, width: int, what: str) -> None:
        rows, known = self._masks.real(name, tuple(x.shape[:-1]))
        if not known:
            self.unmasked.add(name)
        flat = x.detach().reshape(-1, width).float()
        if rows is not None:
            flat = flat[rows.to(flat.device)]
        if name not in sums:
            sums[name] = Sums(width, full=width <= self._max_width, device=flat.device)
        try:
            sums[name].add(flat)
        except FloatingPointError:
            bad = int((~torch.isfinite(flat)).sum())
            found = f"{bad:,} values that are NaN or infinite" if bad else "values whose squares overflow"
            raise CalibrationError(
                f"the {what} of {name!r} has {found} in batch {self._batch}; nothing after it can be trusted"
            ) from None

    def uses(self) -> dict[str, Use]:
        """What was seen, on the CPU, for each module that was reached; frees the sums."""
        inputs = {name: sums.means() for name, sums in self._inputs.items()}
        outputs = {name: sums.means()[0] for name, sums in self._outputs.items() if sums.tokens}
        tokens = {name: sums.tokens for name, sums in self._inputs.items()}
        self._inputs.clear()
        self._outputs.clear()
        uses: dict[str, Use] = {}
        for shape in self._shapes:
            name, site = shape.name, shape.site
            if shape.embedding and self._counts.get(name, torch.zeros(())).any():
                counts = self._counts[name]
                uses[name] = Use(
                    "embedding", site.rows, site.cols, int(counts.sum()), counts=counts, gradients=outputs.get(name)
                )
            leader = self._leader.get(name, name)
            if not shape.embedding and tokens.get(leader):
                second, mean = inputs[leader]
                kind = site.kinds[site.names.index(name)]
                uses[name] = Use(kind, site.rows, site.cols, tokens[leader], second, mean, None, outputs.get(name))
        return uses


def _first_argument(
    take: Callable[[Shape, Tensor], None], shape: Shape, module: nn.Module, args: Any, kwargs: Any
) -> None:
    take(shape, args[0] if args else next(iter(kwargs.values())))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode with frozen parameters while it lasts; then every mode and flag as before."""
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for module in modes:
            module.training = False
        for parameter in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
