"""Whether rotations of the values inside attention heads pay for Kronecker products of the output projections."""

import copy
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from benchmarks.experiments import Experiment, ExperimentSkipped, Outcome
from benchmarks.experiments.quality import TEXTS


@final
@dataclass(frozen=True, kw_only=True)
class ValueRotation(Experiment):
    """Data-aware fits of one product, its small factor 1 x q, to all output projections of a BERT.

    Args:
        q: columns of the small factor; it stands right of rotated projections, and on the better side of the others.
        samples, max_tokens: texts that the fits see.
        model: `minilm`, or a random one.
    """

    kind: ClassVar[str] = "value-rotation"

    q: int
    samples: int = 128
    max_tokens: int = 128
    model: str = "minilm"

    def run(self, data: Path | None) -> Outcome:
        from benchmarks.embeddings import read_sentences
        from benchmarks.models import load_model
        from compresskit.calibration import calibrate, rotate_values_

        if data is not None and not (data / TEXTS).is_dir():
            raise ExperimentSkipped(f"the folder of --data has no folder {TEXTS} with texts to calibrate on")
        sentences = read_sentences()
        model, tokenizer = load_model(self.model, seed=self.seed, sentences=sentences)
        texts = sentences if data is None else data / TEXTS
        size = {"samples": self.samples, "max_length": self.max_tokens}
        moments = calibrate(model, texts, tokenizer=tokenizer, **size)
        turned = copy.deepcopy(model)
        turned_moments, names = rotate_values_(turned, moments)
        sides = [self._errors(model, moments, names, left=left) for left in (True, False)]
        rotated = self._errors(turned, turned_moments, names, left=False)
        layers = [{"as_it_is": min(side[name] for side in sides), "rotated": rotated[name]} for name in names]
        means = {when: statistics.fmean(layer[when] for layer in layers) for when in ("as_it_is", "rotated")}
        return Outcome({"layers": layers, "weighted_error": means})

    def _errors(self, model: Any, moments: Any, names: Sequence[str], *, left: bool) -> dict[str, float]:
        """By projection sqrt of the relative squared error of its outputs."""
        import compresskit

        small = (1, self.q)
        method = compresskit.Kronecker(left=small) if left else compresskit.Kronecker(right=small)
        rules = [(name, method) for name in names]
        report = compresskit.compress(copy.deepcopy(model), rules=rules, calibration=moments, allow_slower=True)
        return {site.name: site.weighted_error or 0.0 for site in report.sites}

    @classmethod
    def row(cls, configuration: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, str]:
        return {
            "small factor": f"1 x {configuration['q']}",
            "weighted error of output projections, mean over layers": f"{figures['weighted_error']['as_it_is']:.3f}",
            "with values rotated": f"{figures['weighted_error']['rotated']:.3f}",
        }
