"""The trainer: every task, what it leaves alone, how it cuts a step, what it saves, logs and refuses."""

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import compresskit
from compresskit.distill import JsonLinesLog, Objective, last_checkpoint, make_loss, objective_from_data
from compresskit.errors import CheckpointError, DistillError, LossError
from tests.distill.tiny import TASKS, arguments, collate, compressed, examples, model, objective, trainer

GOALS = {
    "sequence": objective("logits", "task", "hidden-states", "attention-scores"),
    "regression": objective("logits", "task", "embeddings"),
    "multi-label": objective("logits", "task"),
    "token": objective("logits", "task", "relations"),
    "question-answering": objective("logits", "task", "attention-maps"),
    "masked-lm": objective("logits", "task", "ffn-outputs"),
    "causal-lm": objective("logits", "task", "hidden-states"),
    "pretraining": objective("logits", "task", "next-sentence", "hidden-states"),
}


def logged(training):
    return [entry for entry in training.state.log_history if "loss" in entry]


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("task", TASKS)
def test_every_task(task, tmp_path):
    """A compressed student gets nearer to its teacher, which stays bit for bit what it was, in evaluation mode."""
    teacher, data = model(task), examples(task)
    student, before = compressed(teacher), state(teacher)
    training = trainer(
        teacher, student, GOALS[task], tmp_path, data=data, eval_data=data, max_steps=12, learning_rate=3e-3
    )
    start = training.evaluate()["eval_loss"]
    training.train()
    assert training.evaluate()["eval_loss"] < start
    torch.testing.assert_close(state(teacher), before, rtol=0, atol=0)
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    for entry in logged(training):
        terms = [value for name, value in entry.items() if name.startswith("loss_")]
        assert len(terms) == len(GOALS[task].losses)
        assert sum(terms) == pytest.approx(entry["loss"], rel=1e-4)
        assert entry["tokens_per_s"] > 0
    times = [entry["time_left_s"] for entry in logged(training)]
    assert times[0] > times[-1] == 0


def test_an_encoder_without_head_and_an_uncompressed_student(tmp_path):
    """Fewer and narrower layers, with learned projections that are trained and are no part of the student."""
    teacher, student = model(), model(num_hidden_layers=2, hidden_size=32, seed=1)
    goal = objective_from_data(
        {"loss": [{"name": "hidden-states", "projection": "linear"}, {"name": "embeddings", "projection": "linear"}]}
    )
    keys = list(student.state_dict())
    training = trainer(teacher, student, goal, tmp_path, max_steps=12, save_strategy="steps", save_steps=6)
    before = state(training._projections.modules)
    losses = [entry["loss"] for entry in (training.train(), logged(training))[1]]
    assert losses[-1] < losses[0]
    assert list(student.state_dict()) == keys
    after = load_file(tmp_path / "checkpoint-12" / "distillation_projections.safetensors")
    assert set(after) == set(before) == {"hidden-states.weight", "embeddings.weight"}
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert set(load_file(tmp_path / "checkpoint-12" / "model.safetensors")) == set(keys)
    training.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final" / "distillation_projections.safetensors").exists()


def test_a_checkpoint_is_the_student_alone_and_opens(tmp_path):
    teacher = model("sequence")
    student = compressed(teacher)
    trainer(
        teacher, student, GOALS["sequence"], tmp_path, data=examples("sequence"), save_strategy="steps", save_steps=6
    ).train()
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-6")
    torch.testing.assert_close(state(again), state(student), rtol=0, atol=0)
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in teacher.parameters())


@pytest.mark.parametrize(
    "goal",
    [
        objective("hidden-states", "attention-scores", "attention-maps"),
        objective("task"),
        Objective(make_loss("logits", {"places": "labelled"}), make_loss("logits", {"kind": "mse"})),
    ],
    ids=["features", "task", "logits"],
)
def test_accumulation_changes_nothing(goal, tmp_path):
    """One batch of 8 or four of 2: the same gradient, though examples differ in length and in number of labels."""
    teacher = model("masked-lm")
    results = []
    for batch, pieces in ((8, 1), (2, 4)):
        student = compressed(teacher)
        for module in student.modules():
            module.p = 0.0 if isinstance(module, torch.nn.Dropout) else getattr(module, "p", None)
        training = trainer(
            teacher,
            student,
            goal,
            tmp_path,
            data=examples("masked-lm", count=16),
            max_steps=2,
            optim="sgd",
            learning_rate=0.05,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=pieces,
            train_sampling_strategy="sequential",
        )
        training.train()
        results.append((state(student), [{k: v for k, v in e.items() if "loss" in k} for e in logged(training)]))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
    for whole, pieces in zip(results[0][1], results[1][1], strict=True):
        assert pieces == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("task", [None, "sequence"])
