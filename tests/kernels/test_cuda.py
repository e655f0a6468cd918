"""The kernels on a GPU, against float64: every small factor, side and type, few and many tokens. Skipped elsewhere."""

import copy
import itertools

import pytest
import torch

from compresskit import use_kernels
from compresskit.core import kron_gpu
from tests.kernels.cases import BOUNDS, SMALL, TF32_BOUND, error, exact, layer_of, structure_of

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or kron_gpu.gpu_of(torch.device("cuda")) is None,
    reason="needs a GPU from NVIDIA (A100 or later), Triton 3.5 and a C compiler",
)
TOKENS = (0, 1, 3, 17, 130, 3000)
LARGE_WIDE = (272, 200)


@pytest.fixture(autouse=True)
def nothing_is_left_to_pytorch(monkeypatch):
    """What Triton refused in a test would otherwise be computed by PyTorch, and look right."""
    monkeypatch.setattr(kron_gpu, "_refused", set())
    yield
    assert kron_gpu._refused == set()


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that were started."""
    from compresskit.core import kron_triton

    names, launch = [], kron_triton._launch
    monkeypatch.setattr(
        kron_triton, "_launch", lambda kernel, *a: names.append(kernel.fn.__name__) or launch(kernel, *a)
    )
    return names


def check(layer, way, bound, launched):
    for tokens in TOKENS:
        x = torch.randn(tokens, layer.in_features, device="cuda", dtype=layer.small.dtype)
        launched.clear()
        with torch.inference_mode(), use_kernels(way):
            found = layer(x)
        assert bool(launched) == (tokens > 0)
        wanted = exact(layer, x)
        assert found.shape == wanted.shape
        assert found.dtype == x.dtype
        if tokens:
            off = error(found, wanted)
            assert off < bound, f"{tokens} tokens of {layer.structure}: off by {off}"


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("small", SMALL)
def test_fused(small, left, launched):
    """Terms, types and biases in turn."""
    turn = 2 * SMALL.index(small) + left
    dtype, terms = list(BOUNDS)[turn % 3], 1 + turn % 4
    structure = structure_of(small, LARGE_WIDE, min(terms, small[0] * small[1]), left)
    check(layer_of(structure, dtype, bias=turn % 3 > 0, device="cuda"), "fused", BOUNDS[dtype], launched)


@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize(
    ("small", "terms", "wide"), [((4, 4), 1, LARGE_WIDE), ((2, 8), 2, (24, 272)), ((8, 8), 4, (96, 96))]
)
def test_mixed(small, terms, wide, dtype, launched):
    check(layer_of(structure_of(small, wide, terms, True), dtype, device="cuda"), "mixed", BOUNDS[dtype], launched)


def test_tf32_where_it_is_allowed(launched):
    before = torch.get_float32_matmul_precision()
    layer = layer_of(structure_of((4, 4), LARGE_WIDE, 1, True), torch.float32, device="cuda")
    try:
        torch.set_float32_matmul_precision("high")
        check(layer, "fused", TF32_BOUND, launched)
    finally:
        torch.set_float32_matmul_precision(before)


def test_padded_rows_strided_inputs_and_what_is_not_aligned(launched):
    structure = structure_of((2, 2), (41, 40), 1, True, padding=1)
    layer = layer_of(structure, torch.bfloat16, device="cuda")
    wide = torch.randn(5, 6, 161, device="cuda", dtype=torch.bfloat16)
    for x in (wide[..., 1:].transpose(0, 1)[..., ::2], wide.flatten()[1:481].view(6, 80)):
        with torch.inference_mode(), use_kernels("fused"):
            found = layer(x)
        assert error(found, exact(layer, x)) < BOUNDS[torch.bfloat16]
    assert launched == ["wide_first"] * 2


def test_training_gives_the_gradients_of_the_pytorch_path(launched):
    """With many tokens: forward by the kernel, backward by PyTorch; with few, all by PyTorch."""
    layer = layer_of(structure_of((4, 4), LARGE_WIDE, 2, True), torch.float32, device="cuda")
    for tokens, kernels in ((4, []), (3000, ["wide_first"])):
        grads = []
        for way in ("pytorch", "fused"):
            x = torch.randn(tokens, layer.in_features, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
            x.requires_grad_()
            with use_kernels(way):
                y = layer(x)
            grads.append(torch.autograd.grad(y.square().mean(), [x, *layer.parameters()]))
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
        assert launched == kernels


def test_compiled_exported_and_captured(launched):
    """torch.compile and export see PyTorch's operations; a CUDA graph holds the kernel."""
    layer = layer_of(structure_of((4, 4), LARGE_WIDE, 1, True), torch.bfloat16, device="cuda").eval()
    x = torch.randn(6, layer.in_features, device="cuda", dtype=torch.bfloat16)
    bound = BOUNDS[torch.bfloat16]
    with torch.no_grad(), use_kernels("fused"):
        compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, dynamic=True, backend="aot_eager")
        assert error(compiled(x), exact(layer, x)) < bound
        dim = torch.export.Dim("tokens", min=2, max=4096)
        exported = torch.export.export(layer, (x,), dynamic_shapes=({0: dim},)).module()
        assert error(exported(x[:3]), exact(layer, x[:3])) < bound
        assert launched == []
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.normal_()
        graph.replay()
        assert error(y, exact(layer, x)) < bound
        assert launched == ["wide_first"] * 2


def test_autocast_and_an_input_on_the_cpu(launched):
    layer = layer_of(structure_of((2, 2), LARGE_WIDE, 1, True), torch.float32, device="cuda")
    x = torch.randn(7, layer.in_features, device="cuda")
    with torch.inference_mode(), use_kernels("fused"):
        with torch.autocast("cuda", torch.bfloat16):
            found = layer(x)
        assert found.dtype == torch.bfloat16
        assert error(found, exact(layer, x)) < 2 * BOUNDS[torch.bfloat16]
        assert launched == ["wide_first"]
        with pytest.raises(RuntimeError, match="same device"):
            layer(x.cpu())


def test_auto_is_right_whatever_it_chooses():
    for (small, terms), tokens in itertools.product((((2, 2), 1), ((8, 8), 4)), (1, 300, 5000)):
        layer = layer_of(structure_of(small, (256, 256), terms, True), torch.bfloat16, device="cuda")
        x = torch.randn(tokens, layer.in_features, device="cuda", dtype=torch.bfloat16)
        with torch.inference_mode():
            assert error(layer(x), exact(layer, x)) < BOUNDS[torch.bfloat16]


def test_another_gpu_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    layer = layer_of(structure_of((2, 2), LARGE_WIDE, 1, True), torch.bfloat16, device="cuda:1")
    x = torch.randn(7, layer.in_features, device="cuda:1", dtype=torch.bfloat16)
    with torch.inference_mode(), use_kernels("fused"):
        assert error(layer(x), exact(layer, x)) < BOUNDS[torch.bfloat16]
