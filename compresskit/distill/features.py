"""What models compute on the way, captured by forward hooks that exist for one forward pass only."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Literal, final

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compresskit.distill.anatomy import Anatomy, Projection
from compresskit.errors import DistillError

Role = Literal["embeddings", "hidden", "query", "key", "value", "ffn", "logits", "start", "end", "next-sentence"]
OUTPUTS: Mapping[str, tuple[str, ...]] = {
    "logits": ("logits", "prediction_logits"),
    "start": ("start_logits",),
    "end": ("end_logits",),
    "next-sentence": ("seq_relationship_logits",),
}
"""Roles that stand in what the model returns, with their names there."""


@final
@dataclass(frozen=True, order=True)
class Feature:
    """One tensor that a model computes.

    Args:
        role: embeddings: (batch, time, hidden), what the first layer gets. hidden: (batch, time, hidden), what layer
            `layer` returns, before a final normalisation of the whole model. query, key, value: (batch, time, heads,
            head size). ffn: (batch, time, hidden), the output of the feed-forward network before dropout, residual
            and normalisation. logits: as the model returns them. start, end: (batch, time). next-sentence: (batch, 2).
        layer: counted from 0; 0 for roles that there is only one of.
    """

    role: Role
    layer: int = 0

    def __str__(self) -> str:
        return self.role if self.role in OUTPUTS or self.role == "embeddings" else f"{self.role}.{self.layer}"


Features = Mapping[Feature, Tensor]


@final
class Recorder:
    """Context in which one forward pass of a model leaves the wanted features in `features`.

    Hooks are set on entering and removed on leaving, so that the recomputation of gradient checkpointing, which
    happens later, records nothing. Modules that are called several times (ALBERT) are told apart by the call.

    Args:
        anatomy: of the model.
        wanted: only what is named here is kept.
    """

    def __init__(self, anatomy: Anatomy, wanted: Iterable[Feature]) -> None:
        self.anatomy = anatomy
        self.wanted = tuple(sorted(set(wanted)))
        self.features: dict[Feature, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "Recorder":
        self.features = {}
        for module, by_call in self._watched().items():
            self._handles.append(module.register_forward_hook(_Watch(by_call), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def take_outputs(self, outputs: Any) -> None:
        """Keep those wanted features that the model has returned.

        Raises:
            DistillError: it has not returned one of them.
        """
        for feature in self.wanted:
            if feature.role in OUTPUTS:
                found = [outputs[name] for name in OUTPUTS[feature.role] if outputs.get(name) is not None]
                if not found:
                    raise DistillError(
                        f"the {self.anatomy.role} ({type(self.anatomy.model).__name__}) returns no "
                        f"{' or '.join(OUTPUTS[feature.role])}; it returns {', '.join(outputs)}"
                    )
                self.features[feature] = found[0]
        self._check_complete()

    def _check_complete(self) -> None:
        missing = [str(feature) for feature in self.wanted if feature not in self.features]
        if missing:
            raise DistillError(f"the {self.anatomy.role} did not compute {', '.join(missing)} in this forward pass")

    def _watched(self) -> dict[nn.Module, dict[int, list[Callable[[Any, Any, Any], None]]]]:
        """Module -> number of its call -> what to do with (args, kwargs, output)."""
        watched: dict[nn.Module, dict[int, list[Callable[[Any, Any, Any], None]]]] = {}
        for feature in self.wanted:
            if feature.role in OUTPUTS:
                continue
            layer = self.anatomy.layers[feature.layer]
            call = self.anatomy.layers[: feature.layer].count(layer)
            module = layer if feature.role in ("embeddings", "hidden") else _inside(self.anatomy, layer, feature.role)
            watched.setdefault(module, {}).setdefault(call, []).append(partial(self._keep, feature))
        return watched

    def _keep(self, feature: Feature, args: Any, kwargs: Any, output: Any) -> None:
        if feature.role == "embeddings":
            self.features[feature] = args[0] if args else kwargs["hidden_states"]
            return
        tensor = output[0] if isinstance(output, tuple) else output
        if feature.role in ("query", "key", "value"):
            tensor = split_heads(self.anatomy, feature.role, tensor)
        self.features[feature] = tensor


@final
class _Watch:
    """A forward hook that counts the calls of its module."""

    def __init__(self, by_call: Mapping[int, list[Callable[[Any, Any, Any], None]]]) -> None:
        self.by_call = by_call
        self.calls = 0

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        for keep in self.by_call.get(self.calls, ()):
            keep(args, kwargs, output)
        self.calls += 1


def _inside(anatomy: Anatomy, layer: nn.Module, role: str) -> nn.Module:
    path: str = getattr(anatomy.layout, role)
    return layer.get_submodule(path)


def split_heads(anatomy: Anatomy, projection: Projection, tensor: Tensor) -> Tensor:
    """(batch, time, width) -> (batch, time, heads, head size); of a fused projection, its part."""
    if anatomy.layout.fused:
        tensor = tensor.chunk(3, dim=-1)[("query", "key", "value").index(projection)]
    split: Tensor = tensor.unflatten(-1, (anatomy.num_heads(projection), -1))
    return split
