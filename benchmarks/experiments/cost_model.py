"""How well the cost model that plans are made with predicts layers, and what its constants would be here.

The operations that the model knows are measured one by one and its constants fitted to them: the figures
`constants` are what `compresskit/core/cost.py` commits (`MACHINE`). Then whole layers, dense and factorised, spread
over every method's menu, are timed and compared with the prediction of the committed constants.
"""

import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from benchmarks.experiments import Experiment, Outcome

DENSE = "dense"


@final
@dataclass(frozen=True, kw_only=True)
class CostModel(Experiment):
    """Prediction against measurement.

    Args:
        methods: of compresskit.
        shapes: of weights, as rows x cols.
        tokens: that a layer gets at a time.
        structures: of each menu, spread over its sizes.
        rounds: of which the best counts.
    """

    kind: ClassVar[str] = "cost-model"

    methods: tuple[str, ...] = ("kronecker", "svd", "tucker", "tensor-train")
    shapes: tuple[str, ...] = ("768x768", "3072x768", "768x3072", "384x384", "1536x384")
    tokens: tuple[int, ...] = (16, 128, 1024)
    structures: int = 8
    rounds: int = 20

    def run(self, data: Path | None) -> Outcome:
        import torch

        from benchmarks.rates import best_times_s, fit_machine, single_operations
        from compresskit import MACHINE

        torch.manual_seed(self.seed)
        with torch.inference_mode():
            operations = best_times_s(single_operations(), self.rounds)
            layers = dict(self._layers())
            times = best_times_s({what: call for what, (call, _) in layers.items()}, self.rounds)
        predicted = {what: MACHINE.time_s(steps) for what, (_, steps) in layers.items()}
        single = {operation: MACHINE.time_s([operation]) for operation in operations}
        by_tokens = {
            str(tokens): self._speedups(
                {what: t for what, t in predicted.items() if what[2] == tokens},
                {what: t for what, t in times.items() if what[2] == tokens},
            )
            for tokens in self.tokens
        }
        return Outcome(
            {
                "operations": _closeness(single, operations),
                "layers": _closeness(predicted, times),
                "speedups": by_tokens,
                "constants": dataclasses.asdict(fit_machine(operations, MACHINE)),
                "committed": dataclasses.asdict(MACHINE),
            }
        )

    def _layers(self) -> Iterator[tuple[tuple[str, str, int, str], tuple[Callable[[], object], Any]]]:
        """(method, shape, tokens, structure) of each layer, with a call of it and its operations."""
        import torch
        from torch import nn

        from compresskit import dense_operations

        for shape in self.shapes:
            rows, cols = map(int, shape.split("x"))
            dense = nn.Linear(cols, rows)
            chosen = [(method, s) for method in self.methods for s in self._spread(method, rows, cols)]
            layers = [(method, structure, _layer(structure)) for method, structure in chosen]
            for tokens in self.tokens:
                x = torch.randn(tokens, cols)
                yield (DENSE, shape, tokens, ""), (_call(dense, x), dense_operations(rows, cols, tokens))
                for method, structure, layer in layers:
                    yield (method, shape, tokens, str(structure)), (_call(layer, x), structure.operations(tokens))

    def _spread(self, method: str, rows: int, cols: int) -> list[Any]:
        """Structures of a menu, sorted by size and evenly spaced over it after a seeded shuffle of equals."""
        import compresskit

        options = {"small": "both"} if method == "kronecker" else {}
        menu = list(compresskit.decomposition(method, options).menu(rows, cols))
        random.Random(self.seed).shuffle(menu)  # noqa: S311 - a sample, no secret
        menu.sort(key=lambda structure: structure.num_params)
        steps = max(self.structures - 1, 1)
        return [menu[i * (len(menu) - 1) // steps] for i in range(min(self.structures, len(menu)))]

    @staticmethod
    def _speedups(predicted: Mapping[Any, float], measured: Mapping[Any, float]) -> dict[str, Any]:
        """The same of dense / factorised time, which is what a plan decides by, and how often the sign is wrong."""
        expected, real = (
            {what: _dense(t, what) / t[what] for what in t if what[0] != DENSE} for t in (predicted, measured)
        )
        wrong = [what for what in real if (expected[what] > 1) != (real[what] > 1)]
        return {
            **_closeness(expected, real),
            "called_faster_but_slower": sum(expected[what] > 1 for what in wrong),
            "called_slower_but_faster": sum(expected[what] <= 1 for what in wrong),
            "worst_called_faster": min((real[what] for what in wrong if expected[what] > 1), default=None),
        }

    @classmethod
    def row(cls, configuration: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, str]:
        layers = figures["layers"]
        return {
            "layers": f"{layers['number']}",
            "rank correlation of times": f"{layers['rank_correlation']:.3f}",
            "predicted / measured, median": f"{layers['median_ratio']:.2f}",
            "off by, median and 90 %": f"{layers['off_median']:.2f}, {layers['off_90']:.2f} times",
            **{
                f"speed-ups at {tokens} tokens: rank, off by, wrongly called faster": (
                    f"{of['rank_correlation']:.3f}, {of['off_median']:.2f}, "
                    f"{of['called_faster_but_slower']} of {of['number']}"
                )
                for tokens, of in figures["speedups"].items()
            },
        }


def _dense(times: Mapping[Any, float], what: Any) -> float:
    return times[(DENSE, what[1], what[2], "")]


def _closeness(predicted: Mapping[Any, float], measured: Mapping[Any, float]) -> dict[str, Any]:
    """Rank correlation, and predicted / measured: its median, and how far it is off, at the median and at 90 %."""
    import numpy as np
    from scipy.stats import spearmanr

    ours, real = (np.array([times[what] for what in measured]) for times in (predicted, measured))
    ratios = ours / real
    off = np.maximum(ratios, 1 / ratios)
    return {
        "number": len(ratios),
        "rank_correlation": float(spearmanr(ours, real).statistic),
        "median_ratio": float(np.median(ratios)),
        "off_median": float(np.median(off)),
        "off_90": float(np.percentile(off, 90)),
    }


def _layer(structure: Any) -> Any:
    import torch

    from compresskit import FactorizedLinear

    specs = structure.factor_specs()
    factors = {name: torch.randn(spec.shape) / max(spec.shape) ** 0.5 for name, spec in specs.items()}
    return FactorizedLinear(structure, factors, torch.randn(structure.rows))


def _call(layer: Any, x: Any) -> Callable[[], object]:
    return lambda: layer(x)
