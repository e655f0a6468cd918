"""Checkpoints in a fresh process: with compresskit they open bit for bit, without it nothing opens by accident."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.hub.tiny import IDS, MODELS, compressed, outputs

AUTO = {"bert": ["AutoModel", "AutoModelForSequenceClassification", "AutoModelForMaskedLM"]}
Outcomes = dict[str, str]


def store(model: Any, folder: Path, **options: Any) -> None:
    """Save a model with inputs, its outputs for them, and the classes to try."""
    model.save_pretrained(folder, **options)
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)}
    else:
        inputs = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS.clone()
    (folder / "expected").mkdir()
    save_file({**inputs, "expected": outputs(model).contiguous()}, folder / "expected" / "tensors.safetensors")
    classes = [type(model).__name__, *AUTO.get(model.config.model_type, ["AutoModel"])]
    (folder / "expected" / "classes.json").write_text(json.dumps(classes))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcomes]:
    """What happens to each checkpoint in a fresh process `without` compresskit, and then `with` it."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name in MODELS:
        store(compressed(name), root / name)
        store(compressed(name).dequantize(), root / f"dense-{name}")
    for name in ("bert-mlm", "bert-mlm-untied"):
        store(compressed(name), root / f"sharded-{name}", max_shard_size="8KB")
    child = [sys.executable, str(Path(__file__).with_name("child.py")), str(root)]
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    printed = subprocess.run(child, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, Outcomes] = json.loads(printed)
    return found


def test_with_compresskit_everything_opens(outcomes: dict[str, Outcomes]) -> None:
    assert len(outcomes["with"]) > 2 * len(MODELS)
    assert {key: text for key, text in outcomes["with"].items() if text not in ("equal", "opened")} == {}


def test_without_compresskit_no_compressed_model_opens(outcomes: dict[str, Outcomes]) -> None:
    small = {key: text for key, text in outcomes["without"].items() if not key.startswith("dense-")}
    assert len(small) > len(MODELS)
    assert {key: text for key, text in small.items() if "ignore_mismatched_sizes" not in text} == {}


def test_without_compresskit_dequantized_models_open(outcomes: dict[str, Outcomes]) -> None:
    dense = {key: text for key, text in outcomes["without"].items() if key.startswith("dense-")}
    assert {key: text for key, text in dense.items() if text not in ("equal", "opened")} == {}
