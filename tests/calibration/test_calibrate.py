"""The moments are those that a straightforward computation gives, and the model is as it was."""

import pytest
import torch
from torch import nn

from compresskit.calibration import calibrate
from compresskit.calibration.collect import Sums
from compresskit.errors import CalibrationError
from compresskit.surgery.sites import find_sites
from tests.models import HIDDEN, VOCAB, Plain, assert_unchanged, build, inputs, snapshot

EVERY = ("bert", "bert-mlm", "roberta", "albert", "gpt2", "t5", "llama", "llama-tied", "mixtral", "vit", "plain")


def padded(count=3, length=9, seed=1):
    """Ids and a mask with the last 2, 3, ... places padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCAB, (count, length), generator=generator)
    mask = (torch.arange(length) < torch.arange(length - 2, length - 2 - count, -1)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def inputs_of(model, batches, name):
    """All inputs of one layer on some batches, (batch, time, width) each."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return seen


@pytest.mark.parametrize("family", EVERY)
def test_every_family_is_calibrated_and_left_as_it_was(family):
    model = build(family).train()
    before = snapshot(model)
    calibration = calibrate(model, [inputs(family)], gradients=True)
    assert_unchanged(model, before)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert calibration.unreached == ()
    assert all(calibration.uses.keys() & {*site.names} for site in find_sites(model).sites)
    assert calibration.loss is not None
    assert {name for name, use in calibration.uses.items() if use.gradients is None} <= {"pooler.dense"}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_padding_does_not_count(family):
    model = build(family)
    batch = padded()
    real = batch["attention_mask"].bool()
    calibration = calibrate(model, [batch])
    for name, use in calibration.uses.items():
        if use.inputs is not None and use.tokens == int(real.sum()):
            x = inputs_of(model, [batch], name)[0][real].double()
            torch.testing.assert_close(use.inputs.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(use.mean.double(), x.mean(0), rtol=1e-4, atol=1e-5)
    words = next(use for use in calibration.uses.values() if use.counts is not None and use.rows == VOCAB)
    ids = batch["input_ids"][real]
    torch.testing.assert_close(words.counts, torch.bincount(ids, minlength=VOCAB).double())
    assert calibration.tokens == int(real.sum())


def test_positions_count_as_often_as_real_tokens_stand_there():
    calibration = calibrate(build("bert"), [padded()])
    counts = calibration.uses["embeddings.position_embeddings"].counts
    assert counts[:10].tolist() == [3, 3, 3, 3, 3, 2, 1, 0, 0, 0]


def test_batches_add_up_whatever_their_size():
    model = build("bert")
    ids = padded(count=4)
    once = calibrate(model, [ids])
    pieces = [{key: value[i : i + 1] for key, value in ids.items()} for i in range(4)]
    apart = calibrate(model, pieces)
    assert once.tokens == apart.tokens
    for name, use in once.uses.items():
        if use.inputs is not None:
            torch.testing.assert_close(apart.uses[name].inputs, use.inputs, rtol=1e-3, atol=1e-5)


def test_layers_that_read_one_tensor_share_one_moment():
    uses = calibrate(build("bert"), [padded()]).uses
    query, key, value = (uses[f"encoder.layer.0.attention.self.{name}"] for name in ("query", "key", "value"))
    assert query.inputs is key.inputs is value.inputs
    assert query.inputs is not uses["encoder.layer.1.attention.self.query"].inputs
    own = calibrate(build("bert"), [padded()], share=False).uses["encoder.layer.0.attention.self.key"]
    torch.testing.assert_close(own.inputs, key.inputs)


class Fickle(nn.Module):
    """Reads the same tensor with both layers in its first call, and another one in the second."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.calls = nn.Linear(16, 16), nn.Linear(16, 16), 0

    def forward(self, x):
        self.calls += 1
        return self.one(x) + self.two(x if self.calls < 3 else x + 1)


def test_layers_that_share_only_sometimes_are_an_error_that_says_what_to_do():
    batches = [{"x": torch.randn(2, 3, 16)}] * 3
    with pytest.raises(
        CalibrationError, match="'two' and 'one' read the same tensor in some batches but not in all; pass"
    ):
        calibrate(Fickle(), batches)
    assert len(calibrate(Fickle(), batches, share=False).uses) == 2


def test_wide_layers_get_the_diagonal():
    model = build("bert")
    full, narrow = calibrate(model, [padded()]), calibrate(model, [padded()], max_width=HIDDEN)
    wide = "encoder.layer.0.output.dense"
    assert narrow.uses[wide].inputs.dim() == 1
    torch.testing.assert_close(narrow.uses[wide].inputs, full.uses[wide].inputs.diagonal())
    assert narrow.memory_bytes < full.memory_bytes


def test_the_memory_is_known_before_the_pass():
    told = []
    calibration = calibrate(build("bert"), [padded()], gradients=True, on_memory=told.append)
    held = {id(t): t.numel() * 4 for u in calibration.uses.values() for t in (u.inputs, u.gradients) if t is not None}
    counted = sum(u.counts.numel() * 8 for u in calibration.uses.values() if u.counts is not None)
    assert told == [calibration.memory_bytes]
    assert sum(held.values()) + counted <= calibration.memory_bytes <= 1.2 * (sum(held.values()) + counted)


@pytest.mark.parametrize("width", [64, 131, 136])  # in one piece; in strips, the last one shorter; in equal ones
def test_float32_sums_are_those_of_float64_to_a_millionth_of_the_trace(width):
    generator = torch.Generator().manual_seed(0)
    sums, exact = Sums(width, full=True, device=torch.device("cpu")), torch.zeros(width, width, dtype=torch.float64)
    for _ in range(64):
        x = torch.randn(256, width, generator=generator) + 3
        sums.add(x)
        exact += x.double().T @ x.double()
    second, mean = sums.means()
    assert torch.equal(second, second.T)
    torch.testing.assert_close(mean, torch.full_like(mean, 3), atol=0.05, rtol=0)
    error = (second * sums.tokens - exact).abs().max() / exact.trace()
    assert error < 1e-6


def test_encoder_and_decoder_masks_are_told_apart():
    model = build("t5")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCAB, (2, 6), generator=generator)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2]),
        "decoder_input_ids": ids,
        "decoder_attention_mask": torch.tensor([[1] * 3 + [0] * 3, [1] * 2 + [0] * 4]),
    }
    uses = calibrate(model, [batch]).uses
    tokens = {name: use.tokens for name, use in uses.items()}
    assert tokens["encoder.block.0.layer.0.SelfAttention.q"] == 10
    assert tokens["decoder.block.0.layer.0.SelfAttention.q"] == 5
    assert tokens["decoder.block.0.layer.1.EncDecAttention.q"] == 5
    assert tokens["decoder.block.0.layer.1.EncDecAttention.k"] == 10


def test_a_tied_pair_has_both_uses():
    uses = calibrate(Plain(), [inputs("plain")]).uses
    assert uses["embed"].counts is not None
    assert uses["head"].inputs is not None
    assert uses["first.0"].tokens == 2 * uses["head"].tokens  # it stands in two places


def test_gradients_are_those_of_the_loss():
    model = build("bert-classifier")
    batch = {**padded(), "labels": torch.tensor([0, 1, 1])}
    calibration = calibrate(model, [batch], gradients=True)
    assert "labels of the data" in calibration.loss
    name = "bert.encoder.layer.1.output.dense"
    kept = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda m, a, output: output.retain_grad() or kept.append(output)
    )
    (model(**batch).loss * 3).backward()
    handle.remove()
    g = kept[0].grad[batch["attention_mask"].bool()].double()
    torch.testing.assert_close(calibration.uses[name].gradients.double(), g.T @ g / len(g), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(
    ("family", "loss"),
    [("bert", "Gauss-Newton"), ("gpt2", "drawn from"), ("t5", "drawn from"), ("plain", "drawn from")],
)
def test_without_labels_the_loss_fits_the_head(family, loss):
    calibration = calibrate(build(family), [inputs(family)], gradients=True)
    assert loss in calibration.loss


def test_half_precision_models_are_calibrated_in_float32():
    model = build("bert").bfloat16()
    use = calibrate(model, [padded()]).uses["encoder.layer.0.output.dense"]
    assert use.inputs.dtype == torch.float32
    assert next(model.parameters()).dtype == torch.bfloat16
