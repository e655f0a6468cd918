"""The Kronecker product of a layer: gradients of both orders, parts, second derivatives, and unusual inputs."""

import pytest
import torch
from torch import nn

from compresskit.core import kron
from compresskit.core.modules import FactorizedLinear
from compresskit.decompositions.kronecker import KroneckerSum
from compresskit.errors import StructureError
from compresskit.testing.cases import normal
from tests.core.autocast import check_training_under_autocast

FORMS = [
    (12, 12, (2, 2), (6, 6), 1),
    (12, 12, (6, 6), (2, 2), 2),
    (12, 20, (2, 4), (6, 5), 3),
    (12, 20, (6, 5), (2, 4), 2),
    (20, 12, (4, 2), (5, 6), 3),
    (20, 12, (5, 6), (4, 2), 1),
    (20, 12, (5, 6), (4, 2), 3),
    (19, 12, (4, 2), (5, 6), 2),
    (11, 20, (6, 5), (2, 4), 2),
    (12, 16, (1, 4), (12, 4), 1),
    (16, 12, (8, 12), (2, 1), 1),
    (16, 12, (2, 12), (8, 1), 1),
    (12, 16, (6, 2), (2, 8), 1),
]
"""rows, cols, left, right, terms: p below, equal to and above q, either side small, several terms, padded rows."""


def layer_of(form, dtype=torch.float64, bias=True):
    structure = KroneckerSum(*form)
    factors = {
        name: normal(*spec.shape, dtype=dtype, seed=i)
        for i, (name, spec) in enumerate(structure.factor_specs().items())
    }
    return FactorizedLinear(structure, factors, normal(structure.rows, dtype=dtype, seed=7) if bias else None)


def as_function(layer):
    """The layer as a function of its input and its parameters."""
    names = [name for name, _ in layer.named_parameters()]
    return lambda x, *values: torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)


@pytest.fixture(params=["one part", "recomputed", "parts"])
def parts(request, monkeypatch):
    """At once with PyTorch's derivatives, at once with ours, and in parts of one or two tokens."""
    if request.param != "one part":
        monkeypatch.setattr(kron, "FEW_BYTES", 0)
        monkeypatch.setattr(kron, "FEW_NUMBERS", 0)
    if request.param == "parts":
        monkeypatch.setattr(kron, "PART_BYTES", 400)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("parts")
def test_output_and_gradients_are_those_of_the_dense_layer(form, bias):
    layer = layer_of(form, bias=bias)
    x = normal(17, layer.in_features).requires_grad_()
    upstream = normal(17, layer.out_features, seed=3)
    tensors = [x, *layer.parameters()]
    y = layer(x)
    expected = nn.functional.linear(x, layer.rebuilt_weight(), layer.bias)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    found = torch.autograd.grad(y, tensors, upstream)
    torch.testing.assert_close(found, torch.autograd.grad(expected, tensors, upstream), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("few_bytes", [0, kron.FEW_BYTES])
def test_gradcheck_of_first_and_second_derivatives(form, few_bytes, monkeypatch):
    monkeypatch.setattr(kron, "FEW_BYTES", few_bytes)
    layer = layer_of(form)
    arguments = [normal(2, layer.in_features).requires_grad_(), *layer.parameters()]
    function = as_function(layer)
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


def test_each_gradient_alone():
    """Whichever of input and parameters needs a gradient gets the one that it gets when all do."""
    for form in FORMS:
        layer = layer_of(form)
        x = normal(3, layer.in_features)
        tensors = [x, *layer.parameters()]
        every = torch.autograd.grad(layer(x.requires_grad_()).square().sum(), tensors)
        for tensor, expected in zip(tensors, every, strict=True):
            for other in tensors:
                other.requires_grad_(other is tensor)
            (alone,) = torch.autograd.grad(layer(x).square().sum(), [tensor])
            torch.testing.assert_close(alone, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_at_most_half_of_the_input_is_kept_beside_it_for_the_backward_pass(form):
    """Beyond FEW_BYTES. A small factor on the right may keep the input's transposed copy in its place."""
    layer = layer_of(form)
    kept = []
    x = normal(2000, layer.in_features).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert sum(size for pointer, size in sizes.items() if pointer not in own) <= 1.5 * x.nbytes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.usefixtures("parts")
def test_narrow_dtypes(form, dtype):
    layer = layer_of(form, dtype)
    x = normal(20, layer.in_features, dtype=dtype)
    expected = x.double() @ layer.rebuilt_weight().double().T + layer.bias.double()
    scale = float(expected.detach().abs().max())
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps * scale)


@pytest.mark.parametrize("form", FORMS)
def test_training_under_autocast_is_in_bfloat16_and_fills_float32_gradients(form):
    check_training_under_autocast(layer_of(form, torch.float32))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lead", [(0,), (0, 3), (2, 0, 3)])
def test_no_tokens_have_a_gradient_of_zero(form, lead):
    layer = layer_of(form)
    x = normal(*lead, layer.in_features).requires_grad_()
    y = layer(x)
    assert y.shape == (*lead, layer.out_features)
    y.sum().backward()
    assert x.grad.shape == x.shape
    for parameter in layer.parameters():
        torch.testing.assert_close(parameter.grad, torch.zeros_like(parameter))


@pytest.mark.parametrize("form", FORMS[:4])
def test_strided_inputs_and_gradients(form):
    layer = layer_of(form)
    wide = normal(6, 5, 2 * layer.in_features).requires_grad_()
    strided = wide.transpose(0, 1)[..., ::2]
    (found,) = torch.autograd.grad(layer(strided).sum(), wide)  # the gradient of a sum is expanded
    (expected,) = torch.autograd.grad((strided @ layer.rebuilt_weight().T).sum(), wide)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(), (11,), (2, 6), (4, 24), (12, 0)])
