"""Our layers against those of other libraries of the same structure: who computes the same function faster.

Ours, the peer's and the dense layer take turns. Before that, the outputs of all three are compared.
"""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from benchmarks.experiments import Experiment, Outcome
from benchmarks.timing import WAYS, interleave, median_ratio

SAMPLE_S = 2e-3
"""A layer is called until a sample takes about this long."""
TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest difference of outputs that counts as the same function, as a share of the largest output."""


@final
@dataclass(frozen=True, kw_only=True)
class Peers(Experiment):
    """One layer of a peer against ours.

    Args:
        peer: see `benchmarks/peers.py`.
        shape: of the weight, as rows x cols.
        tokens: that a layer gets at a time.
        device, dtype: where and in which type the layers run.
        kernel: what runs our layer on a processor: PyTorch's operations (`pytorch`), or our `compiled` kernel.
        repeats: rounds; the figures are their medians.
    """

    kind: ClassVar[str] = "peers"
    later: ClassVar[tuple[str, ...]] = ("kernel",)

    peer: str
    shape: str = "768x768"
    tokens: tuple[int, ...] = (1, 16, 128, 1024)
    device: str = "cpu"
    dtype: str = "float32"
    kernel: str = WAYS[0]
    repeats: int = 15

    def run(self, data: Path | None) -> Outcome:
        import torch

        from benchmarks.devices import device_name, find_device, find_dtype
        from benchmarks.peers import Place, make_peer, our_layer

        place = Place(find_device(self.device), find_dtype(self.dtype))
        torch.manual_seed(self.seed)
        peer = make_peer(self.peer, *map(int, self.shape.split("x")), place)
        ours, num_params = our_layer(peer, place)
        weight = place.move(peer.weight)
        layers = {"ours": ours, "peer": peer.forward, "dense": lambda x: torch.nn.functional.linear(x, weight)}
        figures: dict[str, Any] = {"params": {"ours": num_params, "peer": peer.num_params, "dense": weight.numel()}}
        figures |= {"structure": str(ours.structure), "packages": _packages(), "device": device_name(place.device)}
        with torch.inference_mode():
            for tokens in self.tokens:
                x = place.move(torch.randn(tokens, weight.shape[1]))
                figures[f"tokens_{tokens}"] = self._compare(layers, x)
        return Outcome(figures)

    def _compare(self, layers: Mapping[str, Any], x: Any) -> dict[str, Any]:
        """Times of all layers for one input, after a check that they agree.

        Raises:
            AssertionError: they do not.
        """
        from benchmarks.devices import timed

        outputs = {name: layer(x).float() for name, layer in layers.items()}
        largest = float(outputs["dense"].abs().max())
        differences = {
            name: float((outputs[name] - outputs["dense"]).abs().max()) / largest for name in ("ours", "peer")
        }
        for name, difference in differences.items():
            if not difference <= TOLERANCES[self.dtype]:
                raise AssertionError(f"{name} of {self.peer} computes something else: off by {difference:g}")
        tasks = {}
        for name, layer in layers.items():
            one = timed(_call(layer, x), x.device)
            one()
            tasks[name] = timed(_call(layer, x), x.device, repeats=max(1, round(SAMPLE_S / one())))
        times = interleave(tasks, self.repeats, collect=False)
        return {
            "peer_ratio": median_ratio(times["peer"], times["ours"]),
            "dense_ratio": median_ratio(times["dense"], times["ours"]),
            "differences": differences,
            "times_s": times,
        }

    @classmethod
    def row(cls, configuration: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, str]:
        params = figures["params"]
        row = {
            "peer": configuration["peer"],
            "weight": configuration["shape"],
            "kernel": configuration.get("kernel", WAYS[0]),
            "our structure": figures["structure"],
            "parameters, peer / ours": f"{params['peer']:,} / {params['ours']:,}",
        }
        for tokens in configuration["tokens"]:
            of = figures[f"tokens_{tokens}"]
            behind = "" if of["peer_ratio"] >= 1 else " (BEHIND)"
            row[f"time of peer / ours (dense / ours), {tokens} tokens"] = (
                f"{of['peer_ratio']:.2f}{behind} ({of['dense_ratio']:.2f})"
            )
        return row


def _call(layer: Any, x: Any) -> Any:
    return lambda: layer(x)


def _packages() -> dict[str, str]:
    """Versions of the peers that are installed."""
    names = ("tensorly-torch", "opt_einsum", "peft", "linear-operator", "pyfastkron")
    found = {distribution.metadata["Name"].lower() for distribution in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in names if {name, name.replace("-", "_")} & found}
