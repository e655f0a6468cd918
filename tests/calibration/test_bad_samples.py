"""Samples that no moments can come from, too few of them, and calibrations of other models."""

import math

import pytest
import torch

from compresskit.calibration import calibrate, load_calibration
from compresskit.errors import CalibrationError, OutputError
from tests.calibration.test_calibrate import padded
from tests.models import assert_unchanged, build, inputs, snapshot


def test_a_batch_of_padding_alone_is_named():
    batch = padded()
    empty = {**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}
    with pytest.raises(CalibrationError, match="batch 1 holds nothing but padding: its attention mask is 0 throughout"):
        calibrate(build("bert"), [batch, empty])
    with pytest.raises(CalibrationError, match="batch 0 holds nothing but padding"):
        calibrate(build("bert"), [empty])


@pytest.mark.parametrize(("bad", "found"), [(math.nan, "NaN or infinite"), (1e30, "NaN or infinite|overflow")])
def test_activations_that_are_not_finite_name_the_layer(bad, found):
    model = build("bert")
    with torch.no_grad():
        model.encoder.layer[0].intermediate.dense.bias[3] = bad
    before = snapshot(model)
    with pytest.raises(
        CalibrationError, match=rf"the input of 'encoder.layer.0.output.dense' has .*({found}).* in batch 0"
    ):
        calibrate(model, [padded()])
    assert_unchanged(model, before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_few_tokens_are_a_warning_with_numbers():
    calibration = calibrate(build("bert"), [padded()])
    assert "encoder.layer.0.output.dense" in calibration.few_tokens
    warning = calibration.warnings()[0]
    assert "of 15 layers saw fewer tokens than their input has columns" in warning
    assert "18 tokens, 48 columns" in warning


def test_layers_that_no_sample_comes_to_are_named():
    model = build("bert")
    model.unused = torch.nn.Linear(32, 32)
    calibration = calibrate(model, [padded()])
    assert calibration.unreached == ("unused",)
    assert any("no sample came to unused (1 in all)" in warning for warning in calibration.warnings())


def test_padding_that_no_mask_fits_is_said():
    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(16, 16)

        def forward(self, x, attention_mask):
            return self.layer(x[:, ::2])

    batch = {"x": torch.randn(2, 6, 16), "attention_mask": torch.tensor([[1] * 6, [1] * 3 + [0] * 3])}
    calibration = calibrate(Pooled(), [batch])
    assert calibration.unmasked == ("layer",)
    assert "padding could not be told from text in layer" in calibration.warnings()[-1]


def test_too_much_memory_is_refused_before_the_pass():
    seen = []
    with pytest.raises(CalibrationError, match=r"take 0\.00 GB, more than the 0\.00 GB allowed; lower max_width"):
        calibrate(build("bert"), [padded()], max_memory_bytes=1000, on_progress=seen.append)
    assert seen == []


def test_a_model_without_layers_is_refused():
    with pytest.raises(CalibrationError, match="no layer that can be replaced"):
        calibrate(torch.nn.LayerNorm(4), [{"input": torch.zeros(1, 4)}])


def test_gradients_need_an_output_that_is_known():
    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(16, 16)

        def forward(self, x):
            return (self.layer(x),)

    with pytest.raises(CalibrationError, match="Pair returns neither logits nor a last hidden state"):
        calibrate(Pair(), [{"x": torch.randn(2, 16)}], gradients=True)


@pytest.mark.parametrize("family", ["bert-mlm", "t5"])
def test_a_file_keeps_everything(family, tmp_path):
    model = build(family)
    made = calibrate(model, [inputs(family)], gradients=True, provenance={"data": "words"})
    made.save(tmp_path / "moments.safetensors")
    read = load_calibration(tmp_path / "moments.safetensors")
    read.check(model)
    assert {**vars(read), "uses": None} == {**vars(made), "uses": None}
    for name, use in made.uses.items():
        for part, value in vars(use).items():
            again = getattr(read.uses[name], part)
            torch.testing.assert_close(again, value, rtol=0, atol=0) if torch.is_tensor(value) else None
            assert torch.is_tensor(value) or again == value


def test_shared_moments_are_stored_once(tmp_path):
    calibration = calibrate(build("bert"), [padded()])
    calibration.save(tmp_path / "moments.safetensors")
    assert (tmp_path / "moments.safetensors").stat().st_size < 1.5 * calibration.memory_bytes
    uses = load_calibration(tmp_path / "moments.safetensors").uses
    assert uses["encoder.layer.0.attention.self.query"].inputs is uses["encoder.layer.0.attention.self.key"].inputs


def test_a_calibration_of_another_model_is_refused():
    calibration = calibrate(build("bert"), [padded()])
    other = build("bert")
    with torch.no_grad():
        other.encoder.layer[1].output.dense.weight.mul_(-1)
    with pytest.raises(CalibrationError, match="the same names and shapes, but other weights"):
        calibration.check(other)
    with pytest.raises(CalibrationError, match=r"made for another model: \d+ layers are in one of the two only"):
        calibration.check(build("gpt2"))
    calibration.check(build("bert").bfloat16())


@pytest.mark.parametrize(
    ("content", "match"),
    [(None, "cannot be read as a calibration"), (b"not safetensors", "cannot be read as a calibration")],
)
def test_files_that_are_no_safetensors(content, match, tmp_path):
    path = tmp_path / "moments.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match=match):
        load_calibration(path)


def test_files_that_are_something_else(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "moments.safetensors"
    save_file({"a": torch.zeros(1)}, str(path))
    with pytest.raises(CalibrationError, match="is no calibration; `compresskit calibrate` writes one"):
        load_calibration(path)
    save_file({"a": torch.zeros(1)}, str(path), metadata={"compresskit_calibration": '{"format_version": 2}'})
    with pytest.raises(CalibrationError, match="has format version 2, this release reads 1"):
        load_calibration(path)
    save_file({"a": torch.zeros(1)}, str(path), metadata={"compresskit_calibration": '{"format_version": 1}'})
    with pytest.raises(CalibrationError, match=r"the header of .* is damaged"):
        load_calibration(path)


def test_a_folder_that_is_not_there_cannot_be_written_to(tmp_path):
    calibration = calibrate(build("bert"), [padded()])
    with pytest.raises(OutputError, match="the calibration cannot be written"):
        calibration.save(tmp_path / "nowhere" / "moments.safetensors")
