"""One factorised embedding against the dense one: the time of a lookup.

The yardstick is the issue's: at most twice the dense lookup's time, for structures of O(columns) operations per token.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from benchmarks.experiments import Experiment, Outcome, SuiteError
from benchmarks.timing import interleave, median_ratio, timed_block

TARGET = 2.0


@final
@dataclass(frozen=True, kw_only=True)
class Lookups(Experiment):
    """Time of lookups in the embeddings of one method.

    Args:
        method: of compresskit.
        structures: each the options that leave one structure in the method's menu, as `key=value key=value`.
        shape: of the table, rows x columns.
        tokens: that are looked up at a time, random ones.
        repeats: rounds; the figures are their medians.
    """

    kind: ClassVar[str] = "lookups"

    method: str
    structures: tuple[str, ...]
    shape: str = "30522x768"
    tokens: tuple[int, ...] = (1, 128, 4096)
    repeats: int = 9

    def run(self, data: Path | None) -> Outcome:
        import torch

        torch.manual_seed(self.seed)
        rows, cols = (int(side) for side in self.shape.split("x"))
        dense = torch.nn.Embedding(rows, cols)
        layers = {text: self._layer(text, rows, cols) for text in self.structures}
        figures: dict[str, Any] = {
            text: {
                "ratio": rows * cols / layer.structure.num_params,
                "macs_per_column": layer.structure.lookup_macs / cols,
                "time": {},
            }
            for text, layer in layers.items()
        }
        with torch.inference_mode():
            for count in self.tokens:
                index = torch.randint(rows, (count,))
                tasks = {name: timed_block(layer, index) for name, layer in {"dense": dense, **layers}.items()}
                times = interleave(tasks, self.repeats, collect=False)
                for text in layers:
                    figures[text]["time"][str(count)] = median_ratio(times[text], times["dense"])
        return Outcome({"structures": figures})

    def _layer(self, text: str, rows: int, cols: int) -> Any:
        import torch

        import compresskit

        options = dict(option.split("=") for option in text.split())
        menu = list(compresskit.decomposition(self.method, options).menu(rows, cols, lookup=True))
        if len(menu) != 1:
            raise SuiteError(f"{self.method} {text!r} leaves {len(menu)} structures for {self.shape}, not one")
        factors = {
            name: torch.randn(spec.shape) / math.sqrt(spec.shape[-1]) for name, spec in menu[0].factor_specs().items()
        }
        return compresskit.FactorizedEmbedding(menu[0], factors)

    @classmethod
    def row(cls, configuration: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, str]:
        row = {"method": configuration["method"], "table": configuration["shape"]}
        for text, of in figures["structures"].items():
            times = (f"{time:.1f}{' (above 2)' if time > TARGET else ''} at {n}" for n, time in of["time"].items())
            row[f"{text}: ratio, multiply-adds per number, time / dense"] = (
                f"{of['ratio']:.1f}, {of['macs_per_column']:.0f}, {', '.join(times)}"
            )
        return row
