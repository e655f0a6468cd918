"""Kronecker layers on a GPU: our Triton kernels against the PyTorch path, the dense layer and the limit of the machine.

Each way is timed twice in the same rounds: as it is called from Python, and as replays of a CUDA graph of several
calls, which leave out what Python and the launches take; at few tokens that is most of the first figure. The limit is
that of the kind `roofline`.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from benchmarks.experiments import Experiment, Outcome
from benchmarks.experiments.roofline import SAMPLE_S, limit_s, machine_rates, one_structure
from benchmarks.timing import interleave, median_ratio

WAYS = ("auto", "fused", "mixed", "pytorch")
"""Of `compresskit.use_kernels`; a way that does not take a structure is left to PyTorch and as fast as that."""
GRAPH_CALLS = 16


@final
@dataclass(frozen=True, kw_only=True)
class FusedKernels(Experiment):
    """Layers of one shape in each way.

    Args:
        options: each fixes one structure, as after `--rule kronecker:`: `left=8x8,terms=2`.
        shape: of the weight, as rows x cols.
        tokens: that the layer gets at a time.
        device, dtype: where and in which type the layers run; without a GPU nothing is captured, and all ways are one.
        repeats: rounds; the figures are their medians.
    """

    kind: ClassVar[str] = "fused"

    options: tuple[str, ...]
    shape: str
    tokens: tuple[int, ...] = (1, 16, 128, 1024, 4096)
    device: str = "cuda"
    dtype: str = "bfloat16"
    repeats: int = 9

    def run(self, data: Path | None) -> Outcome:
        import torch

        from benchmarks.devices import device_name, find_device, find_dtype

        device, dtype = find_device(self.device), find_dtype(self.dtype)
        torch.manual_seed(self.seed)
        rows, cols = map(int, self.shape.split("x"))
        dense = torch.nn.Linear(cols, rows).to(device=device, dtype=dtype)
        structures = {options: one_structure("kronecker", options, self.shape) for options in self.options}
        with torch.inference_mode():
            rates = machine_rates(device, dtype, self.repeats)
            found = {
                options: {
                    str(tokens): _measure(structure, dense, tokens, rates, self.repeats) for tokens in self.tokens
                }
                for options, structure in structures.items()
            }
        where = {"device": device_name(device), "macs_per_s": rates[0], "bytes_per_s": rates[1]}
        return Outcome({**where, "structures": found})

    @classmethod
    def row(cls, configuration: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, str]:
        row = {
            "weight": configuration["shape"],
            "where": f"{figures['device'] or configuration['device']}, {configuration['dtype']}",
        }
        timing = "in a graph" if configuration["device"] != "cpu" else "as called"
        for tokens in map(str, configuration["tokens"]):
            title = f"dense / auto (fused, mixed, PyTorch; share of the roofline, auto) {timing}, {tokens} tokens"
            row[title] = "; ".join(
                f"{options}: {_cell(found[tokens])}" for options, found in figures["structures"].items()
            )
        return row


def _cell(found: Mapping[str, Any]) -> str:
    how = found.get("graph", found["called"])
    ratios = how["dense_ratio"]
    return (
        f"{ratios['auto']:.2f} ({ratios['fused']:.2f}, {ratios['mixed']:.2f}, {ratios['pytorch']:.2f}; "
        f"{how['of_limit']['auto']:.0%})"
    )


def _measure(structure: Any, dense: Any, tokens: int, rates: tuple[float, float], repeats: int) -> dict[str, Any]:
    """Figures of one structure and number of tokens, as called and, on a GPU, in a graph."""
    import torch

    from compresskit.machines import random_layer

    like = dense.weight
    layer = random_layer(structure).to(device=like.device, dtype=like.dtype)
    x = torch.randn(tokens, structure.cols, device=like.device, dtype=like.dtype)
    kinds: dict[str, dict[str, Callable[[], float]]] = {"called": {}} | ({"graph": {}} if like.is_cuda else {})
    for name in (*WAYS, "dense"):
        used = layer if name in WAYS else dense
        for kind, tasks in kinds.items():
            tasks[name] = _in_way(name, _task(used, x, in_graph=kind == "graph"))
    _check(layer, x)
    times = {kind: interleave(tasks, repeats, collect=False) for kind, tasks in kinds.items()}
    limits = dict.fromkeys(WAYS, limit_s(x, structure.rows, structure.macs, structure.num_params, rates))
    limits["dense"] = limit_s(x, structure.rows, like.numel(), like.numel(), rates)
    figures: dict[str, Any] = {"limit_ratio": limits["dense"] / limits["auto"]}
    for kind, taken in times.items():
        medians = {name: statistics.median(t) for name, t in taken.items()}
        figures[kind] = {
            "dense_ratio": {way: median_ratio(taken["dense"], taken[way]) for way in WAYS},
            "of_limit": {name: limits[name] / time_s for name, time_s in medians.items()},
            "times_s": medians,
        }
    return figures


def _in_way(name: str, make: Callable[[], Callable[[], float]]) -> Callable[[], float]:
    """A task that is made and run with the kernels of this way; a layer without any cares about none."""
    import compresskit

    way = name if name in WAYS else "auto"
    with compresskit.use_kernels(way):
        task = make()

    def run() -> float:
        with compresskit.use_kernels(way):
            return task()

    return run


def _task(layer: Any, x: Any, *, in_graph: bool) -> Callable[[], Callable[[], float]]:
    """Makes a task: seconds of one call of the layer, from as many as fill a sample."""
    from benchmarks.devices import timed

    def make() -> Callable[[], float]:
        for _ in range(2):  # the first call compiles, or chooses a kernel
            layer(x)
        call, calls = (_captured(layer, x), GRAPH_CALLS) if in_graph else (lambda: layer(x), 1)
        timed(call, x.device)()
        once_s = timed(call, x.device)()
        task = timed(call, x.device, repeats=max(1, round(SAMPLE_S / once_s)))
        return lambda: task() / calls

    return make


def _captured(layer: Any, x: Any) -> Callable[[], object]:
    """Replays a graph of several calls."""
    import torch

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            layer(x)
    return graph.replay


def _check(layer: Any, x: Any) -> None:
    """All ways compute the same, but for rounding."""
    import compresskit

    with compresskit.use_kernels("pytorch"):
        wanted = layer(x).double()
    for way in WAYS:
        with compresskit.use_kernels(way):
            off = float((layer(x).double() - wanted).norm() / wanted.norm())
        assert off < 0.02, f"{way} of {layer.structure} computes something else: off by {off}"