def test_resuming_in_one_process_is_bit_equal(task, tmp_path):
    teacher, goal = model(task), objective("hidden-states", "relations", *(["logits"] if task else []))
    first = compressed(teacher)
    second = copy.deepcopy(first)
    settings = {"data": examples(task), "save_strategy": "steps", "save_steps": 3}
    trainer(teacher, first, goal, tmp_path, **settings).train()
    (tmp_path / "checkpoint-6" / "trainer_state.json").write_text("{")  # killed while it was written
    assert last_checkpoint(tmp_path).name == "checkpoint-3"
    trainer(teacher, second, goal, tmp_path, **settings).train(resume_from_checkpoint=True)
    torch.testing.assert_close(state(second), state(first), rtol=0, atol=0)


def test_resuming_without_a_checkpoint_begins(tmp_path):
    assert last_checkpoint(tmp_path) is None
    teacher = model()
    training = trainer(teacher, compressed(teacher), objective("embeddings"), tmp_path, max_steps=2)
    assert training.train(resume_from_checkpoint=True).global_step == 2


def test_a_checkpoint_of_another_objective_is_refused(tmp_path):
    teacher, folder = model(), tmp_path / "out"
    narrow = {"hidden_size": 32, "seed": 1}
    goal = Objective(make_loss("embeddings", {"projection": "linear"}))
    trainer(teacher, model(**narrow), goal, folder, max_steps=2, save_strategy="steps", save_steps=1).train()
    other = Objective(make_loss("hidden-states", {"projection": "linear"}))
    with pytest.raises(CheckpointError, match=r"projections \['embeddings.weight'\], this objective"):
        trainer(teacher, model(**narrow), other, folder).train(resume_from_checkpoint=folder / "checkpoint-1")
    (folder / "checkpoint-1" / "distillation_projections.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no distillation_projections\.safetensors"):
        trainer(teacher, model(**narrow), goal, folder).train(resume_from_checkpoint=folder / "checkpoint-1")


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    teacher, student = model(), model(hidden_size=32, seed=1)
    goal = Objective(make_loss("hidden-states", {"projection": "linear"}))
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    often = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    training = trainer(teacher, student, goal, tmp_path, eval_data=examples(), **best, **often)
    training.train()
    assert training.state.best_model_checkpoint.endswith("checkpoint-2")  # the worst, so that it is not the last
    torch.testing.assert_close(
        load_file(tmp_path / "checkpoint-2" / "model.safetensors"), state(student), rtol=0, atol=0
    )


def test_predictions_and_metrics(tmp_path):
    teacher, data = model("sequence"), examples("sequence")
    student = compressed(teacher)

    def accuracy(prediction):
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    training = compresskit.distill.DistillationTrainer(
        teacher,
        student,
        objective("logits"),
        arguments(tmp_path),
        eval_dataset=data,
        data_collator=collate,
        compute_metrics=accuracy,
    )
    batch = collate(data)
    labels = batch.pop("labels")
    expected = float((student.eval()(**batch).logits.argmax(-1) == labels).float().mean())
    assert training.evaluate()["eval_accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_batches_by_length(strategy, tmp_path):
    teacher = model()
    student = compressed(teacher)
    before = state(student)
    trainer(teacher, student, objective("hidden-states"), tmp_path, train_sampling_strategy=strategy).train()
    assert any(not torch.equal(before[name], tensor) for name, tensor in state(student).items())


def test_bfloat16(tmp_path):
    """Both models run in bfloat16; the losses are taken in float32 and stay near those of float32."""
    teacher, losses = model("sequence"), []
    for bf16 in (False, True):
        student = compressed(teacher)
        goal = objective("hidden-states", "attention-scores", "logits")
        training = trainer(teacher, student, goal, tmp_path, data=examples("sequence"), bf16=bf16, max_steps=3)
        training.train()
        losses.append(logged(training)[0]["loss"])
        assert all(p.dtype == torch.float32 for p in student.parameters())
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path):
    teacher, results = model(), []
    goal = objective("embeddings", "hidden-states", "attention-scores", "relations", "ffn-outputs")
    for checkpointing in (False, True):
        student = compressed(teacher)
        trainer(
            teacher, student, goal, tmp_path, max_steps=2, optim="sgd", gradient_checkpointing=checkpointing
        ).train()
        results.append(state(student))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)


