"""Whether the order of the hidden units of a feed-forward network matters to its Kronecker products.

Units can be put in any order: rows of the first weight and columns of the second move together, and the model does the
same. One product is fitted to each weight, units are assigned to the places where the products meet them best (a linear
assignment), and so on in turn: energy that is kept never falls. Deterministic.
"""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from benchmarks.experiments import Experiment, Outcome
from benchmarks.products import nearest_product, side


@final
@dataclass(frozen=True, kw_only=True)
class UnitOrder(Experiment):
    """All feed-forward networks of a BERT.

    Args:
        first, second: `pxq`, the small factor left of the weight into the hidden units, and of that out of them.
        rounds: at most so many assignments.
        model: `minilm`, or a random one.
    """

    kind: ClassVar[str] = "unit-order"

    first: str
    second: str
    rounds: int = 12
    model: str = "minilm"

    def run(self, data: Path | None) -> Outcome:
        from benchmarks.embeddings import read_sentences
        from benchmarks.models import load_model

        model, _ = load_model(self.model, seed=self.seed, sentences=read_sentences())
        started = time.perf_counter()
        layers = [
            self._layer(layer.intermediate.dense.weight.detach(), layer.output.dense.weight.detach())
            for layer in model.encoder.layer
        ]
        seconds = time.perf_counter() - started
        means = {when: statistics.fmean(layer[when] for layer in layers) for when in ("as_it_is", "ordered")}
        return Outcome({"layers": layers, "kept": means, "time_s": seconds})

    def _layer(self, enter: Any, leave: Any) -> dict[str, float]:
        """Share of the energy of both weights, (units, width) and (width, units), that one product each keeps."""
        import torch
        from scipy.optimize import linear_sum_assignment

        first, second = (side(text) for text in (self.first, self.second))
        order, kept = torch.arange(len(enter)), []
        for _ in range(self.rounds + 1):
            products = nearest_product(enter[order], first), nearest_product(leave[:, order], second)
            energies = [float(product.square().sum()) for product in products]
            kept.append(sum(energies) / float(enter.square().sum() + leave.square().sum()))
            met = products[0] @ enter.T + products[1].T @ leave  # (places, units)
            found = torch.from_numpy(linear_sum_assignment(met.numpy(), maximize=True)[1])
            if torch.equal(found, order):
                break
            order = found
        return {"as_it_is": kept[0], "ordered": kept[-1]}

    @classmethod
    def row(cls, configuration: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, str]:
        return {
            "small factors left": f"{configuration['first']} in, {configuration['second']} out",
            "energy kept by one product, mean over layers": f"{figures['kept']['as_it_is']:.3f}",
            "with units in the best order found": f"{figures['kept']['ordered']:.3f}",
            "time": f"{figures['time_s']:.0f} s",
        }
