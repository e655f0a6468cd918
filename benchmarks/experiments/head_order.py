"""Whether the order of the heads of an attention layer matters to its Kronecker products.

Heads can be put in any order: rows of queries, keys and values and columns of the output move together, and the model
does the same. One product is fitted to each of the four weights; two heads change places where all four together then
keep most, until no exchange helps. Deterministic.
"""

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from benchmarks.experiments import Experiment, Outcome
from benchmarks.products import nearest_product, side


@final
@dataclass(frozen=True, kw_only=True)
class HeadOrder(Experiment):
    """All attention layers of a BERT.

    Args:
        small: `pxq`, the small factor left of each weight.
        rounds: at most so many exchanges.
        model: `minilm`, or a random one.
    """

    kind: ClassVar[str] = "head-order"

    small: str
    rounds: int = 12
    model: str = "minilm"

    def run(self, data: Path | None) -> Outcome:
        from benchmarks.embeddings import read_sentences
        from benchmarks.models import load_model

        model, _ = load_model(self.model, seed=self.seed, sentences=read_sentences())
        heads = model.config.num_attention_heads
        started = time.perf_counter()
        layers = []
        for layer in model.encoder.layer:
            attention = layer.attention
            inputs = [getattr(attention.self, name).weight.detach() for name in ("query", "key", "value")]
            layers.append(self._layer([*inputs, attention.output.dense.weight.detach().T], heads))
        seconds = time.perf_counter() - started
        means = {when: statistics.fmean(layer[when] for layer in layers) for when in ("as_it_is", "ordered")}
        return Outcome({"layers": layers, "kept": means, "time_s": seconds})

    def _layer(self, weights: Sequence[Any], heads: int) -> dict[str, float]:
        """Share of the energy of weights (heads * size, width) that one product each keeps; the last is transposed."""
        whole = sum(float(weight.square().sum()) for weight in weights)
        order = list(range(heads))
        first = kept = self._kept(weights, order)
        for _ in range(self.rounds):
            tried = {}
            for a, b in itertools.combinations(range(heads), 2):
                other = order.copy()
                other[a], other[b] = order[b], order[a]
                tried[tuple(other)] = self._kept(weights, other)
            best = max(tried, key=lambda other: tried[other])
            if tried[best] <= kept * (1 + 1e-6):
                break
            order, kept = list(best), tried[best]
        return {"as_it_is": first / whole, "ordered": kept / whole}

    def _kept(self, weights: Sequence[Any], order: Sequence[int]) -> float:
        ordered = [weight.view(len(order), -1, weight.shape[1])[list(order)].flatten(0, 1) for weight in weights]
        ordered[-1] = ordered[-1].T
        return sum(float(nearest_product(weight, side(self.small)).square().sum()) for weight in ordered)

    @classmethod
    def row(cls, configuration: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, str]:
        return {
            "small factor left": configuration["small"],
            "energy of attention kept by one product, mean over layers": f"{figures['kept']['as_it_is']:.4f}",
            "with heads in the best order found": f"{figures['kept']['ordered']:.4f}",
            "time": f"{figures['time_s']:.0f} s",
        }
