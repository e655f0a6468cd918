"""What distillation on plain text, without any label, brings back of a compressed sentence encoder."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, final

from benchmarks.experiments import Experiment, ExperimentSkipped, Outcome, SuiteError
from benchmarks.experiments.quality import REPORTED, STS_B, TEXTS
from benchmarks.options import pairs, rule

SMALL = "small-dense"
FITS = ("weighted", "robust", "even-words")
BUDGETS = ("outputs", "weights")


@final
@dataclass(frozen=True, kw_only=True)
class CorpusDistill(Experiment):
    """A compressed copy of a sentence encoder before, during and after distillation by the original.

    Args:
        method, ratio: of compresskit; `small-dense`: fewer and narrower layers, as the preset of this name makes them,
            measured with the learned projection of its embeddings (losses with `projection=linear`).
        options: of the method, or values of the preset, as `key=value key=value`.
        rules: `pattern=method`, which come before the method.
        part: `model`: the ratio is that of the whole model; `encoder`: only the encoder is compressed and trained, and
            the ratio is its own.
        calibration: fit to what the layers see on so many of the texts; 0: to the weights alone.
        budget: structures that are fitted to texts are chosen by errors of the layers' `outputs`, or of `weights`.
        searched: what layers of each shape count is searched by agreement with the dense model on the cosines of so
            many pairs of sentences, those of STS-B's train split without their scores; 0: it is not.
        fit: `robust`: expecting inputs to be off; `even-words`: all words count alike; both with a calibration.
        model: `minilm`, or a random one.
        texts: `data`: the folder `text` in that of --data; `own`: the sentences of the benchmarks.
        unit, max_length: of `compresskit.tasks.load_corpus`.
        held_out: texts that are kept for measuring.
        losses: terms of the objective, each `name key=value ...`.
        steps, batch, lr, warmup, weight_decay, schedule: of the training.
        dtype: bfloat16 multiplies in that type, tf32 in TensorFloat-32 where the device can; weights and optimiser are
            float32 all the same.
        eval_steps: steps between two points of the curve; there are checkpoints at the same moments.
        device: where students are fitted and trained.
    """

    kind: ClassVar[str] = "corpus-distill"
    later: ClassVar[tuple[str, ...]] = ("rules", "fit", "device", "budget", "searched")

    method: str
    ratio: float
    options: str = ""
    part: str = "model"
    calibration: int = 0
    model: str = "minilm"
    texts: str = "data"
    unit: str = "sentence"
    max_length: int = 64
    held_out: int = 512
    losses: tuple[str, ...] = ("hidden-states",)
    steps: int = 300
    batch: int = 64
    lr: float = 1e-3
    warmup: float = 0.05
    weight_decay: float = 0.0
    schedule: str = "linear"
    dtype: str = "float32"
    eval_steps: int = 100
    rules: tuple[str, ...] = ()
    fit: str = "weighted"
    device: str = "cpu"
    budget: str = "outputs"
    searched: int = 0

    def run(self, data: Path | None) -> Outcome:
        with TemporaryDirectory() as work:
            return self.run_in(data, Path(work))

    def run_in(self, data: Path | None, work: Path) -> Outcome:
        from benchmarks.corpus import Measure, close, read_corpus, train_
        from benchmarks.devices import device_name, find_device, multiply_in, trains_on
        from benchmarks.embeddings import SENTENCES, read_sentences, read_sts_b
        from benchmarks.models import load_model
        from compresskit import keep_freed_memory
        from compresskit.tasks import TrainSettings

        if self.texts == "data" and (data is None or not (data / TEXTS).is_dir()):
            raise ExperimentSkipped(f"there is no plain text: give a folder that holds {TEXTS}/ with --data")
        keep_freed_memory()  # as the command line does; figures are the same
        device = find_device(self.device)
        multiply_in(self.dtype)
        source = SENTENCES if data is None or self.texts == "own" else data / TEXTS
        dense, tokenizer = load_model(self.model, seed=self.seed, sentences=read_sentences())
        dense.to(device)
        rows, held_out = read_corpus(
            source, tokenizer, work / "text", max_length=self.max_length, unit=self.unit, held_out=self.held_out
        )
        sts_b = None if data is None else read_sts_b(data / STS_B)
        measure = Measure(dense, tokenizer, held_out, sts_b)
        student, report = self._student(dense, rows, self._judge(dense, tokenizer, data))
        settings = TrainSettings(
            max_steps=self.steps,
            lr=self.lr,
            batch_size=self.batch,
            warmup=self.warmup,
            schedule=self.schedule,  # type: ignore[arg-type]
            weight_decay=self.weight_decay,
            seed=self.seed,
            eval_steps=self.eval_steps,
            bf16=self.dtype == "bfloat16",
            device=trains_on(self.device),
        )
        figures = {"report": report, "dense": measure(dense), "before": measure(student)}
        folder = work / f"{self.kind}-{self.key()}"
        trained = train_(student, dense, self._objective(), rows, tokenizer, folder, settings, measure)
        figures |= {"after": trained.curve[-1], "training": vars(trained)}
        if device.type != "cpu":
            figures["device"] = device_name(device)
        close(folder)
        if sts_b is None:
            return Outcome(figures, {"sts_b": "no folder was given with --data"})
        return Outcome(figures | {"sts_b": {"pairs": len(sts_b.scores), "sha256": sts_b.sha256}})

    def _judge(self, dense: Any, tokenizer: Any, data: Path | None) -> Any:
        from benchmarks.embeddings import disagreement, read_sts_b

        if not self.searched:
            return None
        if not self.calibration or self.budget != BUDGETS[0] or self.method == SMALL or data is None:
            raise SuiteError(f"{self.kind}: searched needs --data, a method, a calibration, and its budget")
        pairs = read_sts_b(data / STS_B.with_name("train.tsv")).every(self.searched)
        return disagreement(dense, tokenizer, pairs)

    def _student(self, dense: Any, rows: Any, judge: Any = None) -> tuple[Any, dict[str, Any]]:
        """The student, and what is kept of the report on it."""
        import compresskit
        from compresskit.calibration import calibrate

        for name, known in (("fit", FITS), ("budget", BUDGETS)):
            value = getattr(self, name)
            if value not in known or (value != known[0] and not self.calibration):
                raise SuiteError(f"{self.kind}: {name} is {' or '.join(known)}, with a calibration; got {value!r}")
        if self.part not in ("model", "encoder") or (self.method, self.part) == (SMALL, "encoder"):
            raise SuiteError(f"{self.kind}: part is model or encoder, and model for {SMALL}; got {self.part!r}")
        params_before = sum(p.numel() for p in dense.parameters())
        if self.method == SMALL:
            student = self._small(dense)
            after = sum(p.numel() for p in student.parameters())
            return student, {"ratio": params_before / after, "params_before": params_before, "params_after": after}
        method = compresskit.decomposition(self.method, pairs(self.options.split()))
        student = copy.deepcopy(dense)
        seen = None if not self.calibration else calibrate(dense, rows, samples=self.calibration, seed=self.seed)
        if seen is not None and self.fit == "even-words":
            seen = seen.with_even_words()
        rules = [rule(text) for text in self.rules]
        size: dict[str, Any] = {"ratio": self.ratio}
        if self.part == "encoder":
            body = sum(p.numel() for p in student.encoder.parameters())
            size = {"params": int(params_before - body + body / self.ratio), "include": "encoder.*"}
            student.embeddings.requires_grad_(False)
        how = {"calibration": seen, "robust": self.fit == "robust"}
        if self.budget == "weights":
            planned = compresskit.plan(student, method, rules=rules, **size)
            report = compresskit.apply(student, planned, **how)
        else:
            report = compresskit.compress(student, method, rules=rules, search=judge, **size, **how)
        said = report.to_json()
        return student, {name: said[name] for name in REPORTED}

    def _small(self, dense: Any) -> Any:
        """The student of the preset that makes fewer and narrower layers."""
        import torch

        from compresskit.recipes import preset, student_maker

        torch.manual_seed(self.seed)  # of its layers
        return student_maker(preset(SMALL).with_values(pairs(self.options.split())), dense, ratio=self.ratio)(dense)

    def _objective(self) -> Any:
        from compresskit.distill import Objective, make_loss

        return Objective(*(make_loss(name, pairs(options)) for name, *options in map(str.split, self.losses)))

    @classmethod
    def row(cls, configuration: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, str]:
        report, training = figures["report"], figures["training"]
        cells = {
            "method": " ".join(
                [configuration["method"], *configuration["options"].split(), *configuration.get("rules", ())]
            ),
            "ratio": f"{configuration['ratio']:g} ({configuration['part']})",
            "fitted to": _fitted_to(configuration),
            "parameters": f"{report['params_after']:,}",
            "steps": f"{training['steps']:,}",
            "tokens": f"{training['tokens']:,}",
        }
        for name, title in (
            ("sts_b", "STS-B"),
            ("similarity_spearman", "rank agreement of pairs"),
            ("hidden_error", "hidden error"),
        ):
            both = [figures[when].get(name) for when in ("before", "after")]
            cells[title] = " → ".join("skipped" if value is None else f"{value:.3f}" for value in both)
        dense = figures["dense"].get("sts_b")
        return cells | {"dense STS-B": "skipped" if dense is None else f"{dense:.3f}"}


def _fitted_to(configuration: Mapping[str, Any]) -> str:
    if not configuration["calibration"]:
        return "weights"
    said = [f"{configuration['calibration']} texts", configuration.get("fit")]
    said += [f"budget by {configuration['budget']}" if "budget" in configuration else None]
    said += ["searched"] if configuration.get("searched") else []
    return ", ".join(filter(None, said))
