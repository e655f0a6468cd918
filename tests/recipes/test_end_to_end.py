"""Every preset from a teacher to a trained student: both stages, with and without a pre-trained model beside it."""

import json

import pytest
import torch

import compresskit.recipes as recipes
from compresskit.tasks import evaluate, find_task

FEW = {
    "task.max_steps": 3,
    "task.batch_size": 8,
    "task.device": "cpu",
    "corpus.max_steps": 3,
    "corpus.batch_size": 8,
    "corpus.max_length": 32,
    "corpus.device": "cpu",
}
"""Settings of a short run."""
RATIOS = {"kroneckerbert:k8": None, "kroneckerbert:k19": None, "kroneckerbert:k21": None, "matrix-decomposition": None}
"""Presets with sizes of their own; the others get a ratio that tiny models can have."""


def short(name):
    found = recipes.preset(name)
    return found.with_values({key: value for key, value in FEW.items() if key.split(".")[0] in found.data})


@pytest.mark.parametrize("name", recipes.presets())
def test_a_preset_runs_to_its_end(name, base, teacher, reviews, text, tmp_path):
    preset = short(name)
    ratio = None if name in RATIOS and name != "kroneckerbert:k19" else 1.5  # 12 does not divide a hidden size of 32
    seen = []
    result = recipes.distill(
        preset,
        teacher,
        tmp_path / "run",
        task=find_task("sst2"),
        data=reviews,
        corpus=text if preset.corpus else None,
        base=base if preset.corpus else None,
        ratio=ratio,
        on_progress=lambda stage, progress: seen.append((stage, progress.step)),
    )
    stages = ["corpus", "task"] if preset.corpus else ["task"]
    assert [stage.name for stage in result.stages] == stages
    assert [stage.steps for stage in result.stages] == [3] * len(stages)
    assert [name for name, step in seen if step == 3][:1] == stages[:1]
    assert result.ratio >= (ratio or 1.0)
    assert result.params == sum({p: p.numel() for p in result.student.parameters()}.values())
    assert evaluate(result.student, result.tokenizer, find_task("sst2"), reviews) == result.metrics
    losses = result.stages[-1].loss
    terms = {f"loss_{loss.name}" for loss in preset.task.objective.losses}
    assert terms <= set(losses)
    assert losses["loss"] == pytest.approx(sum(losses[term] for term in terms), rel=1e-3)
    if preset.corpus is not None and preset.corpus.mlm:
        assert {"loss_task", "loss_next-sentence"} <= set(result.stages[0].loss)  # this model has both heads
    json.dumps(result.to_json())
    assert torch.isfinite(torch.cat([p.flatten() for p in result.student.parameters()])).all()
