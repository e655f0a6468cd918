"""What is left of a model after compression without any training: errors, sizes, speed, sentence embeddings."""

import copy
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from benchmarks.experiments import Experiment, Outcome
from benchmarks.timing import interleave, median_ratio, time_call

STS_B = Path("glue") / "STS-B" / "dev.tsv"
TEXTS = Path("text")
"""A file and a folder, of plain texts, that the folder of `--data` holds."""


REPORTED = (
    *("ratio", "site_ratio", "body_ratio", "bytes_ratio", "macs_ratio", "relative_error"),
    *("params_before", "params_after", "gap", "time_s"),
)
"""What is kept of the report of `compress`."""


@final
@dataclass(frozen=True, kw_only=True)
class Quality(Experiment):
    """One compressed model beside the dense one.

    Args:
        method, ratio: of compresskit.
        model: `minilm`, or a random one.
        batches: sizes of the batches whose forward pass is timed.
        tokens: length of their sequences.
        repeats: rounds of timing.
    """

    kind: ClassVar[str] = "quality"

    method: str
    ratio: float
    model: str = "minilm"
    batches: tuple[int, ...] = (1, 8)
    tokens: int = 128
    repeats: int = 15

    def run(self, data: Path | None) -> Outcome:
        import compresskit
        from benchmarks.embeddings import agreement, embed, read_sentences
        from benchmarks.models import load_model

        sentences = read_sentences()
        dense, tokenizer = load_model(self.model, seed=self.seed, sentences=sentences)
        small = copy.deepcopy(dense)
        report = compresskit.compress(small, self.method, ratio=self.ratio).to_json()
        figures = {
            "report": {name: report[name] for name in REPORTED},
            "agreement": agreement(embed(small, tokenizer, sentences), embed(dense, tokenizer, sentences)),
            "forward_time_ratio": {str(batch): self._forward_ratio(small, dense, batch) for batch in self.batches},
            "round_trip": _round_trip(small, tokenizer, sentences),
        }
        if data is None:
            return Outcome({**figures, "sts_b": None}, {"sts_b": "no folder was given with --data"})
        return Outcome({**figures, "sts_b": _sts_b(data / STS_B, small, dense, tokenizer)})

    def _forward_ratio(self, small: Any, dense: Any, batch: int) -> float:
        """Time of a forward pass, compressed / dense."""
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(0, dense.config.vocab_size, (batch, self.tokens), generator=generator)
        with torch.inference_mode():
            small(ids), dense(ids)  # the first pass of a process is no measure
            tasks = {"small": lambda: time_call(lambda: small(ids)), "dense": lambda: time_call(lambda: dense(ids))}
            times = interleave(tasks, self.repeats)
        return median_ratio(times["small"], times["dense"])

    @classmethod
    def row(cls, configuration: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, str]:
        report, sts_b = figures["report"], figures["sts_b"]
        return {
            "method": configuration["method"],
            "asked": f"{configuration['ratio']:g}",
            "parameters": f"{report['params_after']:,}",
            "ratio": f"{report['ratio']:.3f}",
            "of sites": f"{report['site_ratio']:.2f}",
            "of body": f"{report['body_ratio']:.2f}",
            "multiply-adds ÷": f"{report['macs_ratio']:.2f}",
            "relative error": f"{report['relative_error']:.4f}",
            **{f"time / dense, batch {b}": f"{t:.2f}" for b, t in figures["forward_time_ratio"].items()},
            "cosine with dense": f"{figures['agreement']['mean_cosine']:.3f}",
            "rank agreement of pairs": f"{figures['agreement']['similarity_spearman']:.3f}",
            "round trip": "bit-equal" if figures["round_trip"]["bit_equal"] else "DIFFERS",
            "STS-B (dense)": "skipped" if sts_b is None else f"{sts_b['compressed']:.3f} ({sts_b['dense']:.3f})",
        }


def _round_trip(model: Any, tokenizer: Any, sentences: list[str]) -> dict[str, Any]:
    """Whether the model gives the same bits after `save_pretrained` and `from_pretrained`, and its size on disk."""
    import torch
    from transformers import AutoModel

    from benchmarks.embeddings import tokenize

    batch = tokenize(tokenizer, sentences)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        model.save_pretrained(folder)
        loaded = AutoModel.from_pretrained(folder).eval()
        before, after = (m(**batch).last_hidden_state for m in (model, loaded))
        disk_bytes = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
    return {"bit_equal": torch.equal(before, after), "disk_bytes": disk_bytes}


def _sts_b(path: Path, small: Any, dense: Any, tokenizer: Any) -> dict[str, Any]:
    from benchmarks.embeddings import read_sts_b

    sts_b = read_sts_b(path)
    return {
        "dense": sts_b.spearman(dense, tokenizer),
        "compressed": sts_b.spearman(small, tokenizer),
        "pairs": len(sts_b.scores),
        "sha256": sts_b.sha256,
    }
