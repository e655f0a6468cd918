"""The conformance suite catches what it is there for: one sound decomposition, and many that are broken on purpose."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import tensorly
import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from compresskit.core import registry
from compresskit.core.cost import Pass, dense_operations
from compresskit.core.decomposition import Decomposition, Fitted
from compresskit.core.native import Native, last_axis, swap
from compresskit.core.structure import linear
from compresskit.decompositions.svd import LowRank
from compresskit.errors import BudgetError
from compresskit.testing import CHECKS, check_decomposition
from compresskit.testing.cases import surroundings
from tests.core.toy import Toy, ToyAnalysis, ToyDecomposition

BROKEN = []


def broken(check, match, *, structure=None, analysis=None, **methods):
    """List a decomposition that differs from the sound one in these methods, and the check that must catch it."""
    if structure:
        methods["structures"] = (dataclass(frozen=True)(type("BrokenToy", (Toy,), structure)),)
    if analysis:
        methods["analysis"] = type("BrokenAnalysis", (ToyAnalysis,), analysis)
    cls = dataclass(frozen=True)(type("Broken", (ToyDecomposition,), methods))
    BROKEN.append(pytest.param(check, cls, match, id=f"{check}-{len(BROKEN)}"))


def both(self, structure):
    """The sound factors, for those that spoil them afterwards."""
    return ToyAnalysis.factors(self, structure)


def refit(change):
    """A `fit` that changes what the sound one returns."""

    def fit(self, weight, *, ratio=None, structure=None):
        return change(Decomposition.fit(self, weight, ratio=ratio, structure=structure))

    return fit


def menu_of(change):
    return lambda self, rows, cols, *, lookup=False: change(list(ToyDecomposition.menu(self, rows, cols)))


# -- the arithmetic ---------------------------------------------------------------------------------------------------
calls = []
broken("menu", "offers a structure twice", menu=menu_of(lambda menu: menu + menu[:1]))
broken("menu", "is empty for all of 24 x 24", menu=menu_of(lambda menu: []))
broken("menu", "for 24 x 25", menu=menu_of(lambda menu: [Toy(s.rows, s.cols + 1, s.rank) for s in menu]))
broken("menu", "is not listed in Broken", menu=menu_of(lambda menu: [LowRank(s.rows, s.cols, s.rank) for s in menu]))
broken("menu", "something else", menu=menu_of(lambda menu: calls.append(menu) or menu[len(calls) % 2 :]))

short_json = {"to_json": lambda self: {"kind": "toy", "rows": self.rows, "cols": self.cols, "rank": 1}}
broken("json", "JSON gave back toy\\(rank=1\\)", structure=short_json)
broken("json", "JSON with rank=0: .*ZeroDivisionError", structure={"validate": lambda self: 1 % self.rank})
broken("json", r"JSON with rank=\[\]: .*TypeError", structure={"validate": lambda self: None})


def viewed(self, x, factors, bias=None):
    y = Toy.matmul(self, x.view(-1, self.cols), factors, bias)
    return y.view(*x.shape[:-1], self.rows)


no_bias = {"matmul": lambda self, x, factors, bias=None: Toy.matmul(self, x, factors)}
broken("matmul", "with bias differs", structure=no_bias)
broken("matmul", "x with transposed tokens: RuntimeError", structure={"matmul": viewed})
broken("matmul", "x @ dense.T", structure={"dense": lambda self, factors: 2 * Toy.dense(self, factors)})
broken("matmul", r"dense has shape \(24, 23\)", structure={"dense": lambda self, f: Toy.dense(self, f)[:, 1:]})


def planned(factors=("right", "left"), *way_back):
    """A plan of the toy for the compiled kernel; sound as it is."""
    plan = lambda self: (*last_axis(1, self.cols, self.rank), *last_axis(1, self.rank, self.rows))  # noqa: E731
    return {"native": property(lambda self: Native(plan(self), factors, *way_back))}


broken("native", r"plan has factors \('right',\), the structure", structure=planned(("right",)))
broken("native", "the plan differs from x @ dense.T", structure=planned(("left", "right")))
broken("native", "plan of the way back has factors", structure=planned(("right", "left"), (), ("left",)))
broken("native", "way back in bfloat16 differs from", structure=planned(("right", "left"), (), (), swap(2, 12)))
broken("take-rows", "differs from dense", structure={"take_rows": lambda self, i, f: Toy.take_rows(self, 0 * i, f)})


def by_one_hot(self, index, factors):
    """Works for int64 only."""
    return F.one_hot(index, self.rows).to(factors["left"].dtype) @ self.dense(factors)


broken("take-rows", "int32", structure={"take_rows": by_one_hot})
broken("take-rows", "differs", structure={"take_rows": lambda self, i, f: Toy.take_rows(self, i.flatten(), f)})
wrapped = {"take_rows": lambda self, index, factors: Toy.take_rows(self, index % self.rows, factors)}
broken("out-of-range", "row 24 raised no IndexError", structure=wrapped)
broken("macs", "macs says 49 multiply-adds", structure={"macs": property(lambda self: Toy.macs.fget(self) + 1)})
rebuilds = {"matmul": lambda self, x, factors, bias=None: F.linear(x, self.dense(factors), bias)}
broken("macs", "were counted for", structure={"dense": Toy.dense, **rebuilds})
idle = {"operations": lambda self, tokens: []}
broken("operations", r"operations\(1\) would take 0.0 s", structure=idle)
rebuilt = {"operations": lambda self, tokens: dense_operations(self.rows, self.cols, tokens)}
broken("operations", "operations do 576 multiply-adds for 1 tokens, macs says 48", structure=rebuilt)
endless = {"lookup_operations": lambda self, tokens: [Pass(10**13)]}
broken("operations", r"lookup_operations\(1\) would take \d+", structure=endless)
broken("lookup-macs", "lookup_macs says 0", structure={"lookup_macs": property(lambda self: 0)})
broken("lookup-macs", "lookup_macs says 99", structure={"lookup_macs": property(lambda self: 99)})


def steeper(tensor):
    """The same numbers with twice the gradient."""
    return 2 * tensor - tensor.detach()


cut = {"matmul": lambda self, x, f, bias=None: Toy.matmul(self, x, {**f, "left": f["left"].detach()}, bias)}
broken("gradients", "matmul passes no gradient to 'left'", structure=cut)
cut = {"take_rows": lambda self, index, f: Toy.take_rows(self, index, {**f, "right": f["right"].detach()})}
broken("gradients", "take_rows passes no gradient to 'right'", structure=cut)
steep = {"matmul": lambda self, x, f, bias=None: steeper(Toy.matmul(self, x, f, bias))}
broken("gradients", "gradient of matmul differs", structure=steep)
steep = {"take_rows": lambda self, index, factors: steeper(Toy.take_rows(self, index, factors))}
broken("gradients", "gradient of take_rows differs", structure=steep)


# -- unusual input -----------------------------------------------------------------------------------------------------
class Careless(torch.autograd.Function):
    """The last product, whose backward pass forgets what it does not expect: dtypes, strides, a second time."""

    @staticmethod
    def forward(ctx, x, weight, forget):
        ctx.tensors, ctx.forget = (x.detach(), weight.detach()), forget
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.tensors
        if ctx.forget == "strides":
            grad = grad.as_strided(grad.shape, torch.empty(grad.shape).stride())
        if ctx.forget == "tensors":
            del ctx.tensors
        return grad @ weight, grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1]), None


class Once(Careless):
    """PyTorch's own guard raises only where the incoming gradient requires one: silently wrong for a linear loss."""

    backward = staticmethod(once_differentiable(Careless.backward))


