"""How long compressing a whole model takes against what peers do: an SVD of each of its matrices.

Three things take turns on a fresh random model: `torch.linalg.svd` of its matrices, `compresskit.compress` (every
menu priced, the budget solved, everything fitted and swapped), and a floor, reading every weight once. The peers'
73 matrices of bert-base are its linear layers and its word embeddings; `compress` does the pooler and the position
table besides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, final

from benchmarks.experiments import Experiment, Outcome
from benchmarks.timing import against, interleave, median_ratio, time_call

LIMITS = {"kronecker": 0.2, "svd": 0.5, "tucker": 2.0}
"""Targets at bert-base shapes: time of compress / time of the SVDs."""


@final
@dataclass(frozen=True, kw_only=True)
class FitSpeed(Experiment):
    """Time of `compress` against the SVDs of the same matrices.

    Args:
        method: of compresskit.
        ratio: of the whole model.
        shape: of the random model.
        not_in_baseline: patterns of matrices that the baseline is spared.
        repeats: rounds; the figures are their medians.
    """

    kind: ClassVar[str] = "fit-speed"

    method: str
    ratio: float
    shape: str = "bert-base"
    not_in_baseline: tuple[str, ...] = ("pooler.*", "*position_embeddings")
    repeats: int = 5

    def run(self, data: Path | None) -> Outcome:
        import compresskit

        reports: list[compresskit.Report] = []
        matrices: list[int] = []

        def decompose() -> float:
            weights = self._baseline_weights()
            matrices.append(len(weights))
            return time_call(lambda: _decompose(weights))

        def compress() -> float:
            model = self._model()
            return time_call(lambda: reports.append(compresskit.compress(model, self.method, ratio=self.ratio)))

        def read() -> float:
            weights = list(self._model().parameters())
            return time_call(lambda: [float(weight.detach().sum()) for weight in weights])

        times = interleave({"svd": decompose, "compress": compress, "read": read}, self.repeats)
        report = reports[-1]
        return Outcome(
            {
                "time_ratio": median_ratio(times["compress"], times["svd"]),
                "floor_ratio": median_ratio(times["read"], times["svd"]),
                "matrices_svd": matrices[-1],
                "matrices_compressed": len(report.sites),
                "params": report.params_before,
                "achieved_ratio": report.ratio,
                "relative_error": report.relative_error,
                "budget_gap": report.gap,
                "compress_times_s": times["compress"],
                "svd_times_s": times["svd"],
                "read_times_s": times["read"],
            }
        )

    def _model(self) -> Any:
        from benchmarks.models import build_bert

        return build_bert(self.shape, seed=self.seed)

    def _baseline_weights(self) -> list[Any]:
        import compresskit

        model = self._model()
        names = [site.name for site in compresskit.find_sites(model).sites]
        wanted = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in self.not_in_baseline)]
        return [model.get_submodule(name).weight.detach() for name in wanted]

    @classmethod
    def row(cls, configuration: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, str]:
        limit = LIMITS.get(configuration["method"]) if configuration["shape"] == "bert-base" else None
        return {
            "method": configuration["method"],
            "ratio": f"{figures['achieved_ratio']:.2f}",
            "matrices": f"{figures['matrices_compressed']} against {figures['matrices_svd']}",
            "time / SVDs": f"{figures['time_ratio']:.2f}",
            "target": against(limit, figures["time_ratio"]),
            "reading the weights / SVDs": f"{figures['floor_ratio']:.4f}",
        }


def _decompose(weights: Sequence[Any]) -> None:
    import torch

    for weight in weights:
        torch.linalg.svd(weight, full_matrices=False)
