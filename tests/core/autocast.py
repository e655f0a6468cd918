"""What holds for every layer under autocast."""

import torch

from compresskit.testing.cases import normal


def check_training_under_autocast(layer):
    """Products are in bfloat16, gradients of float32 tensors in float32 and near those without autocast."""
    x = normal(20, layer.in_features, dtype=torch.float32).requires_grad_()
    upstream = normal(20, layer.out_features, dtype=torch.float32, seed=3)
    tensors = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x), tensors, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    for found, wanted in zip(torch.autograd.grad(y, tensors, upstream.bfloat16()), expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.05 * float(wanted.abs().max()))