class Refusing(Careless):
    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("this product cannot be differentiated twice")
        return Careless.backward(ctx, grad)


def careless(forget, function=Careless):
    def matmul(self, x, factors, bias=None):
        y = function.apply(linear(x, factors["right"]), factors["left"], forget)
        return y if bias is None else y + bias.to(y.dtype)

    return {"matmul": matmul}


broken("backward", "transposed tokens: the gradient of 'x' differs", structure=careless("strides"))
constant_bias = {
    "matmul": lambda self, x, f, bias=None: Toy.matmul(self, x, f, bias if bias is None else bias.detach())
}
broken("backward", "a plain input|appears to not have been used", structure=constant_bias)
broken("twice", "the second derivative by .* differs", structure=careless(""))
broken("twice", "the second derivative by .* differs", structure=careless("", Once))
broken("twice", "AttributeError: .*tensors", structure=careless("tensors"))
broken(
    "half",
    "matmul of torch.float16 returns torch.float32",
    structure={"matmul": lambda self, x, f, bias=None: Toy.matmul(self, x, f, bias).float()},
)


def rounded(self, x, factors, bias=None):
    return Toy.matmul(self, x.to(torch.float8_e4m3fn).to(x.dtype), factors, bias)


broken("half", "matmul of torch.float16 differs from float64", structure={"matmul": rounded})
first_row = {"take_rows": lambda self, index, factors: factors["right"].view(-1)[: self.cols].expand(*index.shape, -1)}
broken("own-rows", "RuntimeError: unsupported operation", structure=first_row)
own = {"take_rows": lambda self, index, f: Toy.take_rows(self, index, f) if index.dim() else f["right"][0]}
broken("own-rows", "writing to looked-up rows changes 'right'", structure=own)
sliced = {"matmul": lambda self, x, factors, bias=None: Toy.matmul(self, x[..., : self.cols], factors, bias)}
broken("wrong-shapes", r"x of shape \(25,\) for a weight with 24 columns raised no Exception", structure=sliced)
refilled = {"matmul": lambda self, x, factors, bias=None: Toy.matmul(self, x.reshape(-1, self.cols), factors, bias)}
broken("wrong-shapes", r"x of shape \(3, 48\) .* raised no Exception", structure=refilled)


