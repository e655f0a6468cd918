"""What a loss is: it names the features to compare and compares them. And the registry of losses."""

import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, TypeVar, final

from torch import Tensor

from compresskit.distill.anatomy import Anatomy
from compresskit.distill.batch import Batch, Unit
from compresskit.distill.features import Feature, Role
from compresskit.errors import DistillError, OptionError, UnknownNameError
from compresskit.options import option_text, parse_options
from compresskit.registration import check_class, class_path, suggestion

L = TypeVar("L", bound=type["Loss"])
Tensors = tuple[Tensor, ...]
Projected = Literal["none", "linear"]


@final
@dataclass(frozen=True)
class Comparison:
    """Features of the student, features of the teacher, and how far they are apart.

    Args:
        student, teacher: what `compare` gets, in this order.
        unit: what `compare` sums over.
        compare: (student's tensors, teacher's tensors, batch) -> a sum over the batch's units, float32, no dimension.
        projection: (from, to) sizes of a learned linear map of each of the student's tensors, or None.
    """

    student: tuple[Feature, ...]
    teacher: tuple[Feature, ...]
    unit: Unit
    compare: Callable[[Tensors, Tensors, Batch], Tensor]
    projection: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Loss(ABC):
    """One term of an objective: a frozen dataclass whose fields are its options.

    Args:
        weight: factor of the term.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]

    weight: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise OptionError(f"the weight of {self.name} is a positive number, got {self.weight}; leave the term out")

    @abstractmethod
    def comparisons(self, student: Anatomy, teacher: Anatomy) -> tuple[Comparison, ...]:
        """What to compare; their sums are added.

        Raises:
            DistillError: these two models cannot be compared so; says what would do.
        """


@dataclass(frozen=True, kw_only=True)
class LayerLoss(Loss):
    """A loss that compares layers, and adds them up.

    Args:
        layers: of the student, counted from 0, or from -1 backwards; none is all.
        teacher_layers: the teacher's layer for each of them; none is the same layer, or in a student with fewer layers
            the one at the same part of the depth: layer i of S is compared with (i + 1) T / S - 1 of T (TinyBERT's
            uniform mapping, Jiao et al. 2020, section 4).
    """

    layers: tuple[int, ...] | None = None
    teacher_layers: tuple[int, ...] | None = None

    def layer_pairs(self, student: Anatomy, teacher: Anatomy) -> list[tuple[int, int]]:
        """(student's layer, teacher's layer), each counted from 0."""
        layers = self._layers(tuple(range(student.num_layers)) if self.layers is None else self.layers, student)
        if self.teacher_layers is not None:
            others = self._layers(self.teacher_layers, teacher)
            if len(others) != len(layers):
                raise DistillError(
                    f"{self.name}: {len(layers)} layers of the student and {len(others)} of the teacher do not pair up"
                )
            return list(zip(layers, others, strict=True))
        if teacher.num_layers % student.num_layers:
            raise DistillError(
                f"{self.name}: the student has {student.num_layers} layers and the teacher {teacher.num_layers}, "
                "which is no multiple of it; say with layers and teacher_layers which to compare"
            )
        step = teacher.num_layers // student.num_layers
        return [(i, (i + 1) * step - 1) for i in layers]

    def _layers(self, layers: tuple[int, ...], anatomy: Anatomy) -> list[int]:
        depth = anatomy.num_layers
        for layer in layers:
            if not -depth <= layer < depth:
                raise DistillError(f"{self.name}: layer {layer} of the {anatomy.role}, which has {depth} layers")
        return [layer % depth for layer in layers]


def same_roles(pairs: list[tuple[int, int]], *roles: Role) -> list[tuple[tuple[Feature, ...], tuple[Feature, ...]]]:
    """For each pair of layers the features of these roles in the student and in the teacher."""
    return [(tuple(Feature(r, s) for r in roles), tuple(Feature(r, t) for r in roles)) for s, t in pairs]


def projection_sizes(name: str, projection: Projected, student: Anatomy, teacher: Anatomy) -> tuple[int, int] | None:
    """Sizes of the learned map between hidden states, None without one.

    Raises:
        DistillError: the sizes differ and there is no projection.
    """
    if projection == "linear":
        return student.hidden_size, teacher.hidden_size
    if student.hidden_size != teacher.hidden_size:
        raise DistillError(
            f"{name}: the student's hidden size is {student.hidden_size}, the teacher's {teacher.hidden_size}; "
            "projection=linear learns a map between them"
        )
    return None


def check_heads(name: str, student: Anatomy, teacher: Anatomy) -> None:
    """Raise DistillError unless both models have as many heads."""
    heads = student.num_heads("query"), teacher.num_heads("query")
    if heads[0] != heads[1]:
        raise DistillError(
            f"{name}: the student has {heads[0]} heads and the teacher {heads[1]}; heads are compared one by one. "
            "Relations with heads=... compare models with any heads"
        )


_losses: dict[str, type[Loss]] = {}


def register(cls: L) -> L:
    """Class decorator: check the contract of a loss and make it known by its name.

    Raises:
        OptionError: the class breaks the contract; the message says where.
    """
    check_class(cls, Loss, ("name", "summary", "source"))
    known = _losses.get(cls.name)
    if known is not None and class_path(known) != class_path(cls):
        raise OptionError(f"two losses are called {cls.name!r}: {known.__module__} and {cls.__module__}")
    _losses[cls.name] = cls
    return cls


@cache
def _load_files() -> None:
    package = importlib.import_module("compresskit.distill.terms")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def losses() -> Mapping[str, type[Loss]]:
    """All losses by name: each file of `compresskit.distill.terms`, and what else has registered itself."""
    _load_files()
    return dict(sorted(_losses.items()))


def make_loss(name: str, options: Mapping[str, Any] | None = None) -> Loss:
    """The loss of this name, its options as text or as plain data.

    Raises:
        UnknownNameError: no such loss or option; names the nearest one.
        OptionError: a value that the option cannot take.
    """
    known = losses()
    if name not in known:
        raise UnknownNameError(f"no loss is called {name!r}{suggestion(name, known)}")
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in (options or {}).items()}
    return parse_options(known[name], {key: option_text(value) for key, value in plain.items()})
