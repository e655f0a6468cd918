"""Training a student against a teacher, on `transformers.Trainer`."""

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from compresskit.distill.anatomy import Anatomy
from compresskit.distill.batch import LABELS, UNITS, Batch, make_batch
from compresskit.distill.cache import TeacherCache
from compresskit.distill.features import Feature, Recorder
from compresskit.distill.objective import Evaluated, Objective, bind
from compresskit.distill.precision import PreciseTrainer
from compresskit.distill.progress import Meter
from compresskit.distill.projections import ATTRIBUTE, Projections
from compresskit.distill.teacher import Teacher
from compresskit.errors import DistillError, LossError


@final
class DistillationTrainer(PreciseTrainer):
    """A `transformers.Trainer` whose loss is an objective between a student and a teacher.

    All that Trainer does works on the student: schedules, accumulation, mixed precision, DDP, evaluation, checkpoints
    (of the student alone), resuming, callbacks. The teacher runs in evaluation mode without gradients, is never changed
    and never saved. Terms are averages over the whole optimiser step, however it is cut into micro-batches and
    processes; padding never counts. Logs have `loss_<term>`, `tokens_per_s` and `time_left_s`.

    Args:
        teacher: a transformers model; it is moved to the training device.
        student: a transformers model, usually a compressed copy of the teacher; changed in place.
        objective: what to minimise.
        args: of Trainer; `train_sampling_strategy="group_by_length"` makes batches with little padding.
        train_dataset, eval_dataset, data_collator, processing_class, compute_metrics, callbacks, optimizers,
            preprocess_logits_for_metrics: as in Trainer.
        cache: keeps the teacher's answers on disk; worth it where examples come again unchanged.

    Raises:
        DistillError: teacher, student, objective and arguments do not fit together; raised before any work.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        student: PreTrainedModel,
        objective: Objective,
        args: TrainingArguments,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        data_collator: Callable[..., Any] | None = None,
        processing_class: Any = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        cache: TeacherCache | None = None,
    ) -> None:
        _check_arguments(args)
        self._student = Anatomy(student, "student")
        teachers = Anatomy(teacher, "teacher")
        self._objective = bind(objective, self._student, teachers)
        super().__init__(
            model=student,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=[*callbacks],
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self._set_up(teachers, cache)

    def _set_up(self, teachers: Anatomy, cache: TeacherCache | None) -> None:
        """What needs Trainer's own set-up: its device and its precision."""
        student = self._student.model
        self.model_accepts_loss_kwargs = True  # with the next line: our loss is divided already, see `compute_loss`
        self.loss_is_scaled_for_ga = True
        self._accepted = frozenset(inspect.signature(student.forward).parameters)
        self._needs = self._objective.student_features()
        self._projections = Projections(student, self._objective.make_projections().to(self.args.device))
        self.teacher = Teacher(
            teachers, self._objective.teacher_features(), cache=cache, precision=self.accelerator.autocast
        )
        if self.place_model_on_device:
            teachers.model.to(self.args.device)
        self._meter = Meter()
        self.add_callback(_StepEnd(self._meter))

    def train(
        self,
        resume_from_checkpoint: str | Path | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train, as in Trainer; `True` resumes from the newest complete checkpoint, or begins if there is none.

        Raises:
            LossError: a term of the loss is not finite; the student is as it was before that step.
            CheckpointError: the checkpoint is not one of this training.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
        folder = str(resume_from_checkpoint) if resume_from_checkpoint else None
        if folder is not None:
            self._projections.load(Path(folder))
        with self._projections.attached():
            try:
                return super().train(folder, trial, ignore_keys_for_eval)
            finally:
                self.teacher.flush()

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor]:
        """Micro-batches of one optimiser step, and the units in all of them, those of other processes included."""
        self._meter.start()
        samples: list[dict[str, Any]] = []
        while len(samples) < num_batches and (sample := next(epoch_iterator, None)) is not None:
            samples.append(sample)
        counts = [self._batch(sample).counts() for sample in samples] or [torch.zeros(len(UNITS))]
        totals = torch.stack(counts).sum(0).to(device)
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, reduction="sum")
        self._meter.add_tokens(totals[UNITS.index("token")])
        return samples, totals

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The objective on one micro-batch: its sums divided by the units of the whole step (`num_items_in_batch`).

        Raises:
            LossError: a term is not finite.
        """
        batch = self._batch(inputs)
        totals = batch.counts() if num_items_in_batch is None else num_items_in_batch
        answers = self.teacher(batch)
        evaluated, outputs = self._run_student(model, batch, answers, totals)
        _check_finite(evaluated, self.state.global_step)
        if num_items_in_batch is None:
            return (evaluated.total, outputs) if return_outputs else evaluated.total
        processes = self.accelerator.num_processes  # DDP takes the mean of the gradients; we want their sum
        self._meter.add_terms({name: value * processes for name, value in evaluated.terms.items()})
        return (evaluated.total * processes, outputs) if return_outputs else evaluated.total * processes

    def _run_student(
        self, model: nn.Module, batch: Batch, answers: dict[Feature, Tensor], totals: Tensor
    ) -> tuple[Evaluated, Any]:
        """One forward pass, in whose last hook the loss is computed: what DDP wraps then returns nothing but the loss,
        and so knows exactly which parameters get a gradient.
        """
        found: dict[str, Any] = {}
        recorder = Recorder(self._student, self._needs)

        def compute(module: nn.Module, args: Any, outputs: Any) -> dict[str, Tensor]:
            recorder.take_outputs(outputs)
            self._check_graph(recorder)
            found["outputs"] = outputs
            found["loss"] = self._objective(recorder.features, answers, batch, totals, self._projections.modules)
            return {"loss": found["loss"].total}

        student = self._student.model
        with recorder:
            hook = student.register_forward_hook(compute)
            try:
                returned = model(**{name: batch.inputs[name] for name in batch.inputs if name in self._accepted})
            finally:
                hook.remove()
        return Evaluated(returned["loss"], found["loss"].terms), found["outputs"]

    def _batch(self, inputs: dict[str, Any]) -> Batch:
        return make_batch(inputs, causal=self._student.causal, shifted=self._student.task == "causal-lm")

    def _check_graph(self, recorder: Recorder) -> None:
        """Reentrant gradient checkpointing computes what is inside a layer without a graph: no gradient would flow."""
        checkpointed = any(getattr(layer, "gradient_checkpointing", False) for layer in self._student.layers)
        if not (self._student.model.training and torch.is_grad_enabled() and checkpointed):
            return
        trained = any(p.requires_grad for layer in self._student.layers for p in layer.parameters())
        cut = [str(f) for f in self._needs if f.role in _INSIDE and not recorder.features[f].requires_grad]
        if cut and trained:
            raise DistillError(
                f"{', '.join(cut)} of the student have no gradient under reentrant gradient checkpointing; use "
                "TrainingArguments(gradient_checkpointing_kwargs={'use_reentrant': False})"
            )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """The objective on an evaluation batch (so the teacher runs too), the student's outputs and the labels."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        ignored = ignore_keys or getattr(self._student.model.config, "keys_to_ignore_at_inference", [])
        predictions = tuple(value.detach() for name, value in outputs.items() if name not in ignored)
        labels = tuple(inputs[name].detach() for name in self.label_names if inputs.get(name) is not None)
        return loss.detach(), _only(predictions), _only(labels) if labels else None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the terms of the loss, the speed and the time left to what Trainer logs."""
        if "loss" in logs:
            logs.update(self._meter.take(self.state.max_steps - self.state.global_step, self._mean))
        super().log(logs, start_time)

    def _mean(self, values: Tensor) -> Tensor:
        reduced: Tensor = self.accelerator.reduce(values, reduction="mean") if self.args.world_size > 1 else values
        return reduced

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = dict.fromkeys([*_columns(self), *sorted(self.teacher.accepted), *LABELS])
        self._signature_columns = list(columns)  # what only the teacher takes is not an unused column

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.teacher.flush()
        if self.args.should_save:  # before the rest, whose last file says that the checkpoint is complete
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            self._projections.save(folder)
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if state_dict is not None:
            state_dict = {n: t for n, t in state_dict.items() if not n.startswith(f"{ATTRIBUTE}.")}
        with self._projections.detached():
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with self._projections.detached():
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with self._projections.detached():
            super()._load_best_model()


@final
class _StepEnd(TrainerCallback):  # type: ignore[misc]
    """Tells the meter when an optimiser step has ended."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.meter.stop()


