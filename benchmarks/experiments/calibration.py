"""What a calibration and the data-aware fits after it take: time and memory."""

import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from benchmarks.experiments import Experiment, Outcome
from benchmarks.machine import peak_memory_bytes


@final
@dataclass(frozen=True, kw_only=True)
class CalibrationCost(Experiment):
    """One model, calibrated on random tokens without padding (the longest that texts can be) and compressed.

    Args:
        method, ratio: of compresskit.
        model: `minilm`, or a random one.
        samples, tokens: sequences, and tokens of each.
    """

    kind: ClassVar[str] = "calibration"

    method: str
    ratio: float
    model: str = "minilm"
    samples: int = 128
    tokens: int = 128

    def run(self, data: Path | None) -> Outcome:
        import torch

        import compresskit
        from benchmarks.embeddings import read_sentences
        from benchmarks.models import load_model

        model, _ = load_model(self.model, seed=self.seed, sentences=read_sentences())
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(5, model.config.vocab_size, (self.samples, self.tokens), generator=generator)
        batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)]
        before = _peak_bytes()
        started = time.perf_counter()
        moments = compresskit.calibrate(model, batches, samples=self.samples)
        calibrated = time.perf_counter()
        after_pass = _peak_bytes()
        report = compresskit.compress(model, self.method, ratio=self.ratio, calibration=moments)
        return Outcome(
            {
                "calibrate_time_s": calibrated - started,
                "fit_time_s": report.time_s,
                "total_time_s": time.perf_counter() - started,
                "moments_bytes": moments.memory_bytes,
                "peak_bytes": {"loaded": before, "calibrated": after_pass, "fitted": _peak_bytes()},
                "tokens": moments.tokens,
                "ratio": report.ratio,
                "weighted_error": report.weighted_error,
            }
        )

    @classmethod
    def row(cls, configuration: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, str]:
        peaks = figures["peak_bytes"]
        return {
            "model": configuration["model"],
            "method": configuration["method"],
            "tokens": f"{figures['tokens']:,}",
            "calibrate, s": f"{figures['calibrate_time_s']:.1f}",
            "choose and fit, s": f"{figures['fit_time_s']:.1f}",
            "moments, MiB": f"{figures['moments_bytes'] / 2**20:,.0f}",
            "peak MiB loaded, calibrated, fitted": ", ".join(f"{size / 2**20:,.0f}" for size in peaks.values()),
        }


def _peak_bytes() -> int:
    """Of this process so far."""
    return peak_memory_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
