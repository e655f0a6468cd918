"""The forward time of a whole compressed model, between the dense model's and the floor's.

The floor is the same model with its linear layers taken out: attention, normalisations, activations and lookups, which
no factorisation touches. Dense, compressed and floor take turns. Values do not matter: weights are random.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from benchmarks.experiments import Experiment, Outcome, SuiteError
from benchmarks.timing import WAYS, interleave, median_ratio, without_kernel

TARGET, TARGET_RATIO = 0.7, 19
"""Share of the way from dense to the floor that is to be won at this ratio, at bert-base shapes."""

PAPERS: Mapping[str, Mapping[str, tuple[tuple[int, int], tuple[int, int]]]] = {
    "K8": {
        "*attention*": ((384, 384), (2, 2)),
        "*intermediate*": ((8, 2), (384, 384)),
        "*output.dense": ((2, 8), (384, 384)),
        "*word_embeddings": ((30522, 96), (1, 8)),
    },
    "K21": {
        "*attention*": ((384, 48), (2, 16)),
        "*intermediate*": ((16, 2), (192, 384)),
        "*output.dense": ((2, 16), (384, 192)),
        "*word_embeddings": ((30522, 48), (1, 16)),
    },
}
"""KroneckerBERT (NAACL 2022, table 1): left (x) right for the layers that a pattern matches; the pooler stays dense."""


@final
@dataclass(frozen=True, kw_only=True)
class ModelSpeed(Experiment):
    """Time of one compressed model against dense.

    Args:
        model: `K8` or `K21` (KroneckerBERT's factor shapes), or METHOD-RATIO, such as `svd-19`.
        shape: of the random model.
        batches: texts at a time.
        tokens: of each text.
        device, dtype: where and in which type the forward passes run; fitting is done there too, in float32.
        kernel: `pytorch`: layers run by PyTorch's operations. `compiled`: by our compiled kernel for processors, and in
            the same rounds, as `plain`, without it.
        repeats: rounds; the figures are their medians.
        machine: that METHOD-RATIO is planned for, of `compresskit machines`.
    """

    kind: ClassVar[str] = "model-speed"
    later: ClassVar[tuple[str, ...]] = ("kernel", "machine")

    model: str
    shape: str = "bert-base"
    batches: tuple[int, ...] = (1, 8)
    tokens: int = 128
    device: str = "cpu"
    dtype: str = "float32"
    kernel: str = WAYS[0]
    repeats: int = 15
    machine: str = "cpu"

    def run(self, data: Path | None) -> Outcome:
        from benchmarks.devices import device_name, find_device, find_dtype
        from benchmarks.floors import without_linear_layers
        from benchmarks.models import build_bert

        device, dtype = find_device(self.device), find_dtype(self.dtype)
        dense = build_bert(self.shape, seed=self.seed).to(device)
        small = copy.deepcopy(dense)
        report = self._compress(small)
        models = {"dense": dense, "compressed": small, "floor": without_linear_layers(dense)}
        for model in models.values():
            model.to(device=device, dtype=dtype)
        figures: dict[str, Any] = {"ratio": report.ratio, "macs_ratio": report.macs_ratio}
        figures |= {"expected_speedup": report.expected_speedup, "device": device_name(device)}
        for batch in self.batches:
            times = self._times(models, batch, device)
            ours, floor = (median_ratio(times[name], times["dense"]) for name in ("compressed", "floor"))
            won = median_ratio(
                [d - c for d, c in zip(times["dense"], times["compressed"], strict=True)],
                [d - f for d, f in zip(times["dense"], times["floor"], strict=True)],
            )
            figures[f"batch_{batch}"] = {"time_ratio": ours, "floor_ratio": floor, "won": won, "times_s": times}
            if "plain" in times:
                figures[f"batch_{batch}"]["plain_ratio"] = median_ratio(times["plain"], times["dense"])
        return Outcome(figures)

    def _compress(self, model: Any) -> Any:
        import compresskit

        if self.model in PAPERS:
            shapes = PAPERS[self.model].items()
            rules = {name: compresskit.Kronecker(left=left, right=right) for name, (left, right) in shapes}
            return compresskit.compress(model, rules=rules, allow_slower=True)
        method, dash, ratio = self.model.rpartition("-")
        if not dash or not ratio.replace(".", "").isdigit():
            raise SuiteError(f"model-speed: model is {', '.join(PAPERS)} or METHOD-RATIO, got {self.model!r}")
        return compresskit.compress(model, method, ratio=float(ratio), machine=self.machine)

    def _times(self, models: Mapping[str, Any], batch: int, device: Any) -> dict[str, list[float]]:
        import torch

        from benchmarks.devices import timed

        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(models["dense"].config.vocab_size, (batch, self.tokens), generator=generator).to(device)

        def forward(model: Any) -> Any:
            return lambda: model(ids)

        with torch.inference_mode():
            tasks = {name: timed(forward(model), device) for name, model in models.items()}
            if self.kernel == "compiled":
                tasks["plain"] = without_kernel(tasks["compressed"])
            for task in tasks.values():
                task()  # the first pass of a process is no measure
            return interleave(tasks, self.repeats)

    @classmethod
    def row(cls, configuration: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, str]:
        row = {
            "model": configuration["model"],
            "shape": f"{configuration['shape']}, {configuration['tokens']} tokens",
            "kernel": configuration.get("kernel", WAYS[0]),
            "ratio": f"{figures['ratio']:.2f}",
            "fewer multiply-adds": f"{figures['macs_ratio']:.2f}",
        }
        aimed = configuration["shape"] == "bert-base" and configuration["model"].endswith(f"-{TARGET_RATIO}")
        for batch in configuration["batches"]:
            of = figures[f"batch_{batch}"]
            verdict = f" (≥ {TARGET:.0%} {'yes' if of['won'] >= TARGET else 'NO'})" if aimed else ""
            where = f"batch {batch}"
            if "plain_ratio" in of:
                row |= {f"time / dense by PyTorch, {where}": f"{of['plain_ratio']:.3f}"}
            row |= {f"time / dense, {where}": f"{of['time_ratio']:.3f}", f"floor, {where}": f"{of['floor_ratio']:.3f}"}
            row |= {f"of the way won, {where}": f"{of['won']:.0%}{verdict}"}
        return row
