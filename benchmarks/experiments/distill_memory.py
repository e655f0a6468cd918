"""What a step of distillation takes where freed memory goes back to the system, and where it is kept."""

import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, final

from benchmarks.experiments import Experiment, Outcome

HUGE = "THP_MEM_ALLOC_ENABLE"
"""PyTorch's variable for large tensors in huge pages."""
WAYS: Mapping[str, Mapping[str, str]] = {
    "small": {HUGE: "0", "memory": "system"},
    "system": {HUGE: "1", "memory": "system"},
    "kept": {HUGE: "1", "memory": "kept"},
}
"""Ordinary pages that go back; huge ones that do; huge ones that are kept, as by `compresskit distill`."""


@final
@dataclass(frozen=True, kw_only=True)
class DistillMemory(Experiment):
    """Time of a step of `DistillationTrainer` by what becomes of memory; without dropout, texts of one length.

    Each way is a process of its own, in turns.

    Args:
        method, ratio: of the student, a compressed copy of the teacher.
        model: the teacher: `minilm`, or a random one.
        batch, tokens: size of the batch.
        dtype: that products are done in.
        repeats: processes of each way, of eight steps each; figures are medians over all steps.
    """

    kind: ClassVar[str] = "distill-memory"

    method: str = "kronecker"
    ratio: float = 8
    model: str = "minilm"
    batch: int = 32
    tokens: int = 64
    dtype: str = "float32"
    repeats: int = 4

    def run(self, data: Path | None) -> Outcome:
        from benchmarks.timing import run_process

        names = ("model", "method", "ratio", "batch", "tokens", "seed")
        options = {name: getattr(self, name) for name in names}
        given = json.dumps({**options, "padded": False, "bf16": self.dtype == "bfloat16", "dropout": False})
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        peaks: dict[str, list[int]] = {way: [] for way in WAYS}
        with TemporaryDirectory() as folder:
            path = Path(folder) / "times.json"
            for _ in range(self.repeats):
                for way, said in WAYS.items():
                    command = [
                        sys.executable,
                        "-m",
                        "benchmarks.distillation",
                        given,
                        "ours",
                        str(path),
                        said["memory"],
                    ]
                    peaks[way].append(run_process(command, {HUGE: said[HUGE]}).peak_bytes)
                    times[way] += json.loads(path.read_text())
        time = {way: statistics.median(found) for way, found in times.items()}
        peak = {way: statistics.median(found) for way, found in peaks.items()}
        return Outcome(
            {
                "time_over_small": time["kept"] / time["small"],
                "time_over_system": time["kept"] / time["system"],
                "peak_over_small": peak["kept"] / peak["small"],
                "peak_over_system": peak["kept"] / peak["system"],
                "times_s": times,
                "peak_bytes": peaks,
            }
        )

    @classmethod
    def row(cls, configuration: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, str]:
        return {
            "method": configuration["method"],
            "multiplies in": configuration["dtype"],
            "batch": f"{configuration['batch']} x {configuration['tokens']}",
            "time, kept / ordinary pages": f"{figures['time_over_small']:.2f}",
            "time, kept / huge pages": f"{figures['time_over_system']:.2f}",
            "peak memory, kept / ordinary pages": f"{figures['peak_over_small']:.2f}",
            "peak memory, kept / huge pages": f"{figures['peak_over_system']:.2f}",
        }