_INSIDE = ("query", "key", "value", "ffn")
"""Roles of what a layer computes inside, where checkpointing recomputes."""


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint in the output folder of a training that was written completely; None without one.

    A training that is killed while it writes leaves a folder without `trainer_state.json`, its last file.
    """
    found: dict[int, Path] = {}
    for path in Path(folder).glob("checkpoint-*/trainer_state.json"):
        step = path.parent.name.removeprefix("checkpoint-")
        if step.isdecimal() and _is_json(path):
            found[int(step)] = path.parent
    return found[max(found)] if found else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return False
    return True


def _columns(trainer: Any) -> list[str]:
    return list(trainer._signature_columns)


def _only(values: tuple[Tensor, ...]) -> Any:
    return values[0] if len(values) == 1 else values


def _check_arguments(args: TrainingArguments) -> None:
    """Raise DistillError for arguments of Trainer that do not work with our loss."""
    refused = {
        "label_smoothing_factor": args.label_smoothing_factor != 0 and "the objective says what the loss is",
        "torch_compile": args.torch_compile and "features are captured by hooks, which it does not keep",
        "n_gpu": args.n_gpu > 1 and "one process drives one device here; start with accelerate launch or torchrun",
    }
    for name, reason in refused.items():
        if reason:
            raise DistillError(f"{name}={getattr(args, name)} is not supported: {reason}")


def _check_finite(evaluated: Evaluated, step: int) -> None:
    values = torch.stack(list(evaluated.terms.values()))
    if torch.isfinite(values).all():
        return
    wrong = [f"{name} is {float(value)}" for name, value in evaluated.terms.items() if not torch.isfinite(value)]
    raise LossError(
        f"after {step} steps the loss is not finite: {', '.join(wrong)}. "
        "Lower the learning rate, warm up, clip gradients (max_grad_norm), or train in bfloat16 or float32"
    )
