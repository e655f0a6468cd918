"""What one step of distillation costs against its bare parts: the teacher's forward pass and the student's two.

By hand (`benchmarks/distillation.py`) means: teacher forward in evaluation mode without gradients, student forward
in training mode, hidden states of all layers and queries and keys kept by plain hooks in both, mean squared errors of
hidden states and of scores over all places, backward. `passes` is the same without any loss: backward starts from the
sum of the kept features. Ours is what Trainer calls, units counted and padding masked. No optimiser in any of them.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, final

from benchmarks.experiments import Experiment, Outcome
from benchmarks.timing import WAYS, against, interleave, median_ratio, run_process, time_call, without_kernel

MAX_RATIO = 1.1
"""Target at the real model: time, and peak memory, against the step by hand."""


@final
@dataclass(frozen=True, kw_only=True)
class DistillStep(Experiment):
    """Time and peak memory of a step of `DistillationTrainer` against the same by hand.

    Args:
        method, ratio: of the student, a compressed copy of the teacher.
        model: the teacher: `minilm`, or a random one.
        batch, tokens: size of the batch.
        dtype: bfloat16: both under autocast, by hand as PyTorch does it; and ours in float32 beside them.
        dropout: `own`: the model's, or `none`.
        kernel: `pytorch`: layers run by PyTorch's operations. `compiled`: by our compiled kernel for processors, and in
            the same rounds without it, and with a dense student, with and without it.
        padding: `some` makes texts from half of `tokens` to `tokens` long, `none` all of `tokens`.
        repeats: rounds of timing; the figures are their medians.
    """

    kind: ClassVar[str] = "distill-step"
    later: ClassVar[tuple[str, ...]] = ("dtype", "dropout", "kernel")

    method: str
    ratio: float
    model: str = "minilm"
    batch: int = 32
    tokens: int = 64
    padding: str = "some"
    repeats: int = 7
    dtype: str = "float32"
    dropout: str = "own"
    kernel: str = WAYS[0]

    def run(self, data: Path | None) -> Outcome:
        peaks = {how: self._peak_bytes(how) for how in ("nothing", "by_hand", "ours")}  # before torch is imported here
        from benchmarks.distillation import Steps

        with TemporaryDirectory() as folder:
            steps = Steps(**self._options(), folder=folder)
            calls = {how: getattr(steps, how) for how in ("passes", "by_hand", "ours")}
            if self.dtype != "float32":
                calls["float32"] = Steps(**{**self._options(), "bf16": False}, folder=folder).ours
            if self.kernel == "compiled":
                calls["plain"] = without_kernel(steps.ours)
                calls["dense"] = Steps(**{**self._options(), "method": None}, folder=folder).ours
                calls["plain_dense"] = without_kernel(calls["dense"])
            for call in calls.values():
                call()  # the first of a process is no measure
            times = interleave({how: partial(time_call, call) for how, call in calls.items()}, self.repeats)
        grown = {how: peaks[how] - peaks["nothing"] for how in ("by_hand", "ours")}
        others = [how for how in ("float32", "plain", "dense") if how in times]
        return Outcome(
            {
                **{f"time_over_{how}": median_ratio(times["ours"], times[how]) for how in others},
                **(
                    {"plain_over_dense": median_ratio(times["plain"], times["plain_dense"])} if "plain" in times else {}
                ),
                "time_ratio": median_ratio(times["ours"], times["by_hand"]),
                "time_over_passes": median_ratio(times["ours"], times["passes"]),
                "memory_ratio": peaks["ours"] / peaks["by_hand"],
                "step_memory_ratio": grown["ours"] / max(grown["by_hand"], 1),
                "peak_bytes": peaks,
                "times_s": times,
            }
        )

    def _options(self) -> dict[str, Any]:
        names = ("model", "method", "ratio", "batch", "tokens", "seed")
        more = {"padded": self.padding == "some", "bf16": self.dtype == "bfloat16", "dropout": self.dropout == "own"}
        return {name: getattr(self, name) for name in names} | more

    def _peak_bytes(self, how: str) -> int:
        return run_process(
            [sys.executable, "-m", "benchmarks.distillation", json.dumps(self._options()), how]
        ).peak_bytes

    @classmethod
    def row(cls, configuration: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, str]:
        limit = MAX_RATIO if configuration["model"] == "minilm" else None
        return {
            "method": configuration["method"],
            "ratio": f"{configuration['ratio']:g}",
            "dropout": configuration.get("dropout", "own"),
            "multiplies in": configuration.get("dtype", "float32"),
            "batch": f"{configuration['batch']} x {configuration['tokens']}, padding: {configuration['padding']}",
            "time / by hand": f"{figures['time_ratio']:.3f}",
            "target": against(limit, figures["time_ratio"]),
            "time / passes without losses": f"{figures['time_over_passes']:.3f}",
            **{
                f"time / {name}": f"{figures[key]:.3f}" if key in figures else ""
                for name, key in (
                    ("in float32", "time_over_float32"),
                    ("without the compiled kernel", "time_over_plain"),
                    ("a dense student's", "time_over_dense"),
                )
            },
            "peak memory / by hand": f"{figures['memory_ratio']:.3f}",
            "target for memory": against(limit, figures["memory_ratio"]),
            "memory of the step alone / by hand": f"{figures['step_memory_ratio']:.3f}",
        }
