"""The compiled kernel: what it computes, when PyTorch does instead, and what goes wrong where it is made."""

import copy
import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import compresskit
from compresskit.core import native_build
from compresskit.core.kron_form import MOST_TRAINED
from compresskit.core.native import WIDEST_TRAINED, kernel
from compresskit.decompositions.svd import LowRank
from compresskit.errors import KernelError
from tests.kernels.cases import SMALL, WIDE, error, exact, gradients, layer_of, structure_of

KRONECKER = [
    structure_of(small, wide, terms, left, padding)
    for small in (*SMALL, (3, 1), (1, 1), (16, 16))
    for wide in (*WIDE, (5, 3), (48, 16))
    for terms in (1, 3)
    for left in (True, False)
    for padding in (0, 1)
    if terms <= min(small[0] * small[1], wide[0] * wide[1]) and padding < min(small[0], wide[0])
]
CHAINS = [LowRank(96, 72, rank) for rank in (1, 5, 16, 64)]


def others():
    """Of the methods whose structures are made by fits alone."""
    torch.manual_seed(0)
    weight = torch.randn(96, 72)
    for name in ("tucker", "tensor-train"):
        for ratio in (1.5, 3, 8):
            yield compresskit.decomposition(name).fit(weight, ratio=ratio).structure


@pytest.mark.parametrize("structure", [*KRONECKER, *CHAINS, *others()], ids=str)
def test_products_are_exact(structure, native):
    with torch.inference_mode():
        for bias in (True, False):
            layer = layer_of(structure, torch.float32, bias=bias)
            for shape in ((0,), (1,), (3,), (17,), (2, 0), (2, 5), (2, 3, 67)):
                x = torch.randn(*shape, structure.cols, generator=torch.Generator().manual_seed(1))
                y = layer(x)
                assert native() == (structure.native is not None, 0)  # padded rows are PyTorch's
                assert y.shape == (*shape, structure.rows)
                assert y.is_contiguous()
                assert not x.numel() or error(y, exact(layer, x)) < 1e-6


@pytest.mark.parametrize("threads", [1, 2, 5], indirect=True)
@pytest.mark.parametrize("tokens", [1, 2, 7, 64, 1000])
def test_threads_share_tokens_or_steps(threads, tokens, native):
    for structure in (
        structure_of((4, 2), (192, 320), 2, True),
        structure_of((2, 8), (160, 96), 1, False),
        LowRank(1024, 1280, 300),
    ):
        layer, x = layer_of(structure, torch.float32), torch.randn(tokens, structure.cols)
        with torch.inference_mode():
            assert error(layer(x), exact(layer, x)) < 1e-6
    assert native() == (3, 0)


@pytest.mark.parametrize("structure", [structure_of((4, 2), (34, 40), 2, True), LowRank(96, 72, 60)], ids=str)
def test_rows_that_do_not_lie_together(structure, native):
    layer = layer_of(structure, torch.float32)
    with torch.inference_mode():
        for x in (
            torch.randn(structure.cols, 9).T,
            torch.randn(9, 2, structure.cols)[:, 0],
            torch.randn(structure.cols),
        ):
            assert error(layer(x), exact(layer, x)) < 1e-6
    assert native() == (3, 0)


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize(
    "structure", [*(s for s in KRONECKER if s.native and s.small != (1, 1)), *CHAINS, *others()], ids=str
)
def test_gradients_are_exact(structure, threads, native):
    for tokens in (0, 1, 5, 300):
        layer, x = layer_of(structure, torch.float32), torch.randn(tokens, structure.cols)
        upstream = torch.randn(tokens, structure.rows)
        found = gradients(layer, x, upstream)
        double = copy.deepcopy(layer).double()
        wanted = gradients(double, x.detach().double(), upstream.double())
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.shape == theirs.shape
            assert not tokens or error(ours, theirs) < 2e-5
    assert native() == (4, 4)


