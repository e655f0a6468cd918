"""The stack of layers of a transformer, run one at a time on what is kept of its inputs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from compresskit.calibration.calibrate import forward
from compresskit.calibration.collect import undisturbed
from compresskit.calibration.data import Batch, arguments
from compresskit.calibration.masks import Masks
from compresskit.errors import CalibrationError
from compresskit.surgery.sites import Survey


@final
class Stop(Exception):  # noqa: N818 - nothing went wrong
    """Ends a forward pass whose rest is not needed."""


@final
@dataclass(frozen=True)
class Call:
    """What a block got beside the hidden states, in one batch."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@final
@dataclass(frozen=True)
class Stack:
    """The blocks of a model and how they are called on some batches.

    Args:
        names: of the blocks, in forward order.
        batches: as the model takes them.
        masks: of each batch.
        calls: by block, then by batch.
        hidden: what the dense model's first block reads, by batch.
        front: modules of sites that come before the first block, in forward order.
    """

    names: tuple[str, ...]
    batches: tuple[Mapping[str, Tensor], ...]
    masks: tuple[Masks, ...]
    calls: tuple[tuple[Call, ...], ...]
    hidden: tuple[Tensor, ...]
    front: tuple[str, ...]

    def block_of(self, name: str) -> int | None:
        """Which block a module is in."""
        return next((i for i, block in enumerate(self.names) if name.startswith(f"{block}.")), None)

    def run(self, block: nn.Module, index: int, batch: int, hidden: Tensor) -> Tensor:
        """What a block, the model's own or one in its place, makes of hidden states."""
        call = self.calls[index][batch]
        return _hidden_of(block(hidden, *call.args, **call.kwargs))


def find_blocks(model: nn.Module, survey: Survey) -> tuple[str, ...]:
    """Names of the layers of the one stack that an encoder or a decoder-only model has.

    Raises:
        CalibrationError: there is none, or there are several.
    """
    names = [name for site in survey.sites for name in site.names]
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(site.startswith(f"{name}.") for site in names)
    ]
    outer = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    if len(outer) != 1:
        found = ", ".join(name for name, _ in outer) or "none"
        raise CalibrationError(
            "sequential and block-wise fits follow the one list of layers that encoders and decoder-only models have; "
            f"{type(model).__name__} has {len(outer)} ({found}). Leave them out: weighted fits work for any model"
        )
    name, module = outer[0]
    return tuple(f"{name}.{i}" for i in range(len(module)))


def record(model: nn.Module, batches: Sequence[Batch], survey: Survey) -> Stack:
    """Run the dense model once and keep what its first block reads and what every block gets besides.

    Hidden states of one place take batch * time * hidden size floats; nothing else that is large is kept.

    Raises:
        CalibrationError: as `find_blocks`; no sample; or the model does more between its layers than to pass on what
            they return.
    """
    names = find_blocks(model, survey)
    device = next(model.parameters()).device
    given = tuple(arguments(model, batch, device) for batch in batches)
    if not given:
        raise CalibrationError("the data holds no sample")
    calls: list[list[Call]] = [[] for _ in names]
    hidden: list[Tensor] = []
    order: list[str] = []
    passed: list[Tensor] = []

    def enter(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states, rest, named = _split(args, kwargs)
            if index == 0:
                hidden.append(states)
            elif not (passed[-1] is states or torch.equal(passed[-1], states)):
                raise CalibrationError(
                    f"the model changes hidden states between {names[index - 1]!r} and {names[index]!r}, so its layers "
                    "cannot be run one at a time; leave sequential and block-wise fits out"
                )
            calls[index].append(Call(rest, named))

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        passed[:] = [_hidden_of(output)]

    def notice(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: None if name in order else order.append(name)

    sites = [name for site in survey.sites for name in site.names]
    handles = [
        handle
        for index, name in enumerate(names)
        for handle in (
            model.get_submodule(name).register_forward_pre_hook(enter(index), with_kwargs=True),
            model.get_submodule(name).register_forward_hook(leave),
        )
    ]
    handles += [model.get_submodule(name).register_forward_pre_hook(notice(name), with_kwargs=True) for name in sites]
    try:
        with undisturbed(model):
            for batch in given:
                forward(model, batch, gradients=False)
    finally:
        for handle in handles:
            handle.remove()
    if any(len(block) != len(given) for block in calls):
        raise CalibrationError("some layers are skipped or run several times, so they cannot be fitted in order")
    first = next((i for i, name in enumerate(order) if name.startswith(f"{names[0]}.")), len(order))
    masks = tuple(Masks.of(batch) for batch in given)
    return Stack(names, given, masks, tuple(map(tuple, calls)), tuple(hidden), tuple(order[:first]))


def first_hidden(model: nn.Module, stack: Stack) -> list[Tensor]:
    """What the first block of a model with the same blocks reads, by batch; nothing after it is run."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(_split(args, kwargs)[0])
        raise Stop

    handle = model.get_submodule(stack.names[0]).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for batch in stack.batches:
            try:
                forward(model, batch, gradients=False)
            except Stop:
                continue
    finally:
        handle.remove()
    return found


def readers(block: nn.Module, names: Sequence[str], run: Callable[[], Any]) -> list[list[str]]:
    """Names of the layers in a block, those that read one tensor together, in the order in which they are called."""
    groups: list[tuple[Tensor, list[str]]] = []

    def notice(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            group = next((group for tensor, group in groups if tensor is args[0]), None)
            if group is None:
                groups.append((args[0], group := []))
            group.append(name)

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(notice(name)) for name in names]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [group for _, group in groups]


def input_of(block: nn.Module, name: str, run: Callable[[], Any]) -> Tensor:
    """What one layer of a block reads; the block is run as far as it."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0])
        raise Stop

    handle = block.get_submodule(name).register_forward_pre_hook(hook)
    try:
        run()
    except Stop:
        pass
    finally:
        handle.remove()
    return found[0]


def _split(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Hidden states, and what else a block gets."""
    if args:
        return args[0], args[1:], dict(kwargs)
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def _hidden_of(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
