"""Fine-tuning: it learns, keeps the best, stops early, resumes bit for bit, and says what goes wrong."""

import json
import pathlib
from typing import Any

import pytest
import torch
from torch import nn

import compresskit
import compresskit.distill as distill
import compresskit.tasks as tasks
from compresskit.errors import DataError, OptionError, TrainingError
from tests.tasks.conftest import Write

FAST = {"lr": 3e-3, "batch_size": 8, "device": "cpu"}
SST2 = tasks.find_task("sst2")


def model_of(encoder: pathlib.Path, name: str = "sst2", *, compressed: bool = False) -> Any:
    torch.manual_seed(0)
    model = tasks.model_for(tasks.find_task(name), encoder, new_head=True)
    if compressed:
        compresskit.compress(model, "svd", ratio=1.5)
    return model


def train(model: Any, encoder: pathlib.Path, data: Any, run: pathlib.Path, name: str = "sst2", **settings: Any) -> Any:
    how = {key: settings.pop(key) for key in ("resume", "on_progress") if key in settings}
    made = tasks.TrainSettings(**{**FAST, **settings})
    return tasks.finetune_(model, tasks.tokenizer_for(encoder), tasks.find_task(name), data, run, made, **how)


@pytest.mark.parametrize("compressed", [False, True], ids=["dense", "compressed"])
def test_it_learns_and_says_how(
    compressed: bool, encoder: pathlib.Path, reviews: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    model, seen = model_of(encoder, compressed=compressed), []
    before = tasks.evaluate(model, tasks.tokenizer_for(encoder), SST2, reviews)["accuracy"]
    found = train(model, encoder, reviews, tmp_path / "run", epochs=6, on_progress=seen.append)
    assert before < 0.9
    assert found.metrics == {"accuracy": 1.0}
    assert (found.num_train, found.num_dev, found.steps) == (72, 12, 54)
    assert not model.training
    assert tasks.evaluate(model, tasks.tokenizer_for(encoder), SST2, reviews) == found.metrics
    assert any(isinstance(m, compresskit.FactorizedLinear) for m in model.modules()) == compressed
    assert [progress.step for progress in seen if progress.metrics] == sorted(p.step for p in seen if p.metrics)
    assert seen[-1].total == 54
    assert seen[-1].examples_per_s > 0
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "eval_accuracy" in entry] == [9, 18, 27, 36, 45, 54]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


