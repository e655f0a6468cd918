"""Recipes of several stages."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

import compresskit
from compresskit.distill import Stage, carry_over, run_stages
from compresskit.errors import DistillError
from tests.distill.tiny import arguments, collate, examples, model, objective


def small(task, *, seed=0):
    """A student whose encoder has the same factors' sizes whatever its head."""
    student = model(task, seed=seed)
    compresskit.compress(student, compresskit.SVD(rank=12), include="*encoder*")
    return student


def recipe(folder, *, steps=3):
    """Corpus, then task: the second student has the encoder of the first and the head of its own teacher."""
    common = {"data_collator": collate}
    often = {"max_steps": steps, "save_strategy": "steps", "save_steps": 1}
    return [
        Stage(
            name="corpus",
            teacher=model("masked-lm"),
            objective=objective("hidden-states", "task"),
            args=arguments(folder / "corpus", **often),
            train_dataset=examples("masked-lm"),
            **common,
        ),
        Stage(
            name="task",
            teacher=model("sequence", seed=2),
            objective=objective("hidden-states", "logits"),
            args=arguments(folder / "task", **often),
            train_dataset=examples("sequence"),
            prepare=lambda last: carry_over(last, small("sequence", seed=2)),
            **common,
        ),
    ]


def test_the_second_stage_goes_on_from_the_first(tmp_path):
    corpus, task = recipe(tmp_path)
    seen = []
    prepare = task.prepare
    spied = dataclasses.replace(task, prepare=lambda last: (seen.append(last), prepare(last))[1])
    result = run_stages(small("masked-lm"), [corpus, spied])
    assert type(result).__name__ == "BertForSequenceClassification"
    first = load_file(tmp_path / "corpus" / "student.safetensors")
    assert first  # tied names are stored once
    torch.testing.assert_close({name: seen[0].state_dict()[name] for name in first}, first, rtol=0, atol=0)
    second = load_file(tmp_path / "task" / "student.safetensors")
    torch.testing.assert_close(second, result.state_dict(), rtol=0, atol=0)


def test_a_recipe_resumes_bit_equal(tmp_path):
    """Killed in the second stage: the first is not trained again, the second goes on at its checkpoint."""
    whole = run_stages(small("masked-lm"), recipe(tmp_path / "whole"))
    run_stages(small("masked-lm"), recipe(tmp_path / "broken"))
    for name in ("student.safetensors", "checkpoint-3/trainer_state.json"):
        (tmp_path / "broken" / "task" / name).unlink()
    before = (tmp_path / "broken" / "corpus" / "student.safetensors").stat().st_mtime_ns
    resumed = run_stages(small("masked-lm"), recipe(tmp_path / "broken"), resume=True)
    assert (tmp_path / "broken" / "corpus" / "student.safetensors").stat().st_mtime_ns == before
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_encoders_are_carried_over_with_the_head_left_alone():
    source, target = small("masked-lm", seed=1), small("sequence", seed=2)
    head = target.classifier.weight.detach().clone()
    assert carry_over(source, target) is target
    torch.testing.assert_close(target.classifier.weight, head, rtol=0, atol=0)
    batch = collate(examples(count=3))
    torch.testing.assert_close(
        target.bert(**batch).last_hidden_state, source.bert(**batch).last_hidden_state, rtol=0, atol=0
    )


def test_what_cannot_be_done_is_named(tmp_path):
    corpus, task = recipe(tmp_path)
    with pytest.raises(DistillError, match="an output folder of its own"):
        run_stages(small("masked-lm"), [corpus, dataclasses.replace(task, args=corpus.args)])
    with pytest.raises(DistillError, match=r"the encoders differ in \d+ tensors: encoder.layer.0"):
        carry_over(model("masked-lm"), small("sequence"))
