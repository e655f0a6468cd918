"""transformers' Trainer trains, saves and resumes a compressed model."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compresskit.hub import load_model
from compresskit.surgery.layout import layout_of
from tests.hub.tiny import assert_same_tensors, compressed, outputs

STEPS, SAVED = 4, 2


def trainer(model: Any, folder: Path) -> transformers.Trainer:
    rows = torch.arange(3, 3 + 8 * 6).view(8, 6)
    data = [{"input_ids": row, "labels": row} for row in rows]
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=SAVED,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    return transformers.Trainer(model, settings, train_dataset=data)


@pytest.mark.parametrize("name", ["bert-mlm", "llama-tied"])
def test_training_resumes_where_it_stopped(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start = compressed(name)
    whole = copy.deepcopy(start)
    trainer(whole, tmp_path).train()
    assert not torch.equal(outputs(whole), outputs(start))
    resumed = copy.deepcopy(start)
    transformers.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        trainer(resumed, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{SAVED}"))
    assert "unexpected keys" not in caplog.text
    assert_same_tensors(whole, resumed)


def test_a_training_checkpoint_opens(tmp_path: Path) -> None:
    model = compressed("bert-mlm")
    trainer(model, tmp_path).train()
    again = load_model(tmp_path / f"checkpoint-{STEPS}")
    assert_same_tensors(model, again)
    assert layout_of(again) == layout_of(model)
    trainer(again, tmp_path / "more").train()  # what was opened can be trained, too
    assert not torch.equal(outputs(again), outputs(model))