def test_another_last_size_is_refused(shape):
    layer = layer_of(FORMS[0])
    x = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(StructureError, match="the last sizes must agree"):
        layer(x)
    with pytest.raises(StructureError, match="the last sizes must agree"):
        layer.structure.matmul(x, layer.factors())


def test_another_dtype_is_refused():
    with pytest.raises(RuntimeError, match="dtype"):
        layer_of(FORMS[0])(torch.zeros(3, 12))


def test_a_bias_is_not_written_to():
    layer = layer_of(FORMS[0])
    before = layer.bias.detach().clone()
    for tokens in (1, 2):
        layer(normal(tokens, 12))
        torch.testing.assert_close(layer.bias.detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS[:6])
def test_compiled_training_is_one_graph(form):
    layer = layer_of(form)
    x = normal(5, layer.in_features).requires_grad_()
    tensors = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x).square().sum(), tensors)
    torch.compiler.reset()
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    found = torch.autograd.grad(y.square().sum(), tensors)
    torch.compiler.reset()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_tracing_takes_any_number_of_tokens():
    layer = layer_of(FORMS[1])
    traced = torch.jit.trace(layer, normal(3, 12))
    torch.testing.assert_close(traced(normal(40, 12)), layer(normal(40, 12)))


def test_gradients_by_torch_func():
    layer = layer_of(FORMS[2])
    x, parameters = normal(3, 20), tuple(parameter.detach() for parameter in layer.parameters())
    function = as_function(layer)
    found = torch.func.grad(lambda *values: function(x, *values).square().sum(), argnums=(0, 1, 2))(*parameters)
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_forward_mode_derivatives_are_right_or_refused():
    layer, tangent = layer_of(FORMS[0]), normal(3, 12, seed=5)
    _, found = torch.func.jvp(layer, (normal(3, 12),), (tangent,))
    torch.testing.assert_close(found, tangent @ layer.rebuilt_weight().T)
    many = normal(2000, 12)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(layer, (many,), (many,))


def test_a_called_child_gives_the_same_product():
    """With a hook on it, the wide factor is called; forward and gradients stay."""
    for form in FORMS:
        layer, hooked = layer_of(form), layer_of(form)
        calls = []
        hooked.wide.register_forward_hook(lambda *arguments, calls=calls: calls.append(1))
        x = normal(2, 3, layer.in_features)
        torch.testing.assert_close(hooked(x), layer(x), rtol=1e-10, atol=1e-10)
        assert calls == [1]


def test_the_swap_is_a_transposed_copy():
    for tokens, a, b in ((1, 2, 3), (20, 2, 3), (20, 8, 16), (20, 1, 5), (0, 2, 3), (33, 7, 5)):
        x = normal(tokens, a * b)
        expected = x.view(tokens, a, b).transpose(1, 2).reshape(tokens, a * b)
        torch.testing.assert_close(kron._swap(x, a, b), expected, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_layer_does_the_same_products(form, training):
    """In one graph, with any number of tokens; gradients too, and not as the product that is exported."""
    layer = layer_of(form)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (1, 2, 5, 40):
        x = normal(1, tokens, layer.in_features).requires_grad_()
        with torch.set_grad_enabled(training):
            found, wanted = compiled(x), layer(x)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
        if training:
            tensors, upstream = [x, *layer.parameters()], normal(*wanted.shape, seed=3)
            grads = (torch.autograd.grad(y, tensors, upstream) for y in (found, wanted))
            torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)
    assert not any(node.target is torch.matmul for graph in graphs for node in graph.graph.nodes)
    torch.compiler.reset()


def test_a_compiled_layer_under_autocast():
    layer = layer_of(FORMS[2], torch.float32)
    x = normal(9, layer.in_features, dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = compiled(x), layer(x)
    torch.compiler.reset()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)
