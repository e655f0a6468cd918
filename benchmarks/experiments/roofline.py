"""A factorised layer against the dense one and against the limit of the machine, on a CPU or GPU.

The limit (roofline: Williams, Waterman and Patterson 2009) of a layer is the larger of two times: its multiply-adds by
the rate of a large product, and the bytes that it must read and write (input, factors, output) by the rate of a large
copy. Both rates are measured here in the same type.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from benchmarks.experiments import Experiment, Outcome, SuiteError
from benchmarks.timing import interleave, median_ratio

SAMPLE_S = 2e-3
SIDE = {"cpu": 1536, "cuda": 8192}
"""Of the product that measures the rate."""
COPIED_BYTES = {"cpu": 2**27, "cuda": 2**31}


@final
@dataclass(frozen=True, kw_only=True)
class Roofline(Experiment):
    """One layer at several numbers of tokens.

    Args:
        method: of compresskit.
        options: that fix its structure, as after `--rule`: `left=8x8,terms=2`.
        shape: of the weight, as rows x cols.
        tokens: that the layer gets at a time.
        device, dtype: where and in which type the layers run.
        repeats: rounds; the figures are their medians.
    """

    kind: ClassVar[str] = "roofline"

    method: str
    options: str
    shape: str
    tokens: tuple[int, ...] = (1, 16, 128, 1024, 4096)
    device: str = "cpu"
    dtype: str = "float32"
    repeats: int = 15

    def run(self, data: Path | None) -> Outcome:
        import torch

        from benchmarks.devices import device_name, find_device, find_dtype
        from compresskit.machines import random_layer

        device, dtype = find_device(self.device), find_dtype(self.dtype)
        torch.manual_seed(self.seed)
        structure = self._structure()
        layer = random_layer(structure).to(device=device, dtype=dtype)
        dense = torch.nn.Linear(structure.cols, structure.rows).to(device=device, dtype=dtype)
        figures: dict[str, Any] = {"structure": str(structure), "device": device_name(device)}
        with torch.inference_mode():
            rates = machine_rates(device, dtype, self.repeats)
            figures |= {"macs_per_s": rates[0], "bytes_per_s": rates[1]}
            for tokens in self.tokens:
                x = torch.randn(tokens, structure.cols, device=device, dtype=dtype)
                times = self._times({"ours": layer, "dense": dense}, x)
                sizes = {"ours": (structure.macs, structure.num_params), "dense": (dense.weight.numel(),) * 2}
                limits = {name: limit_s(x, structure.rows, *size, rates) for name, size in sizes.items()}
                figures[f"tokens_{tokens}"] = {
                    "dense_ratio": median_ratio(times["dense"], times["ours"]),
                    "limit_ratio": limits["dense"] / limits["ours"],
                    "of_limit": {name: limits[name] / sorted(t)[len(t) // 2] for name, t in times.items()},
                    "times_s": times,
                }
        return Outcome(figures)

    def _structure(self) -> Any:
        return one_structure(self.method, self.options, self.shape)

    def _times(self, layers: Mapping[str, Any], x: Any) -> dict[str, list[float]]:
        from benchmarks.devices import timed

        tasks = {}
        for name, layer in layers.items():
            for _ in range(2):  # the first call of a shape chooses a kernel
                once_s = timed(_call(layer, x), x.device)()
            tasks[name] = timed(_call(layer, x), x.device, repeats=max(1, round(SAMPLE_S / once_s)))
        return interleave(tasks, self.repeats)

    @classmethod
    def row(cls, configuration: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, str]:
        row = {
            "weight": configuration["shape"],
            "structure": figures["structure"],
            "where": f"{figures['device'] or configuration['device']}, {configuration['dtype']}",
        }
        for tokens in configuration["tokens"]:
            of = figures[f"tokens_{tokens}"]
            row[f"dense / ours (limit; share of the roofline, ours and dense), {tokens} tokens"] = (
                f"{of['dense_ratio']:.2f} ({of['limit_ratio']:.1f}; "
                f"{of['of_limit']['ours']:.0%}, {of['of_limit']['dense']:.0%})"
            )
        return row


def one_structure(method: str, options: str, shape: str) -> Any:
    """The structure of `rows x cols` that the options of a method fix, given as after `--rule`.

    Raises:
        SuiteError: they leave another number of structures.
    """
    import compresskit

    given = dict(item.split("=", 1) for item in options.split(",") if item)
    menu = list(compresskit.decomposition(method, given).menu(*map(int, shape.split("x"))))
    if len(menu) != 1:
        raise SuiteError(f"roofline: {method} with {options!r} has {len(menu)} structures for {shape}")
    return menu[0]


def _call(layer: Any, x: Any) -> Any:
    return lambda: layer(x)


def machine_rates(device: Any, dtype: Any, repeats: int) -> tuple[float, float]:
    """Multiply-adds per second of a large product and bytes per second, read and written, of a large copy; the best."""
    import torch

    from benchmarks.devices import timed

    side, num_bytes = (sizes.get(device.type, sizes["cuda"]) for sizes in (SIDE, COPIED_BYTES))
    square = torch.randn(side, side, device=device, dtype=dtype)
    block = torch.zeros(num_bytes // dtype.itemsize, device=device, dtype=dtype)
    target = torch.empty_like(block)
    tasks = {"product": timed(lambda: square @ square, device), "copy": timed(lambda: target.copy_(block), device)}
    best = {name: min(times) for name, times in interleave(tasks, repeats + 1).items()}
    return side**3 / best["product"], 2 * num_bytes / best["copy"]


def limit_s(x: Any, rows: int, macs: int, num_params: int, rates: tuple[float, float]) -> float:
    """The least time of a layer with an output of `rows`, by the rates of `machine_rates`."""
    tokens, cols = x.shape
    moved = x.element_size() * (tokens * (cols + rows) + num_params)
    return max(tokens * macs / rates[0], moved / rates[1])
