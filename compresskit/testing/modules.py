"""Checks of the modules that hold the factors: drop-in replacement, saving, copying, compiling, exporting."""

import copy

import torch
from torch import Tensor, nn
from torch.export import Dim

from compresskit.core.modules import FactorizedEmbedding, FactorizedLinear
from compresskit.testing.cases import Case, each_structure, expect, expect_close, normal, num_params


def linear_module(case: Case, *, seed: int = 1, dtype: torch.dtype = torch.float64) -> FactorizedLinear:
    """A linear layer of this structure with seeded factors and bias."""
    bias = normal(case.structure.rows, seed=9 + seed, dtype=dtype)
    return FactorizedLinear(case.structure, case.factors(dtype, seed=seed), bias)


def _embedding(case: Case, *, seed: int = 1, dtype: torch.dtype = torch.float64) -> FactorizedEmbedding:
    row = normal(case.structure.cols, seed=9 + seed, dtype=dtype)
    return FactorizedEmbedding(case.structure, case.factors(dtype, seed=seed), padding_idx=1, padding_row=row)


def _modules(case: Case) -> list[tuple[FactorizedLinear | FactorizedEmbedding, Tensor]]:
    """Both modules with an input for each, (2, 3) tokens."""
    return [_module_for(case, lookup=False), _module_for(case, lookup=True)]


def _module_for(case: Case, *, lookup: bool) -> tuple[FactorizedLinear | FactorizedEmbedding, Tensor]:
    """The module that serves this menu, with an input of (2, 3) tokens."""
    if lookup:
        return _embedding(case), torch.arange(6).view(2, 3) % case.structure.rows
    return linear_module(case), normal(2, 3, case.structure.cols)


@each_structure()
def size(case: Case) -> None:
    """`num_params` is what the modules hold; the bias and the padding row come on top."""
    promised = case.structure.num_params
    found = num_params(case.fit().to_module())
    expect(found == promised, f"num_params says {promised}, the linear layer holds {found}")
    found = num_params(FactorizedEmbedding(case.structure, case.factors()))
    expect(found == promised, f"num_params says {promised}, the embedding holds {found}")


@each_structure(lookups=(False,), count=2)
def like_linear(case: Case) -> None:
    """`to_module(like=nn.Linear)` keeps bias, dtype and mode, and computes what the dense layer would."""
    rows, cols = case.structure.rows, case.structure.cols
    for bias, dtype in ((True, torch.float64), (False, torch.float64), (True, torch.bfloat16)):
        like = nn.Linear(cols, rows, bias=bias, device="meta").to_empty(device="cpu").to(dtype).eval()
        like.load_state_dict({name: normal(*value.shape, dtype=dtype) for name, value in like.state_dict().items()})
        module = case.fit(like.weight).to_module(like)
        expect(isinstance(module, FactorizedLinear), f"like=nn.Linear gives a {type(module).__name__}")
        _check_replacement(module, like, normal(2, 3, cols, dtype=dtype))


@each_structure(lookups=(False,), count=2)
def like_conv1d(case: Case) -> None:
    """`to_module(like=Conv1D)`, whose weight is stored (in, out), computes what the dense layer would."""
    from transformers.pytorch_utils import Conv1D  # slow to import, and only needed here

    rows, cols = case.structure.rows, case.structure.cols
    with torch.device("meta"):
        like = Conv1D(rows, cols)
    like = like.to_empty(device="cpu").double()
    like.load_state_dict({name: normal(*value.shape) for name, value in like.state_dict().items()})
    module = case.fit(like.weight.T).to_module(like)
    _check_replacement(module, like, normal(2, 3, cols))


@each_structure(lookups=(True,), count=2)
def like_embedding(case: Case) -> None:
    """`to_module(like=nn.Embedding)` keeps the padding row exactly, without a gradient for it."""
    rows, cols = case.structure.rows, case.structure.cols
    like = nn.Embedding(rows, cols, padding_idx=1, _weight=normal(rows, cols, dtype=torch.float64))
    module = case.fit(like.weight).to_module(like)
    expect(isinstance(module, FactorizedEmbedding), f"like=nn.Embedding gives a {type(module).__name__}")
    assert isinstance(module, FactorizedEmbedding)
    padding = like.weight[1].detach().clone()
    index = torch.tensor([1, 0, rows - 1, 1])
    y = module(index)
    expect(torch.equal(y[0], padding) and torch.equal(y[3], padding), "the padding row is not the one of the embedding")
    module(torch.tensor([[1, 1]])).sum().backward()
    for name, factor in module.factors().items():
        expect(factor.grad is None or not factor.grad.any(), f"the padding row passes a gradient to {name!r}")
    expect(module.padding_row is not None and module.padding_row.grad is None, "the padding row has a gradient")
    _check_replacement(module, like, index)


