"""What the whole command costs, from the start of the process to its end, on a checkpoint of bert-base's shapes.

`compresskit compress FOLDER` takes turns with a process that only loads the same checkpoint and saves it again. The
measuring process must stay small, for the peak that the system reports of a process is never below its parent's.
"""

import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from benchmarks.experiments import Experiment, Outcome
from benchmarks.timing import ProcessCost, against, interleave, median_ratio, run_process

MAX_TIME_RATIO = 2.5
"""Target at bert-base shapes: wall time against loading and saving."""
MAX_MEMORY_RATIO = 2.5
"""Target at bert-base shapes: peak memory against the bytes of the model."""

BUILD = """
import sys
from benchmarks.models import build_bert
build_bert(sys.argv[1], seed=int(sys.argv[2])).save_pretrained(sys.argv[3])
"""
COPY = """
import sys
from transformers import AutoModel
AutoModel.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
"""


@final
@dataclass(frozen=True, kw_only=True)
class Command(Experiment):
    """Wall time and peak memory of `compresskit compress` against loading and saving.

    Args:
        method, ratio: what the command is asked for.
        shape: of the random model.
        repeats: rounds; the figures are their medians, of memory the largest.
    """

    kind: ClassVar[str] = "command"

    method: str
    ratio: float
    shape: str = "bert-base"
    repeats: int = 5

    def run(self, data: Path | None) -> Outcome:
        costs: dict[str, list[ProcessCost]] = {"compress": [], "copy": []}
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "dense"
            run_process([sys.executable, "-c", BUILD, self.shape, str(self.seed), str(source)])
            model_bytes = sum(file.stat().st_size for file in source.glob("*.safetensors"))

            def measure(name: str) -> float:
                with tempfile.TemporaryDirectory(dir=folder) as target:
                    costs[name].append(run_process(self._command(name, source, Path(target) / "output")))
                return costs[name][-1].time_s

            tasks = {name: (lambda name=name: measure(name)) for name in costs}
            times = interleave(tasks, self.repeats)
        peaks = {name: max(cost.peak_bytes for cost in costs[name]) for name in costs}
        return Outcome(
            {
                "time_ratio": median_ratio(times["compress"], times["copy"]),
                "memory_ratio": peaks["compress"] / model_bytes,
                "copy_memory_ratio": peaks["copy"] / model_bytes,
                "model_bytes": model_bytes,
                "compress_peak_bytes": peaks["compress"],
                "copy_peak_bytes": peaks["copy"],
                "compress_time_s": statistics.median(times["compress"]),
                "copy_time_s": statistics.median(times["copy"]),
                "compress_times_s": times["compress"],
                "copy_times_s": times["copy"],
            }
        )

    def _command(self, name: str, source: Path, output: Path) -> list[str]:
        if name == "copy":
            return [sys.executable, "-c", COPY, str(source), str(output)]
        options = ["--method", self.method, "--ratio", str(self.ratio), "--output", str(output)]
        return [sys.executable, "-m", "compresskit_cli", "compress", str(source), *options]

    @classmethod
    def row(cls, configuration: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, str]:
        full = configuration["shape"] == "bert-base"
        return {
            "method": configuration["method"],
            "ratio": f"{configuration['ratio']:g}",
            "time / load and save": f"{figures['time_ratio']:.2f}",
            "target for time": against(MAX_TIME_RATIO if full else None, figures["time_ratio"]),
            "peak memory / model": f"{figures['memory_ratio']:.2f}",
            "target for memory": against(MAX_MEMORY_RATIO if full else None, figures["memory_ratio"]),
            "the same of load and save": f"{figures['copy_memory_ratio']:.2f}",
        }