@pytest.mark.parametrize("small", [(4, 2), (2, 4)])
@pytest.mark.parametrize("wanted", [w for w in itertools.product((True, False), repeat=4) if any(w)], ids=str)
def test_gradients_that_are_wanted_alone(small, wanted, native):
    layer, x = layer_of(structure_of(small, (34, 40), 1, False), torch.float32), torch.randn(70, 40 * small[1])
    upstream = torch.randn(70, 34 * small[0])
    found = gradients(layer, x, upstream, wanted)
    assert native() == (1, 1)
    with compresskit.use_kernels("pytorch"):
        torch.testing.assert_close(found, gradients(layer, x, upstream, wanted), rtol=1e-4, atol=1e-3)


def test_many_gradients_are_added_up_by_all_threads_together(kernel_folder):
    """More numbers than all threads may add up each alone: many threads, or a large layer."""
    torch.manual_seed(0)
    structure = structure_of((2, 1), (2100, 2100), 1, True)
    layer, x = layer_of(structure, torch.float32, bias=False), torch.randn(300, 2100)
    upstream = torch.randn(300, 4200)
    plan, names = structure._form._ordered(wide_first=True)
    factors = layer.factors()
    x_grad, _, *found = torch.ops.compresskit.chain_backward.default(
        upstream, x, [factors[name] for name in names], plan, (1, 0, 1, 1)
    )
    wanted = gradients(layer.double(), x.double(), upstream.double())
    by_name = dict(zip(factors, wanted[1:], strict=True))
    assert error(x_grad, wanted[0]) < 1e-6
    for name, ours in zip(names, found, strict=True):
        assert error(ours, by_name[name]) < 2e-5


