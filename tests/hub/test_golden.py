"""Checkpoints of every format version that was ever released open, and compute what they did."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from compresskit.hub import FORMAT_VERSION, load_model, read_map
from compresskit.surgery.layout import layout_of

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("format_v*"))


def test_this_format_has_a_golden_checkpoint() -> None:
    assert [folder.name for folder in GOLDEN] == [f"format_v{n}" for n in range(1, FORMAT_VERSION + 1)]


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_golden_outputs(folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    model = load_model(folder)
    with torch.no_grad():
        torch.testing.assert_close(model(expected["input_ids"]).logits, expected["logits"])
        model.dequantize()
        logits = model(expected["input_ids"]).logits  # the padding word's own row now counts in the head as well
        torch.testing.assert_close(logits[..., 1:], expected["logits"][..., 1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_golden_maps(folder: Path) -> None:
    found = read_map(folder)
    assert found is not None
    assert found.provenance == {"made_by": "tests/golden/make.py"}
    layout = found.layout()
    kinds = {entry.structure.kind for entry in layout.values()}
    assert kinds >= {"kronecker", "low-rank"}
    assert layout["cls.predictions.decoder"].shares.keys() == (
        layout["cls.predictions.decoder"].structure.factor_specs().keys()
    )
    assert layout_of(transformers.AutoModelForMaskedLM.from_pretrained(folder)) == layout
