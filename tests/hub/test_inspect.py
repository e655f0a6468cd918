"""What a checkpoint says of itself agrees with the model that opens from it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compresskit.errors import CheckpointError
from compresskit.hub import inspect_checkpoint
from compresskit.surgery.layout import layout_of
from compresskit.surgery.sites import count_params
from tests.hub.tiny import compressed, dense


@pytest.mark.parametrize("name", ["bert-mlm", "bert-mlm-untied", "gpt2", "t5", "marian", "vit", "dinov2"])
@pytest.mark.parametrize("shard", ["8KB", "1GB"])
def test_numbers(name: str, shard: str, tmp_path: Path) -> None:
    model = compressed(name)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    found = inspect_checkpoint(tmp_path)
    assert found.architecture == type(model).__name__
    stored = set(model.state_dict()) - set(model._keys_to_ignore_on_save or ())  # fixed position tables, in Marian
    skipped = sum(p.numel() for n, p in model.named_parameters() if n not in stored)
    buffers = sum(b.numel() for n, b in model.named_buffers() if n in stored)
    assert found.params == count_params(model) + buffers - skipped
    assert found.dense_params == count_params(dense(name)) + buffers - skipped
    assert len(found.sites) == len(layout_of(model))
    assert json.loads(json.dumps(found.to_json()))["ratio"] == found.ratio > 1
    assert found.provenance == {"ratio": 2.0}
    assert found.weight_bytes == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))


def test_what_is_not_a_compressed_checkpoint(tmp_path: Path) -> None:
    dense("bert").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is a model, but not one that compresskit compressed"):
        inspect_checkpoint(tmp_path)


def test_a_map_that_does_not_fit_the_weights(tmp_path: Path) -> None:
    compressed("bert").save_pretrained(tmp_path)
    file, tensors = tmp_path / "model.safetensors", load_file(tmp_path / "model.safetensors")
    name = "encoder.layer.0.attention.self.query.left.weight"
    save_file({**tensors, name: torch.zeros(32, 5)}, file)
    with pytest.raises(CheckpointError, match=r"query.left is \(32, 5\), not \(32, 8\). Both files must come from one"):
        inspect_checkpoint(tmp_path)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    with pytest.raises(CheckpointError, match=r"query.left is missing"):
        inspect_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["sites"]["encoder.layer.0.attention.self.query"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"encoder.layer.0.attention.self.query is not in the map"):
        inspect_checkpoint(tmp_path)