def test_the_best_checkpoint_is_kept_and_training_stops_when_patience_ends(
    encoder: pathlib.Path, reviews: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    model = model_of(encoder)
    found = train(model, encoder, reviews, tmp_path / "run", epochs=20, eval_steps=6, patience=2, schedule="constant")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    curve = {entry["step"]: entry["eval_accuracy"] for entry in log if "eval_accuracy" in entry}
    assert found.metrics["accuracy"] == max(curve.values()) == curve[found.best_step]
    assert found.best_step == min(step for step, value in curve.items() if value == max(curve.values()))
    assert found.steps == found.best_step + 2 * 6 < 20 * 9


def test_dropout_is_another_while_it_trains(
    encoder: pathlib.Path, reviews: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    model, seen = model_of(encoder), set()
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]

    def look(_: tasks.TrainProgress) -> None:
        seen.update(module.p for module in dropouts)

    own = [module.p for module in dropouts]
    train(model, encoder, reviews, tmp_path / "run", dropout=0.0, epochs=1, on_progress=look)
    assert seen == {0.0}
    assert [module.p for module in dropouts] == own != [0.0] * len(own)


@pytest.mark.parametrize("compressed", [False, True], ids=["dense", "compressed"])
@pytest.mark.parametrize("stop", [9, 5], ids=["after an epoch", "within an epoch"])
def test_a_killed_run_goes_on_bit_for_bit(
    stop: int, compressed: bool, encoder: pathlib.Path, reviews: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    settings = {"epochs": 2, "eval_steps": stop}
    whole = model_of(encoder, compressed=compressed)
    train(whole, encoder, reviews, tmp_path / "whole", **settings)

    def kill(progress: tasks.TrainProgress) -> None:
        if progress.step > stop:
            raise KeyboardInterrupt

    killed = model_of(encoder, compressed=compressed)
    with pytest.raises(KeyboardInterrupt):
        train(killed, encoder, reviews, tmp_path / "run", on_progress=kill, **settings)
    resumed = model_of(encoder, compressed=compressed)
    found = train(resumed, encoder, reviews, tmp_path / "run", resume=True, **settings)
    assert found.steps == 18
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_runs_are_not_mixed_up(encoder: pathlib.Path, reviews: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match="there is no run to resume"):
        train(model_of(encoder), encoder, reviews, run, max_steps=1, resume=True)
    train(model_of(encoder), encoder, reviews, run, max_steps=1)
    with pytest.raises(TrainingError, match="holds an interrupted run; resume it, or discard it"):
        train(model_of(encoder), encoder, reviews, run, max_steps=1)
    with pytest.raises(TrainingError, match=r"was another one: settings: .*'lr': 0.003.* then, .*'lr': 0.1.* now"):
        train(model_of(encoder), encoder, reviews, run, max_steps=1, lr=0.1, resume=True)
    with pytest.raises(TrainingError, match="is not the folder of a training run"):
        tasks.close_run(reviews)
    tasks.close_run(run)
    assert not run.exists()


@pytest.mark.parametrize("name", ["stsb", "conll2003", "squad-v2"])
def test_every_kind_trains(name: str, encoder: pathlib.Path, write: Write, tmp_path: pathlib.Path) -> None:
    answers = {"text": ["rome"], "answer_start": [14]}
    questions = [{"id": "1", "question": "where ?", "context": "john lives in rome", "answers": answers}]
    questions += [{"id": "2", "question": "who ?", "context": "a film", "answers": {"text": [], "answer_start": []}}]
    for split in ("train", "dev"):
        write(f"stsb/{split}.tsv", "sentence1\tsentence2\tscore\n" + "a\tb\t1\ngood film\tthe film\t4\n" * 4)
        write(f"conll2003/{split}.txt", "john B-PER\nwalks O\n\nin O\nrome B-LOC\n\n" * 4)
        write(f"squad-v2/{split}.jsonl", questions)
    model = model_of(encoder, name)
    found = train(model, encoder, tmp_path, tmp_path / "run", name, max_steps=60, eval_steps=60)
    if name == "conll2003":
        assert found.metrics["entity_f1"] == 1
    else:
        assert found.metrics[tasks.find_task(name).primary] > 0.99


def test_distillation_scores_itself_on_a_task(
    encoder: pathlib.Path, reviews: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """What the two packages have to do with each other: score_on_ serves any Trainer."""
    teacher, student, tokenizer = model_of(encoder), model_of(encoder, compressed=True), tasks.tokenizer_for(encoder)
    train(teacher, encoder, reviews, tmp_path / "teacher", epochs=6)
    rows, dev = (tasks.load_task_data(SST2, reviews, split) for split in ("train", "dev"))
    features = [tasks.tokenized(examples, SST2, tokenizer) for examples in (rows, dev)]
    settings = tasks.TrainSettings(**FAST, epochs=6)
    trainer = distill.DistillationTrainer(
        teacher,
        student,
        distill.Objective(distill.make_loss("logits")),
        tasks.training_arguments(settings, tmp_path / "student", metric="accuracy"),
        train_dataset=features[0],
        eval_dataset=features[1],
        data_collator=tasks.collator(tokenizer),
    )
    tasks.score_on_(trainer, tasks.DevSet(SST2, tokenizer, dev, features[1]))
    trainer.train()
    assert trainer.state.best_metric == 1.0
    assert tasks.evaluate(student, tokenizer, SST2, reviews) == {"accuracy": 1.0}


def test_a_diverging_run_is_stopped(encoder: pathlib.Path, reviews: pathlib.Path, tmp_path: pathlib.Path) -> None:
    model = model_of(encoder)
    nn.init.constant_(model.classifier.bias, float("inf"))
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step 1: training has diverged"):
        train(model, encoder, reviews, tmp_path / "run", eval_steps=20)
    with pytest.raises(TrainingError, match=r"after step 1 the model's output holds NaN.*training has diverged"):
        train(model, encoder, reviews, tmp_path / "other", eval_steps=1)


def test_malformed_data_is_found_before_training(
    encoder: pathlib.Path, reviews: pathlib.Path, write: Write, tmp_path: pathlib.Path
) -> None:
    write("SST-2/dev.tsv", "sentence\tlabel\ngood\t1\nbad\tx\n")
    with pytest.raises(DataError, match=r"dev\.tsv, line 3: unknown label 'x'"):
        train(model_of(encoder), encoder, reviews, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match=r"the task sts has no labels to train on: .* stsb is"):
        train(model_of(encoder), encoder, reviews, tmp_path / "run", "sts")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"lr": 0.0}, "lr is 0.0; a number above 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"epochs": -1}, "epochs is -1"),
        ({"batch_size": 0}, "batch_size is 0; at least 1"),
        ({"warmup": 1.0}, "warmup is 1.0; a share"),
        ({"weight_decay": -0.1}, r"weight_decay \(-0.1\)"),
        ({"dropout": 1.0}, "dropout is 1.0; a share from 0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        tasks.TrainSettings(**settings)


def test_bfloat16_is_advised_where_the_processor_has_units_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda there=there: {"amx_bf16": there}, raising=False)
        assert ("--bf16" in (tasks.TrainSettings(device="cpu").advice() or "")) == there
        assert tasks.TrainSettings(device="cpu", bf16=True).advice() is None
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # older versions
    assert tasks.TrainSettings(device="cpu").advice() is None


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_training_in_bfloat16_keeps_float32_weights(
    device: str, encoder: pathlib.Path, reviews: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    model = model_of(encoder)
    found = train(model, encoder, reviews, tmp_path / "run", epochs=6, bf16=True, device=device)
    assert "forward" not in model.__dict__  # nor does it compute in bfloat16 afterwards
    assert found.metrics == tasks.evaluate(model, tasks.tokenizer_for(encoder), SST2, reviews)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert found.metrics["accuracy"] > 0.9


def test_batches_hold_rows_of_alike_length_and_every_row_once() -> None:
    lengths = torch.randint(5, 100, (1003,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = tasks.BucketSampler(lengths, 8, seed=1)
    first, again = list(sampler), list(sampler)
    assert first == again
    assert sorted(first) == list(range(1003))
    sampler.set_epoch(1)
    assert list(sampler) != first
    padded = sum(8 * max(lengths[i] for i in first[k : k + 8]) for k in range(0, 1000, 8))
    assert padded < 1.1 * sum(lengths)
    assert len(sampler) == 1003
