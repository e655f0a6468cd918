"""One factorised layer against the dense one: forward, training step, and what is kept for the backward pass.

The yardstick is the limit: multiply-adds of the dense layer / multiply-adds of the structure. A speed-up that reaches
it does its products as fast as a dense layer does.

At few tokens or small layers that is out of reach of any two products: calls cost what they cost. So the same rounds
time a floor: two bare calls of 1 x 1 products, and reading the input and writing the output once (in a training step
with the engine's way back through the two calls, the bias's gradient, and writing the input's). What is possible is
`floor + (dense - floor) / limit`; a layer's share of that stands beside its share of the bare limit.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, final

from benchmarks.experiments import Experiment, Outcome, SuiteError
from benchmarks.memory import keep_memory
from benchmarks.timing import WAYS, interleave, median_ratio, timed_block, without_kernel


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
        kernel: `pytorch`: layers run by PyTorch's operations. `compiled`: by our compiled kernel, and in the same
            rounds, as `plain`, without it.
        repeats: rounds; the figures are their medians.
    """

    kind: ClassVar[str] = "layers"
    later: ClassVar[tuple[str, ...]] = ("kernel",)

    method: str
    shape: str
    structures: tuple[str, ...]
    tokens: tuple[int, ...] = (1, 16, 128, 1024)
    step_tokens: tuple[int, ...] = (128,)
    dtype: str = "float32"
    mode: str = "eager"
    memory: str = "kept"
    kernel: str = WAYS[0]
    repeats: int = 7

    def run(self, data: Path | None) -> Outcome:
        import torch

        skipped = keep_memory() if self.memory == "kept" else {}
        if self.mode == "compile":  # layers of all structures share one forward method, and each is a recompilation
            torch._dynamo.config.recompile_limit = 8 * (len(self.structures) + 1)
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
                **({"plain": {"forward": {}, "step": {}}} if self.kernel == "compiled" else {}),
            }
            for name, layer in layers.items()
        }
        floors: dict[str, dict[str, float]] = {"forward": {}, "step": {}}

        def measure(kind: str, tasks: dict[str, Callable[[], float]], count: int) -> None:
            plain = {f"{name} plain": without_kernel(tasks[name]) for name in layers if self.kernel == "compiled"}
            times = interleave({**tasks, **plain}, self.repeats, collect=False)
            floors[kind][str(count)] = median_ratio(times["dense"], times["floor"])
            for name in layers:
                figures[name][kind][str(count)] = median_ratio(times["dense"], times[name])
                if plain:
                    figures[name]["plain"][kind][str(count)] = median_ratio(times["dense"], times[f"{name} plain"])

        for count in self.tokens:
            with torch.inference_mode():
                x = self._input(dense, count)
                tasks = {name: timed_block(call, x) for name, call in run.items()}
                measure("forward", {**tasks, "floor": timed_block(_touch(dense.out_features), x)}, count)
        for count in self.step_tokens:
            x = self._input(dense, count).requires_grad_()
            upstream = torch.randn(count, dense.out_features).to(dense.weight.dtype)
            tasks = {name: timed_block(_step(call, upstream), x) for name, call in run.items()}
            measure("step", {**tasks, "floor": timed_block(_touch_step(upstream), x)}, count)
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
        shares = {}
        for kind, option in kinds:
            for count in map(str, configuration[option]):
                floor = 1 / figures["floor"][kind][count]
                bare = [f[kind][count] / f["limit"] for f in found]
                above = [f[kind][count] * _possible(floor, f["limit"]) for f in found]
                shares[f"{kind}, {count} tokens"] = f"{_summary(bare)}; {_summary(above)}"
        slower = {
            count: sum(f["limit"] > 1 and f["forward"][count] < 1 for f in found)
            for count in map(str, configuration["tokens"])
        }
        return {
            "method": configuration["method"],
            "shape": configuration["shape"],
            "how": ", ".join(
                [configuration["dtype"], configuration["mode"], f"{configuration['memory']} memory"]
                + ["compiled kernel"] * (configuration.get("kernel") == "compiled")
            ),
            "structures": str(len(found)),
            **shares,
            "slower than dense at": ", ".join(f"{count}: {n}" for count, n in slower.items() if n) or "none",
            "kept / dense": f"{max(f['kept'] for f in found):.2f}",
        }


def _possible(floor: float, limit: float) -> float:
    """The least time of a structure / the dense layer's, from the floor's / the dense layer's and the limit."""
    return floor + max(1 - floor, 0) / limit


def _summary(shares: Sequence[float]) -> str:
    return f"{statistics.median(shares):.2f} (from {min(shares):.2f})"


def _touch(out_features: int) -> Callable[[Any], object]:
    """Calls two products of next to nothing, reads the input once and writes an output once."""
    import torch

    one = torch.ones(1, 1)
    return lambda x: (torch.mm(torch.mm(one, one), one), _pass(x, x.shape[0], out_features))


def _pass(x: Any, tokens: int, features: int) -> None:
    x.sum()
    x.new_empty(tokens, features).fill_(0)


def _touch_step(upstream: Any) -> Callable[[Any], object]:
    """The same and its way back: gradients of the two products, the bias's gradient, an input's gradient written."""
    import torch

    ones = [torch.ones(1, 1, requires_grad=True) for _ in range(3)]
    grad = torch.ones(1, 1)

    def step(x: Any) -> None:
        for one in ones:
            one.grad = None
        torch.mm(torch.mm(ones[0], ones[1]), ones[2]).backward(grad)
        with torch.no_grad():
            _pass(x, *upstream.shape)
            upstream.sum(0)
            x.new_empty(x.shape).fill_(0)

    return step


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
