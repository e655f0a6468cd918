"""Calls of the compiled kernel from Python, which do without PyTorch's dispatcher where that would do nothing."""

import dataclasses
import pathlib
import sys

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from compresskit.core import native as native_module
from compresskit.core import native_build
from compresskit.core.native import kernel
from tests.kernels.cases import error, exact, layer_of, structure_of


class Seen(TorchFunctionMode):
    """Names of what is called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_who_looks_on_sees_it(native):
    """Profilers and modes for functions know operations; calls that do without the dispatcher are no exception."""
    layer, x = layer_of(structure_of((4, 2), (8, 10), 2, True), torch.float32), torch.randn(7, 20)
    wanted = exact(layer, x)
    with torch.inference_mode(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert error(layer(x), wanted) < 1e-6
    assert [event.name for event in profile.events()].count("compresskit::chain") == 1
    with torch.inference_mode(), Seen() as seen:
        assert error(layer(x), wanted) < 1e-6
    assert "compresskit.chain.default" in seen.names
    assert native() == (2, 0)


def test_what_the_dispatcher_has_to_do_is_left_to_it(kernel_folder):
    now, plan = kernel_folder[1].now, (0, 1, 20, 6)
    x, factor = torch.randn(3, 20), torch.randn(6, 20)
    turned = torch.complex(torch.zeros(3, 20), -x).conj().imag
    assert turned.is_neg()
    torch.testing.assert_close(now(turned, [factor], plan, None), x @ factor.T)
    assert now(x.to("meta"), [factor.to("meta")], plan, None).is_meta
    with torch.autocast("cpu", torch.bfloat16):
        assert now(x, (factor,), list(plan), None).dtype is torch.float32
    with FlopCounterMode(display=False):
        torch.testing.assert_close(now(x, [factor], plan, None), x @ factor.T)


def test_a_view_that_is_negated_later_gives_the_same(native):
    layer, x = layer_of(structure_of((4, 2), (8, 10), 2, True), torch.float32), torch.randn(7, 20)
    turned = torch.complex(torch.zeros(7, 20), -x).conj().imag
    with torch.inference_mode():
        assert error(layer(turned), exact(layer, x)) < 1e-6


@pytest.mark.parametrize("grad", [True, False])
def test_without_headers_of_python_its_operations_are_called(grad, native, monkeypatch):
    calls = dataclasses.replace(
        kernel._calls, now=kernel._calls.chain, trained_now=kernel._calls.trained, is_bare=native_module._unknown
    )
    monkeypatch.setattr(kernel, "_calls", calls)
    layer, x = layer_of(structure_of((4, 2), (8, 10), 1, True), torch.float32), torch.randn(7, 20)
    with torch.set_grad_enabled(grad):
        assert error(layer(x).detach(), exact(layer, x)) < 1e-6
        assert native() == (1, 0)
        torch.vmap(layer)(x)
        assert native() == (0, 0)


def test_a_library_without_calls_from_python_has_none():
    path = pathlib.Path(torch.__file__).parent / "lib" / ("libc10.dylib" if sys.platform == "darwin" else "libc10.so")
    assert native_module._module(path) is None


@pytest.mark.skipif(native_build._python_headers() is None, reason="needs the headers of Python (python3-dev)")
@pytest.mark.parametrize(
    ("given", "match"),
    [
        ((), "x, factors, plan and bias are expected"),
        ((torch.zeros(2, 3), torch.zeros(3, 3), (0, 1, 3, 3), None), "factors and plans are lists or tuples"),
        ((torch.zeros(2, 3), [torch.zeros(3, 3)], (0, 1, 3, "3"), None), "str"),
        ((torch.zeros(2, 3), ["factor"], (0, 1, 3, 3), None), "a tensor is expected, got str"),
        ((None, [torch.zeros(3, 3)], (0, 1, 3, 3), None), "a tensor is expected, got NoneType"),
        ((torch.zeros(2, 3), [torch.zeros(3, 3)], (0, 1, 3, 3), 1.0), "a tensor is expected, got float"),
    ],
)
def test_calls_from_python_that_do_not_fit_are_refused(given, match, kernel_folder):
    with pytest.raises(TypeError, match=match):
        kernel_folder[1].now(*given)


@pytest.mark.parametrize("ins", [1, 3, 4, 15, 16, 21, 39, 64])
@pytest.mark.parametrize("outs", [1, 2, 3, 4, 5, 31])
@pytest.mark.parametrize("bias", [True, False])
def test_one_token_of_any_width(ins, outs, bias, kernel_folder):
    x, right, left = torch.randn(1, 19), torch.randn(ins, 19), torch.randn(outs, ins)
    added = torch.randn(outs) if bias else None
    y = kernel_folder[1].now(x, [right, left], (0, 1, 19, ins, 0, 1, ins, outs), added)
    wanted, most = (
        each(x.double()) @ each(right.T.double()) @ each(left.T.double()) + (each(added.double()) if bias else 0)
        for each in (torch.Tensor.clone, torch.abs)
    )
    assert float((y - wanted).norm() / most.norm()) < 3e-7  # sums may cancel out
