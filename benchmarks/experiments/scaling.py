"""Whether compressing costs time linear in the parameters: the same shapes with more and more layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, final

from benchmarks.experiments import Experiment, Outcome
from benchmarks.timing import interleave, median_ratio, time_call


@final
@dataclass(frozen=True, kw_only=True)
class Scaling(Experiment):
    """Time of `compress` per parameter, relative to the first depth.

    Args:
        method: of compresskit.
        ratio: of the whole model.
        layers: depths that take turns; the first one is the reference.
        shape: of the random model.
        repeats: rounds; the figures are their medians.
    """

    kind: ClassVar[str] = "scaling"

    method: str
    ratio: float
    layers: tuple[int, ...] = (12, 24, 48)
    shape: str = "bert-base"
    repeats: int = 3

    def run(self, data: Path | None) -> Outcome:
        import compresskit
        from benchmarks.models import build_bert

        reports: dict[str, compresskit.Report] = {}

        def measure(depth: int) -> float:
            model = build_bert(self.shape, seed=self.seed, layers=depth)

            def compress() -> None:
                reports[str(depth)] = compresskit.compress(model, self.method, ratio=self.ratio)

            return time_call(compress)

        times = interleave({str(depth): partial(measure, depth) for depth in self.layers}, self.repeats)
        params = {depth: report.params_before for depth, report in reports.items()}
        first = str(self.layers[0])
        return Outcome(
            {
                "params": params,
                "params_ratio": {depth: params[depth] / params[first] for depth in times},
                "time_ratio": {depth: median_ratio(times[depth], times[first]) for depth in times},
                "time_per_param_ratio": {
                    depth: median_ratio(times[depth], times[first]) * params[first] / params[depth] for depth in times
                },
                "achieved_ratio": {depth: report.ratio for depth, report in reports.items()},
                "times_s": times,
            }
        )

    @classmethod
    def row(cls, configuration: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, str]:
        depths = [str(depth) for depth in configuration["layers"]]
        return {
            "method": configuration["method"],
            "ratio": f"{configuration['ratio']:g}",
            "layers": " / ".join(depths),
            "parameters": " / ".join(f"{figures['params'][depth] / 1e6:.3g} M" for depth in depths),
            "time, first = 1": " / ".join(f"{figures['time_ratio'][depth]:.2f}" for depth in depths),
            "time per parameter, first = 1": " / ".join(
                f"{figures['time_per_param_ratio'][depth]:.2f}" for depth in depths
            ),
        }