def test_gradients_of_gradients_are_those_of_pytorch(native):
    layer, x = layer_of(structure_of((4, 2), (8, 10), 1, True), torch.float32), torch.randn(7, 20, requires_grad=True)

    def second():
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, *layer.parameters()])

    found = second()
    assert native() == (1, 1)  # and the output's own share in it
    with compresskit.use_kernels("pytorch"):
        torch.testing.assert_close(found, second(), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    "structure",
    [
        structure_of((4, 2), (34, WIDEST_TRAINED // 2 + 1), 1, True),
        structure_of((2, 2), (400, MOST_TRAINED // 800 + 1), 2, True),
        LowRank(96, 1600, 6),
        LowRank(480, 400, 160),
    ],
    ids=str,
)
def test_pytorch_trains_what_it_trains_faster(structure, native):
    layer, x = layer_of(structure, torch.float32), torch.randn(70, structure.cols)
    layer(x).sum().backward()
    assert layer(x.detach()).requires_grad
    assert native() == (0, 0)
    with torch.no_grad():
        layer(x)
    assert native() == (1, 0)


def test_training_keeps_the_input_alone(native):
    layer, x = layer_of(structure_of((4, 2), (34, 40), 1, True), torch.float32), torch.randn(70, 80, requires_grad=True)
    kept = {}
    own = {parameter.data_ptr() for parameter in layer.parameters()}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert sum(size for pointer, size in kept.items() if pointer not in own) == x.numel()


def watched():
    """Ways to call a layer that are PyTorch's own."""
    return {
        "switched off": lambda layer, x: _within(compresskit.use_kernels("pytorch"), layer, x),
        "autocast to float16": lambda layer, x: _within(torch.autocast("cpu", torch.float16), layer, x),
        "counting": lambda layer, x: _within(FlopCounterMode(display=False), layer, x),
        "vmap": lambda layer, x: torch.vmap(layer)(x),
        "forward derivatives": lambda layer, x: torch.func.jvp(layer, (x,), (x,))[0],
        "float16": lambda layer, x: layer.to(torch.float16)(x.to(torch.float16)),
        "float64": lambda layer, x: layer.double()(x.double()),
        "trace": lambda layer, x: torch.jit.trace(layer, x, check_trace=False)(x),
        "export": lambda layer, x: torch.export.export(layer, (x,)).module()(x),
        "meta": lambda layer, x: layer.to("meta")(x.to("meta")),
    }


def _within(context, layer, x):
    with context:
        return layer(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("structure", [structure_of((4, 2), (8, 10), 2, True), LowRank(32, 20, 6)], ids=str)
@pytest.mark.parametrize("name", watched())
def test_what_it_does_not_know_is_left_to_pytorch(name, structure, native):
    layer, x = layer_of(structure, torch.float32), torch.randn(7, structure.cols)
    wanted = exact(layer, x)
    with torch.no_grad():
        y = watched()[name](layer, x)
    assert native() == (0, 0)
    assert y.is_meta or error(y, wanted) < 1e-2


def test_a_factor_that_has_to_be_called_is_called(native):
    layer, x = layer_of(LowRank(32, 20, 6), torch.float32), torch.randn(7, 20)
    wanted = exact(layer, x)
    layer.right = nn.Sequential(layer.right)
    with torch.inference_mode():
        assert error(layer(x), wanted) < 1e-6
    assert native() == (0, 0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_it_is_one_operation_of_a_compiled_layer(dynamic, native):
    products = (structure_of((4, 2), (8, 10), terms, terms > 1) for terms in (1, 2))
    for structure in (*products, LowRank(32, 20, 6)):
        torch.compiler.reset()
        layer = layer_of(structure, torch.float32)
        with torch.no_grad():
            compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
            for shape in ((7,), (2, 3)):
                x = torch.randn(*shape, 20)
                assert error(compiled(x), exact(layer, x)) < 1e-6
        assert native() == (2, 0)
        compiled(torch.randn(7, 20)).sum().backward()  # PyTorch's
        assert native() == (0, 0)
    torch.compiler.reset()


def test_a_compiler_knows_what_it_gives(kernel_folder):
    x, factors = torch.randn(2, 3, 20), [torch.randn(3, 5), torch.randn(7, 4)]
    plan = (1, 5, 3, 4, 0, 3, 4, 7, 2, 3, 7, 0)
    torch.library.opcheck(kernel_folder[1].chain, (x, factors, plan, torch.randn(21)))
    for steps in (plan, plan[:8], plan[:4]):
        given = factors[: len(steps) // 4]
        shape = torch.ops.compresskit.chain.default(x.to("meta"), [f.to("meta") for f in given], steps, None).shape
        assert shape == kernel_folder[1].chain(x, given, steps, None).shape


@pytest.mark.parametrize(
    ("shape", "factors", "plan", "bias", "match"),
    [
        ((3, 20), [(6, 20)], (3, 1, 20, 6), None, "a step of kind 3"),
        ((3, 20), [], (0, 1, 20, 6), None, "more steps than factors"),
        ((3, 20), [(6, 20)], (2, 4, 5, 0), None, "fewer steps than factors"),
        ((3, 20), [(6, 19)], (0, 1, 20, 6), None, "a factor of 120 numbers"),
        ((3, 20), [(6, 20), (5, 7)], (0, 1, 20, 6, 0, 1, 7, 5), None, "steps that do not fit"),
        ((3, 21), [(6, 20)], (0, 1, 20, 6), None, r"\(\.\.\., 20\) in float32"),
        ((3, 20), [(6, 20)], (0, 1, 20, 6), 5, r"\(\.\.\., 6\) in float32"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(shape, factors, plan, bias, match, kernel_folder):
    given = [torch.randn(size) for size in factors]
    for call in (kernel_folder[1].chain, kernel_folder[1].now):
        with pytest.raises(RuntimeError, match=match):
            call(torch.randn(shape), given, plan, None if bias is None else torch.randn(bias))


LATER = """
import torch, compresskit
from compresskit.core.native import kernel
layer = compresskit.SVD().fit(torch.randn(64, 64), ratio=4).to_module()
x = torch.randn(3, 64)
with torch.inference_mode():
    found = layer(x), layer(x)
    with compresskit.use_kernels("pytorch"):
        torch.testing.assert_close(found, (layer(x), layer(x)))
print(kernel.loaded)
"""


COMPILED_FIRST = """
import torch, compresskit
layer = compresskit.SVD().fit(torch.randn(64, 64), ratio=4).to_module()
targets = []
def backend(graph, inputs):
    targets.extend(str(node.target) for node in graph.graph.nodes)
    return graph.forward
with torch.no_grad():
    torch.compile(layer, fullgraph=True, backend=backend)(torch.randn(3, 64))
print("compresskit.chain.default" in targets)
"""


def later(folder, script=LATER):
    """What a new process says: whether it uses the kernel, and warnings."""
    environment = os.environ | {"COMPRESSKIT_CACHE": str(folder)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    return done.stdout.strip(), done.stderr


def test_gradients_that_do_not_fit_are_refused(kernel_folder):
    backward, x, factor = torch.ops.compresskit.chain_backward.default, torch.randn(3, 20), torch.randn(6, 20)
    with pytest.raises(RuntimeError, match="needs of input, bias and factors"):
        backward(torch.randn(3, 6), x, [factor], (0, 1, 20, 6), (1, 1))
    with pytest.raises(RuntimeError, match="a gradient of 3 tokens"):
        backward(torch.randn(4, 6), x, [factor], (0, 1, 20, 6), (1, 1, 1))


def test_a_later_process_finds_it(kernel_folder):
    assert later(kernel_folder[0]) == ("True", "")


def test_a_compiler_finds_it_before_any_layer_has_run(kernel_folder, tmp_path):
    assert later(kernel_folder[0], COMPILED_FIRST)[0] == "True"
    assert later(tmp_path, COMPILED_FIRST)[0] == "False"


def test_training_says_what_would_make_it_faster(kernel_folder, no_kernel, monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    model = nn.Sequential(nn.Linear(20, 20), layer_of(structure_of((4, 2), (8, 10), 1, True), torch.float32))
    others = nn.Sequential(nn.Linear(20, 20), layer_of(LowRank(32, 1600, 6), torch.float32))
    assert "compresskit kernels --build" in native_build.kernel_advice(model, cpu)
    assert native_build.kernel_advice(model, cuda) is native_build.kernel_advice(others, cpu) is None
    with compresskit.use_kernels("pytorch"):
        assert native_build.kernel_advice(model, cpu) is None  # not wanted
    monkeypatch.setattr(kernel, "_calls", kernel_folder[1])
    assert native_build.kernel_advice(model, cpu) is None  # there
    monkeypatch.setattr(kernel, "_calls", None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native_build.kernel_advice(model, cpu) is None  # cannot be


@pytest.mark.skipif(native_build.compiler() is None, reason="needs a C++ compiler")
def test_a_damaged_file_is_said_once_and_made_anew_when_asked(no_kernel):
    path = compresskit.kernel_state().path
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a library")
    used, said = later(no_kernel)
    assert used == "False"
    assert said.count("layers run without the compiled kernel, which cannot be loaded") == 1
    build = [sys.executable, "-W", "ignore", "-m", "compresskit_cli", "kernels", "--build"]
    subprocess.run(build, env=os.environ | {"COMPRESSKIT_CACHE": str(no_kernel)}, check=True, capture_output=True)
    assert later(no_kernel) == ("True", "")


@pytest.mark.parametrize(
    ("compiler", "match"),
    [
        ("no-such-compiler", "needs a C.. compiler: CXX is no-such-compiler, which is not there; install"),
        ("false", "cannot compile the kernel"),
    ],
)
def test_without_a_working_compiler_nothing_is_left(compiler, match, no_kernel, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(KernelError, match=match):
        compresskit.build_kernels()
    assert not any(no_kernel.rglob("*"))
    assert not kernel.loaded


def test_a_cache_that_cannot_be_written_is_named(no_kernel, monkeypatch):
    no_kernel.write_text("a file")
    with pytest.raises(KernelError, match=r"cannot be written to .*cache: "):
        compresskit.build_kernels()


def test_a_slow_compiler_is_given_up(no_kernel, monkeypatch):
    monkeypatch.setattr(native_build, "TIMEOUT_S", 0.01)
    with pytest.raises(KernelError, match=r"has not compiled the kernel in 0\.01 s"):
        compresskit.build_kernels()
    assert not any(no_kernel.rglob("*.so"))
