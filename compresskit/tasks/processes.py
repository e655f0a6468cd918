"""One training in several processes, as `torchrun` and `accelerate launch` start them: what only one of them may do."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, final

import torch
from accelerate import PartialState
from torch import distributed

from compresskit.errors import TrainingError

T = TypeVar("T")
NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What launchers tell each of several processes, besides WORLD_SIZE."""


@final
class Processes:
    """The processes of this training; one, unless a launcher says otherwise.

    They share a file system. An error in the first one ends it, and the launcher then ends the others.

    Args:
        device: where models train: how processes talk to each other depends on it.

    Raises:
        TrainingError: there are to be several, but no launcher has said which of them this is.
    """

    def __init__(self, device: torch.device) -> None:
        self._alone = _number() == 1
        missing = [name for name in NEEDED if name not in os.environ]
        if not self._alone and missing:
            raise TrainingError(
                f"WORLD_SIZE is {_number()}, but {' and '.join(missing)} are not set: start the processes by torchrun "
                "or accelerate launch, or unset WORLD_SIZE for one"
            )
        if not self._alone:
            PartialState(cpu=device.type == "cpu")

    @property
    def alone(self) -> bool:
        return self._alone

    @property
    def first(self) -> bool:
        """Whether this is the one that writes, and speaks to people."""
        return is_first()

    def wait(self) -> None:
        """Until all processes are here."""
        if not self._alone:
            PartialState().wait_for_everyone()

    def once(self, do: Callable[[], T]) -> T:
        """Do it in the first process alone; all get what it returned, which can be pickled."""
        if self._alone:
            return do()
        found = [do() if self.first else None]
        distributed.broadcast_object_list(found)
        return found[0]  # type: ignore[return-value]

    @contextmanager
    def first_then_others(self) -> Iterator[None]:
        """The first process does it before the others, which then find what it kept on disk."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def leave(self) -> None:
        """After the last of what they do together."""
        self.wait()
        if not self._alone and distributed.is_initialized():
            distributed.destroy_process_group()


def is_first() -> bool:
    """Whether this process is the only one of its training, or the first; without asking the others."""
    return _number() == 1 or int(os.environ.get("RANK", "0")) == 0


def _number() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def agreed(flag: bool, args: Any) -> bool:
    """What the first process says, in all of them.

    Args:
        args: `transformers.TrainingArguments`.
    """
    if args is None or args.world_size == 1:
        return flag
    said = torch.tensor([int(flag)], device=args.device)
    distributed.broadcast(said, src=0)
    return bool(said.item())