# -- the fit ----------------------------------------------------------------------------------------------------------
def replaced(**change):
    """A `fit` whose factors are each passed through a function."""
    return refit(
        lambda fitted: Fitted(
            fitted.structure,
            {name: change.get(name, lambda tensor: tensor)(tensor) for name, tensor in fitted.factors.items()},
            fitted.relative_error,
        )
    )


def one_buffer(self, structure):
    sound = both(self, structure)
    buffer = torch.cat([tensor.flatten() for tensor in sound.values()])
    left, right = buffer.split([tensor.numel() for tensor in sound.values()])
    return {"left": left.view_as(sound["left"]), "right": right.view_as(sound["right"])}


strided = replaced(left=lambda t: t.repeat_interleave(2, 1)[:, ::2])
broken("factors", "'left' is not contiguous", fit=strided)
broken("factors", "'right' is not finite", fit=replaced(right=lambda t: t / 0))
broken("factors", "is of torch.float64", fit=replaced(right=lambda t: t.double()))
broken("factors", "history of its fit", fit=replaced(right=lambda t: t.clone().requires_grad_()))
broken("factors", "the fit returns", fit=replaced(right=lambda t: t[:, 1:].contiguous()))
broken("factors", "shares memory with factor 'left'", analysis={"factors": one_buffer})
rows_of_weight = {"factors": lambda self, s: {**both(self, s), "right": self.weight[: s.rank]}}
broken("factors", "shares memory with the weight", analysis=rows_of_weight)
broken(
    "factors",
    "bytes alive",
    analysis={"factors": lambda self, s: {**both(self, s), "right": self.right.contiguous()[: s.rank]}},
)
smaller = refit(lambda fitted: Fitted(Toy(24, 24, 12), fitted.factors, fitted.relative_error))
broken("factors", r"asked for, but toy\(rank=12\) came back", fit=smaller)

too_cheap = {"squared_errors": lambda self, s: [e / 2 for e in ToyAnalysis.squared_errors(self, s)]}
broken("price", "priced at a squared error of", analysis=too_cheap)
broken("price", "no prices", analysis={"squared_errors": lambda self, structures: [1e9]})
broken("price", "priced at a squared error of inf", analysis={"squared_errors": lambda self, s: [np.inf] * len(s)})

