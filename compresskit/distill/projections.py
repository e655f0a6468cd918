"""Learned projections: trained with the student, kept beside its checkpoints to resume from, never part of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compresskit.errors import CheckpointError

FILE = "distillation_projections.safetensors"
ATTRIBUTE = "distillation_projections"
"""Name of the student's child while it is being trained, so that optimiser, clipping and DDP treat them alike."""


@final
class Projections:
    """The projections of one training.

    Args:
        student: whose child they are while it is trained.
        modules: by term; may be empty.
    """

    def __init__(self, student: nn.Module, modules: nn.ModuleDict) -> None:
        self.student = student
        self.modules = modules

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Make them a child of the student for as long as the context lasts."""
        if not len(self.modules):
            yield
            return
        self.student.add_module(ATTRIBUTE, self.modules)
        try:
            yield
        finally:
            delattr(self.student, ATTRIBUTE)

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Take them away from the student, if they are there, for as long as the context lasts."""
        if not hasattr(self.student, ATTRIBUTE):
            yield
            return
        delattr(self.student, ATTRIBUTE)
        try:
            yield
        finally:
            self.student.add_module(ATTRIBUTE, self.modules)

    def save(self, folder: Path) -> None:
        """Write them into a checkpoint's folder."""
        if len(self.modules):
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.modules.state_dict().items()}
            save_file(state, folder / FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing or is for other terms or sizes.
        """
        if not len(self.modules):
            return
        path = folder / FILE
        if not path.exists():
            raise CheckpointError(f"{folder} has no {FILE}, so it is not a checkpoint of this training")
        saved: dict[str, Tensor] = load_file(path)
        ours = self.modules.state_dict()
        if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in ours.items()}:
            raise CheckpointError(
                f"{path} has the projections {sorted(saved)}, this objective {sorted(ours)}, or of other sizes"
            )
        self.modules.load_state_dict(saved)
