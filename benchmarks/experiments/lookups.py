"""One factorised embedding against the dense one: the time of a lookup.

The yardstick is the issue's: at most twice the dense lookup's time, for structures of O(columns) operations per token.

Some cannot reach it: calls cost something, the output has to be written, and multiply-adds take their time. So the same
rounds time a floor: a lookup and a product of next to nothing, and the longer of both: writing the output once, and the
structure's multiply-adds at the rate of a large product.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from benchmarks.experiments import Experiment, Outcome, SuiteError
from benchmarks.memory import keep_memory
from benchmarks.timing import interleave, median_ratio, timed_block

TARGET = 2.0
SIDE = 512
"""Of the large product."""


@final
@dataclass(frozen=True, kw_only=True)
class Lookups(Experiment):
    """Time of lookups in the embeddings of one method.

    Args:
        method: of compresskit.
        structures: each the options that leave one structure in the method's menu, as `key=value key=value`.
        shape: of the table, rows x columns.
        tokens: that are looked up at a time, random ones.
        memory: `kept`: freed memory is kept; `system`: as the C library does, where some outputs get fresh pages and
            others do not.
        repeats: rounds; the figures are their medians.
    """

    kind: ClassVar[str] = "lookups"

    method: str
    structures: tuple[str, ...]
    shape: str = "30522x768"
    tokens: tuple[int, ...] = (1, 128, 4096)
    memory: str = "kept"
    repeats: int = 9

    def run(self, data: Path | None) -> Outcome:
        import torch

        skipped = keep_memory() if self.memory == "kept" else {}
        torch.manual_seed(self.seed)
        rows, cols = (int(side) for side in self.shape.split("x"))
        dense = torch.nn.Embedding(rows, cols)
        layers = {text: self._layer(text, rows, cols) for text in self.structures}
        figures: dict[str, Any] = {
            text: {
                "ratio": rows * cols / layer.structure.num_params,
                "macs_per_column": layer.structure.lookup_macs / cols,
                "time": {},
                "floor": {},
            }
            for text, layer in layers.items()
        }
        with torch.inference_mode():
            for count in self.tokens:
                index = torch.randint(rows, (count,))
                tasks = {name: timed_block(layer, index) for name, layer in {"dense": dense, **layers}.items()}
                times = interleave({**tasks, **_floors(count, cols)}, self.repeats, collect=False)
                for text, layer in layers.items():
                    figures[text]["time"][str(count)] = median_ratio(times[text], times["dense"])
                    floor = _floor(times, layer.structure.lookup_macs * count)
                    figures[text]["floor"][str(count)] = median_ratio(floor, times["dense"])
        return Outcome({"structures": figures}, skipped)

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
            times = (
                f"{time:.1f}{' (above 2)' if time > TARGET else ''}{_beside(of, n)} at {n}"
                for n, time in of["time"].items()
            )
            row[f"{text}: ratio, multiply-adds per number, time / dense (floor)"] = (
                f"{of['ratio']:.1f}, {of['macs_per_column']:.0f}, {', '.join(times)}"
            )
        return row


def _beside(figures: Mapping[str, Any], count: str) -> str:
    """The floor, where it was measured."""
    return f" (floor {figures['floor'][count]:.1f})" if "floor" in figures else ""


def _floors(count: int, cols: int) -> dict[str, Callable[[], float]]:
    """Tasks: two calls that do nothing, an output that is written once, and a large product."""
    import torch

    one, square, output = torch.ones(1, 1), torch.randn(SIDE, SIDE), torch.empty(count, cols)
    zero = torch.zeros(1, dtype=torch.int64)
    return {
        "calls": timed_block(lambda _: torch.mm(torch.embedding(one, zero), one), None),
        "writing": timed_block(lambda _: output.fill_(0), None),
        "product": timed_block(lambda _: torch.mm(square, square), None),
    }


def _floor(times: Mapping[str, Sequence[float]], macs: int) -> list[float]:
    """Seconds in each round."""
    rounds = zip(times["calls"], times["writing"], times["product"], strict=True)
    return [calls + max(writing, product * macs / SIDE**3) for calls, writing, product in rounds]
