"""A teacher's answers on disk, for data that is seen more than once.

A folder holds one subfolder for each fingerprint (of the teacher's weights and configuration, of what is captured and
of how it is stored), and in it safetensors files with many examples each. An example is one row of numbers (see
`Layout`) under a digest of its unpadded inputs, so shuffling, padding and batching do not matter. Several processes may
share a folder.
"""

import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compresskit.distill.layout import Layout
from compresskit.errors import OptionError

Stored = Literal["float16", "bfloat16", "float32"]

FORMAT_VERSION = 2
SHARD_BYTES = 64 * 2**20
"""Examples are written together in files of about this size."""


@final
@dataclass
class TeacherCache:
    """Where a teacher's answers are kept between epochs and runs.

    What is found is what was computed, rounded to `stored`; a batch whose answers are new is rounded likewise, so it
    makes no difference to the training whether an answer was found or computed.

    Args:
        folder: made when needed.
        max_bytes: of all files of one fingerprint. What no longer fits is not kept, with a warning: the teacher is
            asked about it each time, as without a cache.
        stored: type of the numbers on disk. float16 keeps 11 bits and ends at 65504, bfloat16 keeps 8 bits.
    """

    folder: Path
    max_bytes: int = 20 * 2**30
    stored: Stored = "float16"
    _store: "Store | None" = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        if self.max_bytes < 1:
            raise OptionError(f"max_bytes is positive, got {self.max_bytes}")
        if self.stored not in ("float16", "bfloat16", "float32"):
            raise OptionError(f"stored is float16, bfloat16 or float32, got {self.stored!r}")

    @property
    def dtype(self) -> torch.dtype:
        kinds = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
        return kinds[self.stored]

    def open(self, fingerprint: str) -> "Store":
        """The answers of one teacher to one question."""
        return Store(self.folder / fingerprint, self.max_bytes, self.dtype)


@final
class Store:
    """Examples by digest, written to files once there are enough of them.

    Args:
        folder: of one fingerprint.
        max_bytes: of the files in it.
        dtype: of the tensors in them.
    """

    def __init__(self, folder: Path, max_bytes: int, dtype: torch.dtype) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.dtype = dtype
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._where: dict[str, Path] = {}
        self._files: dict[Path, int] = {}
        self._open: dict[Path, object] = {}
        self._full = False
        self.layout: Layout | None = None
        """Of all examples here, once there is one."""

    def get(self, digest: str) -> Tensor | None:
        """The numbers of an example as they were put; None if it is not here."""
        if digest in self._pending:
            return self._pending[digest]
        path = self._where.get(digest)
        if path is None:
            return None
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        found: Tensor = self._open[path].get_tensor(digest)  # type: ignore[attr-defined]
        return found

    def put(self, digest: str, numbers: Tensor) -> None:
        """Keep the numbers of an example, in our layout and type; they share no memory with others."""
        if self._full:
            return
        self._pending[digest] = numbers
        self._pending_bytes += numbers.nbytes
        if self._pending_bytes >= min(SHARD_BYTES, self.max_bytes):
            self.flush()

    def flush(self) -> None:
        """Write what is only in memory; afterwards other processes find it, and so does a later run.

        If the files would grow over the limit, it is dropped instead, with a warning, and no more is kept.
        """
        if not self._pending:
            return
        self.refresh()
        if sum(self._files.values()) + self._pending_bytes > self.max_bytes:
            each = self._pending_bytes // len(self._pending)
            self._full, self._pending, self._pending_bytes = True, {}, 0
            warnings.warn(
                f"the teacher's cache {self.folder} is limited to {self.max_bytes:,} bytes and keeps the answers of "
                f"{len(self._where):,} examples; others, of {each:,} bytes each, are computed each time that they are "
                "seen (inputs that change from epoch to epoch, as with dynamic masking, are never found again)",
                stacklevel=2,
            )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        partial = path.with_suffix(".partial")
        layout = [] if self.layout is None else self.layout.to_json()
        said = {"digests": list(self._pending), "layout": layout}
        try:
            save_file(self._pending, partial, metadata={name: json.dumps(value) for name, value in said.items()})
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        self._pending, self._pending_bytes = {}, 0
        self.refresh()

    def refresh(self) -> None:
        """Learn of files that this or another process has written."""
        if not self.folder.is_dir():
            return
        for path in sorted(self.folder.glob("*.safetensors")):
            if path not in self._files:
                with safe_open(path, framework="pt") as reader:
                    said = {name: json.loads(value) for name, value in (reader.metadata() or {}).items()}
                self._files[path] = path.stat().st_size
                self._where.update(dict.fromkeys(said.get("digests", ()), path))
                self.layout = self.layout or Layout.from_json(said["layout"])


def fingerprint(config: Mapping[str, object], state: Mapping[str, Tensor], question: Sequence[str]) -> str:
    """Digest of a teacher and of what it is asked.

    Args:
        config: of the teacher.
        state: its weights by name.
        question: names of what is captured, and what else changes the answer.
    """
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, config, list(question)], sort_keys=True, default=str).encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_array(tensor).tobytes())
    return digest.hexdigest()[:32]


def digests(inputs: Mapping[str, Tensor], mask: Tensor) -> list[str]:
    """One digest per example of a batch, of its inputs without padding.

    Args:
        inputs: (batch, ...) tensors by name; those of shape (batch, time, ...) are cut by the mask.
        mask: (batch, time) bool.
    """
    found, kept = [], mask.cpu().numpy()
    named = sorted((name, tensor) for name, tensor in inputs.items() if name != "attention_mask")
    arrays = [
        (f"{name} {tensor.dtype} {tuple(tensor.shape[2:])}".encode(), _array(tensor), tensor.shape[:2] == mask.shape)
        for name, tensor in named
    ]
    for row in range(len(kept)):
        digest = hashlib.sha256()
        for said, array, per_token in arrays:
            values = array[row][kept[row]] if per_token else array[row]
            digest.update(said + b" %d " % len(values))
            digest.update(values.tobytes())
        found.append(digest.hexdigest()[:32])
    return found


def _array(tensor: Tensor) -> Any:
    """Its bytes, (..., bytes of a number)."""
    whole = tensor.detach().cpu().contiguous()
    return whole.view(-1).view(torch.uint8).view(*whole.shape, whole.element_size()).numpy()