def test_reentrant_checkpointing_is_refused_where_it_would_cut_gradients(tmp_path):
    teacher = model()
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    training = trainer(teacher, compressed(teacher), objective("attention-scores"), tmp_path, **settings)
    with pytest.raises(DistillError, match=r"query.0, .* have no gradient under reentrant gradient checkpointing"):
        training.train()


def test_a_loss_that_is_not_finite_is_named_and_leaves_the_student_alone(tmp_path):
    teacher = model("sequence")
    student = compressed(teacher)
    rows = [{**row, "labels": float("nan")} for row in examples("regression")]
    goal = objective("task", "hidden-states")
    teacher, student = model("regression"), compressed(model("regression"))
    before = state(student)
    with pytest.raises(LossError, match=r"after 0 steps the loss is not finite: task is nan\. Lower"):
        trainer(teacher, student, goal, tmp_path, data=rows).train()
    torch.testing.assert_close(state(student), before, rtol=0, atol=0)


def test_hooks_are_removed(tmp_path):
    teacher = model("sequence")
    student = compressed(teacher)
    goal = objective("embeddings", "hidden-states", "attention-scores", "ffn-outputs", "logits")
    trainer(teacher, student, goal, tmp_path, data=examples("sequence"), max_steps=1).train()
    for module in [*teacher.modules(), *student.modules()]:
        assert not module._forward_hooks
    broken = trainer(teacher, student, goal, tmp_path, data=[{"input_ids": [VOCAB_END]}], max_steps=1)
    with pytest.raises(IndexError):
        broken.train()
    for module in [*teacher.modules(), *student.modules()]:
        assert not module._forward_hooks


VOCAB_END = 120
"""The first word that does not exist."""


def test_the_teacher_takes_what_the_student_does_not(tmp_path):
    """token_type_ids reach a BERT teacher of a DistilBERT student."""
    torch.manual_seed(0)
    teacher = model()
    config = transformers.DistilBertConfig(
        vocab_size=120, dim=48, n_layers=2, n_heads=4, hidden_dim=96, max_position_embeddings=40
    )
    student = transformers.DistilBertModel(config)
    seen = []
    teacher.register_forward_pre_hook(lambda *args: seen.append(sorted(args[2])), with_kwargs=True)
    data = [{**row, "token_type_ids": [0] * len(row["input_ids"]), "text": "dropped"} for row in examples()]
    trainer(teacher, student, objective("hidden-states"), tmp_path, data=data, max_steps=1).train()
    assert seen == [["attention_mask", "input_ids", "token_type_ids"]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is not supported: the objective says"),
        ({"torch_compile": True}, "torch_compile=True is not supported: features are captured by hooks"),
    ],
)
def test_arguments_that_do_not_work_are_refused(settings, message, tmp_path):
    teacher = model()
    with pytest.raises(DistillError, match=message):
        trainer(teacher, compressed(teacher), objective("embeddings"), tmp_path, **settings)


def test_a_batch_without_ids_is_named(tmp_path):
    teacher = model()
    training = trainer(teacher, compressed(teacher), objective("embeddings"), tmp_path)
    with pytest.raises(DistillError, match="needs input_ids or inputs_embeds; this one has labels"):
        training.compute_loss(training.model, {"labels": torch.ones(2)})
    with pytest.raises(DistillError, match=r"mask is \(batch, time\) = \(2, 3\), got \(2, 3, 3\)"):
        training.compute_loss(
            training.model,
            {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 3, 3)},
        )


def test_the_log_is_json_lines_and_goes_on_after_a_resume(tmp_path):
    teacher, path = model(), tmp_path / "logs" / "train.jsonl"
    settings = {"save_strategy": "steps", "save_steps": 3}
    goal = objective("hidden-states")
    for resume in (False, str(tmp_path / "checkpoint-3")):
        callbacks = [JsonLinesLog(path)]
        trainer(teacher, compressed(teacher), goal, tmp_path, callbacks=callbacks, **settings).train(resume)
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4, 5, 6]
        assert all(entry["max_steps"] == 6 and "loss_hidden-states" in entry for entry in entries if "loss" in entry)
        path.write_text(path.read_text() + '{"step": 6')  # killed while it was written