def _check_replacement(module: nn.Module, like: nn.Module, x: Tensor) -> None:
    """The module agrees with `like` once that holds the rebuilt matrix; dtype, mode and shape of `weight` too."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    assert isinstance(like.weight, nn.Parameter)
    expect(module.training == like.training, "the training mode is not that of the layer it replaces")
    expect(weight.shape == like.weight.shape, f"weight has shape {tuple(weight.shape)}, not {tuple(like.weight.shape)}")
    dtypes = {parameter.dtype for parameter in module.parameters()}
    expect(dtypes == {like.weight.dtype}, f"parameters are of {dtypes}, those of the layer of {like.weight.dtype}")
    with torch.no_grad():
        like.weight.copy_(weight)
        half = like.weight.dtype == torch.bfloat16
        tolerance = 0.1 * float(like(x).abs().max()) if half else 1e-9
        expect_close(module(x), like(x), f"differs from the dense {type(like).__name__}", atol=tolerance)


@each_structure(count=2)
def state_dict(case: Case) -> None:
    """A state dict loads strictly into another module of the structure and gives the same output bit by bit."""
    for (module, x), other in zip(_modules(case), (linear_module(case, seed=5), _embedding(case, seed=5)), strict=True):
        expect("weight" not in module.state_dict(), "the state dict holds the dense weight")
        expect(not torch.equal(module(x), other(x)), "two modules with other factors give one output")
        other.load_state_dict(module.state_dict())
        expect(torch.equal(module(x), other(x)), f"{type(module).__name__} differs after a state dict round trip")


@each_structure(count=2)
def deepcopy(case: Case) -> None:
    """A deep copy computes the same and shares no memory."""
    for module, x in _modules(case):
        twin = copy.deepcopy(module)
        expect(torch.equal(module(x), twin(x)), f"a deep copy of {type(module).__name__} computes something else")
        ours = {parameter.data_ptr() for parameter in module.parameters()}
        shared = ours & {parameter.data_ptr() for parameter in twin.parameters()}
        expect(not shared, f"a deep copy of {type(module).__name__} shares memory")


@each_structure(count=2)
def autocast(case: Case) -> None:
    """Under autocast a linear layer computes in bfloat16 as nn.Linear does, its backward pass too."""
    x = normal(2, 3, case.structure.cols, dtype=torch.float32)
    linear, embedding = linear_module(case, dtype=torch.float32), _embedding(case, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, row = linear(x), embedding(torch.tensor([0]))
    expect(y.dtype == torch.bfloat16, f"the linear layer returns {y.dtype} under bfloat16 autocast")
    expect(row.is_floating_point(), f"the embedding returns {row.dtype} under bfloat16 autocast")
    wide = linear(x).detach()
    tolerance = 0.1 * float(wide.abs().max())
    expect_close(y.detach().float(), wide, "autocast computes something else", rtol=0, atol=tolerance)
    gradient = normal(*y.shape, dtype=torch.float32)
    found = torch.autograd.grad(y, list(linear.parameters()), gradient.to(y.dtype))
    wanted = torch.autograd.grad(linear(x), list(linear.parameters()), gradient)
    for ours, exact in zip(found, wanted, strict=True):
        tolerance = 0.1 * float(exact.abs().max())
        expect_close(ours, exact, "autocast computes other gradients", rtol=0, atol=tolerance)


@each_structure(shapes=((32, 12),), count=2)
def export(case: Case) -> None:
    """torch.export takes the modules with dynamic batch and length, and the program computes the same."""
    sizes = {0: Dim("batch"), 1: Dim("length")}
    module, x = _module_for(case, lookup=case.lookup)
    program = torch.export.export(module, (x,), dynamic_shapes=(sizes,)).module()
    longer = torch.cat([x, x.flip(1)], dim=1).repeat(2, *[1] * (x.dim() - 1))  # (4, 6) tokens
    expect_close(program(longer), module(longer), f"the exported {type(module).__name__} differs")


@each_structure(shapes=((32, 12),), count=2)
def compile_(case: Case) -> None:
    """torch.compile takes the modules as one graph, their `weight` too, and computes the same.

    Resets torch's compile cache, whose limit would otherwise be reached.
    """
    module, x = _module_for(case, lookup=case.lookup)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: (module(x), module.weight), fullgraph=True, backend="eager")
    y, weight = compiled(x)
    torch.compiler.reset()
    expect_close(y, module(x), f"the compiled {type(module).__name__} differs")
    expect_close(weight, module.rebuilt_weight(), f"the compiled weight of {type(module).__name__} differs")