better = refit(lambda fitted: Fitted(fitted.structure, fitted.factors, fitted.relative_error / 2))
broken("error", "relative_error differs", fit=better)
negated = {"factors": lambda self, s: {**both(self, s), "left": -both(self, s)["left"]}}
broken("error", "worse than zero", analysis=negated)
noisy = {"factors": lambda self, s: {**both(self, s), "left": 1.001 * both(self, s)["left"]}}
broken("exact", "a weight of exactly this structure", analysis=noisy)
first_only = {"factors": lambda self, s: {**both(self, s), "left": both(self, s)["left"] * (s.rank == 1)}}
broken("monotone", r"the largest, toy\(rank=12\)", analysis=first_only)


def stubborn(self, weight, *, ratio=None, structure=None):
    """Fits the smallest structure where none is small enough."""
    try:
        return Decomposition.fit(self, weight, ratio=ratio, structure=structure)
    except BudgetError:
        return Decomposition.fit(self, weight, structure=Toy(*weight.shape, 1))


def wasteful(self, weight, *, ratio=None, structure=None):
    return Decomposition.fit(self, weight, structure=structure or max(self.menu(*weight.shape), key=lambda s: s.rank))


broken("ratio", "which no structure of the menu reaches, raised no BudgetError", fit=stubborn)
broken("ratio", "ratio 1.5 leaves 384 parameters, 576 were kept", fit=wasteful)


def before(action):
    """An `analyse` that does something else first."""

    def analyse(self, weight):
        action(weight)
        return ToyDecomposition.analyse(self, weight)

    return analyse


def drawn(self, structure):
    return {**both(self, structure), "left": both(self, structure)["left"] * (1 + 1e-3 * torch.rand(()))}


broken("determinism", "'left' differs between two fits", analysis={"factors": drawn})
default_dtype = {"factors": lambda self, s: {**both(self, s), "left": both(self, s)["left"] + torch.tensor([1 / 3])}}
broken("determinism", "RuntimeError: .* double != float", analysis=default_dtype)
broken("global-state", "torch's random generator", analyse=before(lambda weight: torch.manual_seed(0)))
broken("global-state", "numpy's random generator", analyse=before(lambda weight: np.random.rand()))
broken("global-state", "Python's random generator", analyse=before(lambda weight: random.random()))
broken("global-state", "default dtype", analyse=before(lambda weight: torch.set_default_dtype(torch.float64)))
broken("global-state", "gradient mode", analyse=before(lambda weight: torch.set_grad_enabled(False)))
broken("global-state", "tensorly's backend", analyse=before(lambda weight: tensorly.set_backend("pytorch")))

broken("weight-untouched", "writes the torch.float32 weight", analyse=before(lambda weight: weight.mul_(2)))
by_rows = {"analyse": lambda self, weight: ToyAnalysis(weight.as_strided(weight.shape, (weight.shape[1], 1)))}
broken("strides", "a transposed view fits otherwise", **by_rows)
absolute = {"factors": lambda self, s: {k: v * (self.weight.abs().max() > 1e-4) for k, v in both(self, s).items()}}
broken("scale", "times 1e-06 fits otherwise", analysis=absolute)
divided = {"factors": lambda self, s: {k: v * (self.values[0] / self.values[0]) for k, v in both(self, s).items()}}
broken("zero", "the zero matrix has relative error inf", analysis=divided)
broken("dtypes", "of a torch.bfloat16 weight is of torch.float32", fit=replaced(left=lambda t: t.float()))


def rounded_first(self, weight, *, ratio=None, structure=None):
    """Half precision goes through float8 on its way to the fit."""
    narrow = weight.to(torch.float8_e4m3fn).to(weight.dtype) if weight.dtype.itemsize == 2 else weight
    return Decomposition.fit(self, narrow, ratio=ratio, structure=structure)


broken("dtypes", "torch.bfloat16 has error .*, widened first", fit=rounded_first)


def tolerant(change):
    return lambda self, weight, *, ratio=None, structure=None: Decomposition.fit(self, change(weight), ratio=ratio)


broken("bad-weights", "a weight with NaN raised no WeightError", fit=tolerant(torch.nan_to_num))
broken("bad-weights", "an integer weight raised no", fit=tolerant(lambda w: w if w.is_complex() else w.float()))
broken("bad-weights", "a vector raised no WeightError", fit=tolerant(lambda w: w.view(4, -1) if w.dim() == 1 else w))


