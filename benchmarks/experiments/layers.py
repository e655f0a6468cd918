"""One factorised layer against the dense one: forward, training step, and what is kept for the backward pass.

The yardstick is the limit: multiply-adds of the dense layer / multiply-adds of the structure. A speed-up that reaches
it does its products as fast as a dense layer does. Below it stands what no layer can beat: reading the input and
writing the output once.
"""

import ctypes
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, final

from benchmarks.experiments import Experiment, Outcome, SuiteError
from benchmarks.timing import interleave, median_ratio, time_call

BLOCK_S = 0.002
"""A figure is the mean of as many calls as fill this time, at least one."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's `mallopt`."""


@final
@dataclass(frozen=True, kw_only=True)
class Layers(Experiment):
    """Speed of the structures of one decomposition for one weight shape.

    Args:
        method: of compresskit.
        shape: of the weight, `rowsxcols`.
        structures: each the options that leave one structure in the method's menu, as `key=value key=value`.
        tokens: numbers of tokens of a forward pass.
        step_tokens: numbers of tokens of a training step (forward, and the gradients of input and factors).
        dtype: of weights and input.
        mode: `eager`, or `compile` for torch.compile(fullgraph=True).
        memory: `system`: as the C library does, which hands large blocks back and gets fresh pages for each call;
            `kept`: freed memory is kept, as by the allocators that PyTorch recommends for servers (glibc only).
        repeats: rounds; the figures are their medians.
    """

    kind: ClassVar[str] = "layers"

    method: str
    shape: str
    structures: tuple[str, ...]
    tokens: tuple[int, ...] = (1, 16, 128, 1024)
    step_tokens: tuple[int, ...] = (128,)
    dtype: str = "float32"
    mode: str = "eager"
    memory: str = "kept"
    repeats: int = 7

    def run(self, data: Path | None) -> Outcome:
        import torch

        skipped = _keep_memory() if self.memory == "kept" else {}
        torch.manual_seed(self.seed)
        dense, layers = self._layers()
        run = {name: self._callable(layer) for name, layer in {"dense": dense, **layers}.items()}
        figures: dict[str, Any] = {
            name: {
                "limit": dense.weight.numel() / layer.structure.macs,
                "ratio": dense.weight.numel() / layer.structure.num_params,
                "kept": _kept_bytes(layer, self._input(dense, 128)) / _kept_bytes(dense, self._input(dense, 128)),
                "forward": {},
                "step": {},
            }
            for name, layer in layers.items()
        }
        floors: dict[str, float] = {}
        for count in self.tokens:
            with torch.inference_mode():
                x = self._input(dense, count)
                tasks = {name: _timed(call, x) for name, call in run.items()}
                times = interleave(
                    {**tasks, "floor": _timed(_touch(dense.out_features), x)}, self.repeats, collect=False
                )
            floors[str(count)] = median_ratio(times["dense"], times["floor"])
            for name in layers:
                figures[name]["forward"][str(count)] = median_ratio(times["dense"], times[name])
        for count in self.step_tokens:
            x = self._input(dense, count).requires_grad_()
            upstream = torch.randn(count, dense.out_features).to(dense.weight.dtype)
            times = interleave(
                {n: _timed(_step(call, upstream), x) for n, call in run.items()}, self.repeats, collect=False
            )
            for name in layers:
                figures[name]["step"][str(count)] = median_ratio(times["dense"], times[name])
        return Outcome({"structures": figures, "floor": floors}, skipped)

    def _layers(self) -> tuple[Any, dict[str, Any]]:
        """The dense layer, and one of each structure with random factors."""
        import torch

        import compresskit

        rows, cols = (int(side) for side in self.shape.split("x"))
        dtype = getattr(torch, self.dtype)
        dense = torch.nn.Linear(cols, rows).to(dtype)
        layers = {}
        for text in self.structures:
            options = dict(option.split("=") for option in text.split())
            menu = list(compresskit.decomposition(self.method, options).menu(rows, cols))
            if len(menu) != 1:
                raise SuiteError(f"{self.method} {text!r} leaves {len(menu)} structures for {self.shape}, not one")
            factors = {
                name: (torch.randn(spec.shape) / math.sqrt(spec.shape[-1])).to(dtype)
                for name, spec in menu[0].factor_specs().items()
            }
            layers[text] = compresskit.FactorizedLinear(menu[0], factors, torch.randn(rows).to(dtype))
        return dense, layers

    def _callable(self, layer: Any) -> Any:
        import torch

        modes = {"eager": lambda: layer, "compile": lambda: torch.compile(layer, fullgraph=True, dynamic=False)}
        return modes[self.mode]()

    def _input(self, dense: Any, count: int) -> Any:
        import torch

        return torch.randn(count, dense.in_features).to(dense.weight.dtype)

    @classmethod
    def row(cls, configuration: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, str]:
        found = list(figures["structures"].values())
        kinds: Sequence[tuple[Literal["forward", "step"], str]] = (("forward", "tokens"), ("step", "step_tokens"))
        shares = {
            f"{kind}, {count} tokens": _summary([f[kind][str(count)] / f["limit"] for f in found])
            for kind, option in kinds
            for count in configuration[option]
        }
        slower = sum(f["limit"] > 1 and speed < 1 for f in found for speed in f["forward"].values())
        return {
            "method": configuration["method"],
            "shape": configuration["shape"],
            "how": f"{configuration['dtype']}, {configuration['mode']}, {configuration['memory']} memory",
            "structures": str(len(found)),
            **shares,
            "slower than dense": str(slower),
            "kept / dense": f"{max(f['kept'] for f in found):.2f}",
        }


def _summary(shares: Sequence[float]) -> str:
    return f"{statistics.median(shares):.2f} (from {min(shares):.2f})"


def _keep_memory() -> dict[str, str]:
    """Tell the C library to keep freed memory; the reason if it is one that cannot be told."""
    if not sys.platform.startswith("linux"):
        return {"memory": "only glibc can be told to keep freed memory"}
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)):
        return {"memory": "the C library refuses to keep freed memory"}
    return {}


def _timed(call: Callable[[Any], object], x: Any) -> Callable[[], float]:
    """A task that returns seconds per call, after two calls that do not count."""
    call(x)
    number = max(1, int(BLOCK_S / max(time_call(lambda: call(x)), 1e-9)))

    def block() -> float:
        return time_call(lambda: [call(x) for _ in range(number)] and None) / number

    return block


def _touch(out_features: int) -> Callable[[Any], object]:
    """Reads the input once and writes an output once."""
    return lambda x: (x.sum(), x.new_empty(x.shape[0], out_features).fill_(0))


def _step(call: Any, upstream: Any) -> Callable[[Any], object]:
    def step(x: Any) -> None:
        x.grad = None
        call.zero_grad()
        call(x).backward(upstream)

    return step


def _kept_bytes(layer: Any, x: Any) -> int:
    """Memory of tensors, parameters aside, that a forward pass keeps for the backward pass."""
    import torch

    storages: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x.requires_grad_())
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    del y
    return sum(size for pointer, size in storages.items() if pointer not in own)
