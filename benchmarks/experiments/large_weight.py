"""How long one weight of a 7-billion-parameter model takes: analysed, priced, chosen and fitted.

`compresskit.compress` of a single linear layer takes turns with `torch.linalg.svd` of the same random weight.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from benchmarks.experiments import Experiment, Outcome
from benchmarks.timing import against, interleave, median_ratio, time_call

MAX_TIME_S = 30.0
"""Target at 4096 x 11008: seconds, not minutes."""


@final
@dataclass(frozen=True, kw_only=True)
class LargeWeight(Experiment):
    """Time of `compress` for one layer, alone and against the SVD of its weight.

    Args:
        method: of compresskit.
        ratio: of the weight.
        rows, cols: of the weight.
        repeats: rounds; the figures are their medians.
    """

    kind: ClassVar[str] = "large-weight"

    method: str
    ratio: float
    rows: int = 4096
    cols: int = 11008
    repeats: int = 1

    def run(self, data: Path | None) -> Outcome:
        import torch

        import compresskit

        torch.manual_seed(self.seed)
        weight = torch.randn(self.rows, self.cols) / self.cols**0.5
        reports: list[compresskit.Report] = []

        def compress() -> float:
            model = torch.nn.Sequential(torch.nn.Linear(self.cols, self.rows, bias=False))
            model.load_state_dict({"0.weight": weight})
            return time_call(lambda: reports.append(compresskit.compress(model, self.method, ratio=self.ratio)))

        def decompose() -> float:
            return time_call(lambda: torch.linalg.svd(weight, full_matrices=False))

        times = interleave({"compress": compress, "svd": decompose}, self.repeats)
        report = reports[-1]
        return Outcome(
            {
                "time_ratio": median_ratio(times["compress"], times["svd"]),
                "compress_time_s": statistics.median(times["compress"]),
                "achieved_ratio": report.ratio,
                "relative_error": report.relative_error,
                "structure": report.sites[0].structure,
                "compress_times_s": times["compress"],
                "svd_times_s": times["svd"],
            }
        )

    @classmethod
    def row(cls, configuration: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, str]:
        full = (configuration["rows"], configuration["cols"]) == (4096, 11008)
        return {
            "method": configuration["method"],
            "weight": f"{configuration['rows']} x {configuration['cols']}",
            "ratio": f"{figures['achieved_ratio']:.2f}",
            "error": f"{figures['relative_error']:.4f}",
            "time / SVD": f"{figures['time_ratio']:.3f}",
            "seconds": f"{figures['compress_time_s']:.1f}",
            "target for seconds": against(MAX_TIME_S if full else None, figures["compress_time_s"]),
        }
