"""What is left of a model after compression without any training, with fits that see some texts and without."""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from benchmarks.experiments import Experiment, ExperimentSkipped, Outcome, SuiteError
from benchmarks.experiments.quality import STS_B, TEXTS
from benchmarks.options import rule

BATCH = 32
HOWS = (
    "plain",
    "weighted",
    "compared",
    "judged",
    "searched",
    "searched judged",
    "robust",
    "gradients",
    "sequential",
    "sequential robust",
    "refined",
    "gradients refined",
)
ENCODER = "encoder.*"
SENSITIVITIES = ("parameters", "balanced", "searched")
KINDS_OF_TEXT = ("plain", "alike")
SHARE = 4
"""Sensitivities are measured or searched, and plans compared, on one of so many batches, all lengths among them."""
JUDGED_BY = 4096
"""Pairs of sentences of STS-B's train split by which a model is judged, without their scores. By 512 of them models
whose agreement differs by .004 were told apart wrongly."""
SEARCHED_BY = 2048
"""The same where dozens of models are judged: what a search is for are larger differences."""
KEPT = ("relative_error", "weighted_error", "params_after", "time_s", "compared", "searched")


@final
@dataclass(frozen=True, kw_only=True)
class DataAware(Experiment):
    """Several fits of one size beside each other, in one run.

    Args:
        fits: each a method of compresskit and how it is fitted (`svd weighted`), or a baseline (`svd-llm`, `asvd`).
            `compared` is weighted, and of `auto` and the methods it chooses from the one whose model answers nearest.
            `judged` takes the one that agrees most with the dense model on the cosines of pairs of sentences, those of
            STS-B's train split, without their scores. `searched` searches by that what layers of each shape count;
            `searched judged` does both.
            `robust` is weighted and expects inputs to be off; `sequential` is weighted and sequential; `refined` is
            refined as well; `gradients` weighs by gradients too.
        scope: `whole`: any layer, embeddings included, the ratio is that of the model. `encoder`: layers of the encoder
            alone, and the ratio is that of the encoder's parameters.
        ratio: original / compressed parameters.
        model: `minilm`, or a random one.
        samples, max_tokens: of the texts that the fits see; max_tokens of a text.
        epochs: of refinement.
        sensitivity: what a layer's error counts: `parameters`, as many as it has; `balanced`, also by what it does
            to the model's output; `searched`, by what whole compressed models answer.
        rules: as on the command line, `PATTERN=METHOD:KEY=VALUE`, of fits by compresskit.
        texts: `plain` text, or `alike`: the sentences of STS-B's train split, without their scores, none of them of
            the dev split that models are scored on.
    """

    kind: ClassVar[str] = "data-aware"
    later: ClassVar[tuple[str, ...]] = ("sensitivity", "rules", "texts")

    fits: tuple[str, ...]
    scope: str
    ratio: float
    model: str = "minilm"
    samples: int = 128
    max_tokens: int = 128
    epochs: int = 10
    sensitivity: str = SENSITIVITIES[0]
    rules: tuple[str, ...] = ()
    texts: str = KINDS_OF_TEXT[0]

    def run(self, data: Path | None) -> Outcome:
        from benchmarks.embeddings import agreement, embed, rank_correlation, read_sentences, read_sts_b
        from benchmarks.models import load_model
        from compresskit.calibration import calibrate, read_batches

        if self.scope not in ("whole", "encoder"):
            raise SuiteError(f"scope is whole or encoder, got {self.scope!r}")
        if self.sensitivity not in SENSITIVITIES:
            raise SuiteError(f"sensitivity is one of {', '.join(SENSITIVITIES)}, got {self.sensitivity!r}")
        if self.texts not in KINDS_OF_TEXT:
            raise SuiteError(f"texts are {' or '.join(KINDS_OF_TEXT)}, got {self.texts!r}")
        sentences, sts_b = read_sentences(), None if data is None else read_sts_b(data / STS_B)
        dense, tokenizer = load_model(self.model, seed=self.seed, sentences=sentences)
        texts = sentences if data is None else self._texts(data)
        size = {"samples": self.samples, "max_length": self.max_tokens, "batch_size": BATCH}
        batches = list(read_batches(texts, tokenizer, **size))
        started = time.perf_counter()
        moments = calibrate(dense, batches, samples=self.samples)
        calibrate_time_s = time.perf_counter() - started
        wanted = embed(dense, tokenizer, sentences)
        pairs = [] if sts_b is None else sts_b.cosines(dense, tokenizer)
        scored = None if sts_b is None else {"sts_b": rank_correlation(pairs, sts_b.scores), "pairs": len(pairs)}
        figures: dict[str, Any] = {
            "dense": scored,
            "calibration": {"time_s": calibrate_time_s, "tokens": moments.tokens, "memory_bytes": moments.memory_bytes},
            "fits": {},
        }
        weights = self._sensitivities(dense, moments, batches)
        judge = self._judge(dense, tokenizer, data)
        for fit in self.fits:
            small, report = self._fit(dense, fit, moments, batches, weights, judge)
            found: dict[str, float | None] = {"sts_b": None, "sts_b_agreement": None}
            if sts_b is not None:
                cosines = sts_b.cosines(small, tokenizer)
                found = {
                    name: rank_correlation(cosines, to) for name, to in zip(found, (sts_b.scores, pairs), strict=True)
                }
            figures["fits"][fit] = {**report, **agreement(embed(small, tokenizer, sentences), wanted), **found}
        return Outcome(figures, {} if sts_b is not None else {"sts_b": "no folder was given with --data"})

    def _texts(self, data: Path) -> Any:
        """What is calibrated on."""
        from benchmarks.embeddings import read_sts_b

        wanted = data / (TEXTS if self.texts == KINDS_OF_TEXT[0] else STS_B.with_name("train.tsv"))
        if not wanted.exists():
            missing = wanted.relative_to(data)
            raise ExperimentSkipped(f"the folder of --data has no {missing} with texts to calibrate on")
        if wanted.is_dir():
            return wanted
        train, dev = read_sts_b(wanted), read_sts_b(data / STS_B)
        return sorted({*train.first, *train.second} - {*dev.first, *dev.second})

    def _judge(self, dense: Any, tokenizer: Any, data: Path | None) -> Callable[[int], Callable[[Any], float]]:
        """By number of pairs: how far a model is from the dense one's cosines of them."""
        from benchmarks.embeddings import StsB, disagreement, read_sentences, read_sts_b

        def of(number: int) -> Callable[[Any], float]:
            if data is None:
                first = read_sentences()
                pairs = StsB(tuple(first), tuple(first[1:] + first[:1]), (0.0,) * len(first), "")
            else:
                pairs = read_sts_b(data / STS_B.with_name("train.tsv")).every(number)
            return disagreement(dense, tokenizer, pairs)

        return of

    def _fit(
        self,
        dense: Any,
        fit: str,
        moments: Any,
        batches: Any,
        sensitivities: Mapping[str, float] | None,
        judge: Callable[[int], Callable[[Any], float]],
    ) -> tuple[Any, dict[str, Any]]:
        """A compressed copy, and what is kept of the report."""
        import compresskit
        from benchmarks.baselines import BASELINES, baseline_
        from compresskit.calibration import Refine, calibrate

        small = copy.deepcopy(dense)
        budget = self._budget(dense)
        include = ENCODER if self.scope == "encoder" else "*"
        started = time.perf_counter()
        if fit in BASELINES:
            names = [p.name for p in compresskit.find_sites(dense).sites]
            names = [n for n in names if self.scope == "whole" or n.startswith(ENCODER.removesuffix("*"))]
            baseline_(small, fit, batches, names, budget)
            params = sum(parameter.numel() for parameter in small.parameters())
            return small, {"params_after": params, "time_s": time.perf_counter() - started}
        method, _, how = fit.partition(" ")
        if how not in HOWS:
            raise SuiteError(
                f"a fit is METHOD HOW with HOW one of {', '.join(HOWS)}, or {' or '.join(BASELINES)}: {fit!r}"
            )
        in_order, refined = "refined" in how or "sequential" in how, "refined" in how
        if "gradients" in how:
            moments = calibrate(dense, batches, samples=self.samples, gradients=True)
        report = compresskit.compress(
            small,
            method,
            params=budget,
            include=include,
            rules=[rule(text) for text in self.rules],
            calibration=None if how == "plain" else moments,
            sensitivities=sensitivities,
            search=self._search(how, batches, judge),
            compare=self._compare(how, batches, judge),
            robust="robust" in how,
            samples=batches if in_order else None,
            sequential=in_order,
            refine=Refine(epochs=self.epochs) if refined else None,
        ).to_json()
        return small, {name: report[name] for name in KEPT}

    def _search(self, how: str, batches: Any, judge: Callable[[int], Callable[[Any], float]]) -> Any:
        if "searched" in how:
            return judge(SEARCHED_BY)
        return batches[::SHARE] if self.sensitivity == "searched" else None

    def _compare(self, how: str, batches: Any, judge: Callable[[int], Callable[[Any], float]]) -> Any:
        if "judged" in how:
            return judge(JUDGED_BY)
        return batches[::SHARE] if how == "compared" else None

    def _sensitivities(self, model: Any, moments: Any, batches: Any) -> Mapping[str, float] | None:
        """What layers count; None: as many as they have parameters."""
        from compresskit.calibration import balanced, measure_sensitivities

        if self.sensitivity != "balanced":
            return None
        return balanced(model, measure_sensitivities(model, batches[::SHARE], moments))

    def _budget(self, dense: Any) -> int:
        """Parameters that the whole compressed model may have."""
        total = sum(parameter.numel() for parameter in dense.parameters())
        part = total if self.scope == "whole" else sum(parameter.numel() for parameter in dense.encoder.parameters())
        return int(total - part + part / self.ratio)

    @classmethod
    def row(cls, configuration: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, str]:
        dense = figures["dense"]
        fits = {
            f"{name}: STS-B (agreement of pairs)": f"{_score(fit['sts_b'])} ({fit['similarity_spearman']:.3f})"
            for name, fit in figures["fits"].items()
        }
        return {
            "scope": configuration["scope"],
            "ratio": f"{configuration['ratio']:g}",
            "dense": _score(None if dense is None else dense["sts_b"]),
            **fits,
        }


def _score(value: float | None) -> str:
    return "skipped" if value is None else f"{value:.3f}"