# -- the modules ------------------------------------------------------------------------------------------------------
broken("size", "num_params says 1, the linear layer holds 48", structure={"num_params": property(lambda self: 1)})
broken("like-linear", "differs from the dense Linear", structure=no_bias)
broken("like-conv1d", "differs from the dense Conv1D", structure=no_bias)
shifted = {"take_rows": lambda self, index, factors: Toy.take_rows(self, index, factors) + 1}
broken("like-embedding", "differs from the dense Embedding", structure=shifted)

kept = {}


def remembered(self, x, factors, bias=None):
    """Multiplies by the matrix of the first factors that it ever saw."""
    return F.linear(x, kept.setdefault(self, self.dense({"left": factors["left"], "right": factors["right"].weight})))


broken("state-dict", "two modules with other factors give one output", structure={"matmul": remembered})
unsteady = {"matmul": lambda self, x, f, bias=None: Toy.matmul(self, x, f, bias) + torch.rand(())}
broken("state-dict", "differs after a state dict round trip", structure=unsteady)
broken("deepcopy", "a deep copy of FactorizedLinear computes something else", structure=unsteady)
widened = {"matmul": lambda self, x, f, bias=None: Toy.matmul(self, x, f, bias).float()}
broken("autocast", "returns torch.float32 under bfloat16 autocast", structure=widened)
broken("autocast", "RuntimeError: .* same dtype", structure=careless("dtypes"))


def depends_on_data(self, x, factors, bias=None):
    return Toy.matmul(self, x, factors, bias) if x.sum() > 0 else Toy.matmul(self, x, factors, bias) * 1


def depends_on_length(self, x, factors, bias=None):
    return Toy.matmul(self, x.reshape(-1, 3, self.cols), factors, bias).reshape(*x.shape[:-1], self.rows)


broken("export", r"toy\(rank=1\) \(32 x 12\): GuardOnDataDependent", structure={"matmul": depends_on_data})
broken("export", "32 x 12", structure={"matmul": depends_on_length})
broken("compile", "32 x 12.*: Unsupported", structure={"matmul": depends_on_data})


@pytest.fixture(autouse=True)
def nothing_leaks(monkeypatch):
    """Registered toys and changed global states are forgotten after each test."""
    monkeypatch.setattr(registry, "_decompositions", dict(registry._decompositions))
    monkeypatch.setattr(registry, "_structures", dict(registry._structures))
    backend = tensorly.get_backend()
    with surroundings(seed=0, dtype=torch.float32, grad=True):
        yield
    tensorly.set_backend(backend)


def test_the_sound_one_passes_every_check():
    registry.register(ToyDecomposition)
    check_decomposition(ToyDecomposition)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar")
@pytest.mark.parametrize(("check", "decomposition", "match"), BROKEN)
def test_a_broken_one_is_caught(check, decomposition, match):
    registry._structures["toy"] = decomposition.structures[0]
    with pytest.raises(AssertionError, match=match):
        CHECKS[check](decomposition())


def test_refusing_second_derivatives_is_allowed():
    cls = dataclass(frozen=True)(type("RefusingToy", (Toy,), careless("", Refusing)))
    CHECKS["twice"](type("Refusing", (ToyDecomposition,), {"structures": (cls,)})())


def test_every_check_has_something_to_catch():
    """Those of weighted fits: test_conformance_catches_weighted.py."""
    assert {case.values[0] for case in BROKEN} == {name for name in CHECKS if not name.startswith("weighted")}


def test_an_unregistered_one_is_told_so():
    with pytest.raises(AssertionError, match="unknown structure kind 'toy'"):
        CHECKS["json"](ToyDecomposition())


def test_check_decomposition_names_the_check():
    cls = dataclass(frozen=True)(type("Broken", (ToyDecomposition,), {"menu": menu_of(lambda menu: [])}))
    with pytest.raises(AssertionError, match=r"check 'menu': Broken.*is empty"):
        check_decomposition(cls())
