"""What operations and layers take here, and the constants that predict them: a machine of one's own."""

import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, final

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import nn
from torch.nn import functional as F

from compresskit.core.cost import ELEMENT_BYTES, Gemm, Machine, Operation, Pass, Rates, Speeds, dense_operations
from compresskit.core.modules import FactorizedLinear
from compresskit.core.native_build import kernel_state
from compresskit.core.registry import decomposition
from compresskit.core.structure import Structure
from compresskit.errors import OptionError
from compresskit.machines.find import processor

SAMPLE_S = 2e-3
"""A call is repeated until a sample takes this long: a processor needs a while to run a call as fast as it can."""
SIDES = (8, 32, 96, 256, 768, 3072)
TOKENS = (1, 16, 128, 1024)
MIXES = ((2, 384, 2), (4, 192, 4), (8, 96, 8), (16, 48, 16), (2, 384, 16), (16, 384, 2), (16, 192, 1), (8, 384, 8))
"""m, n, k of the products that a token has of its own."""
GRIDS = ((2, 384), (8, 96), (16, 48), (384, 8))
MAX_MACS = 5e8
SHAPES = ((768, 768), (3072, 768), (768, 3072), (384, 384), (1536, 384), (4096, 4096))
METHODS = ("kronecker", "svd", "tucker", "tensor-train", "blast", "monarch")
STRUCTURES = 7
"""Of each menu, spread over its sizes."""
WIDEST = float(np.log(100))
"""How far a constant may move from where the search starts, as a logarithm."""
CALLS_S = (1e-6, 2e-5)
"""What a product of next to nothing may take: the search starts from each."""
LEAST = 1e-7
"""Where the search for a constant starts that is zero."""
HOLD = 0.03
"""How hard constants of factorised layers are held at those of dense ones, where nothing measured speaks for others."""

TINY = 1.3
"""A dense layer on a processor that takes no more than so many calls of nothing is tiny."""

Call = Callable[[], object]
OnRound = Callable[[int, int], None]
"""Called with rounds of timing done and all of them."""
Layer = tuple[Structure | None, int, int, int]
"""Structure (None: dense), rows, columns and tokens."""


@final
@dataclass(frozen=True)
class Closeness:
    """How near predictions are to measurements.

    Args:
        number: of layers.
        off_median, off_90: how many times a prediction is off, at the median and nine of ten.
        faster_but_slower: layers that plans permit, and that took longer than dense by more than the machine's
            `notable_s` and a tenth.
    """

    number: int
    off_median: float
    off_90: float
    faster_but_slower: int


@final
@dataclass(frozen=True)
class Measured:
    """A machine that was measured.

    Args:
        closeness: by `Structure.kind`, how near its constants come to the layers that they were fitted to.
        times_s: what these took.
    """

    machine: Machine
    closeness: Mapping[str, Closeness]
    times_s: Mapping[Layer, float]


def measure_machine(
    name: str,
    dtype: str = "float32",
    *,
    device: str = "cpu",
    methods: Sequence[str] = METHODS,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rounds: int = 10,
    on_round: OnRound | None = None,
) -> Measured:
    """Time operations and layers here, as they run now: with a compiled kernel if it is there, so many threads.

    Takes minutes; whatever else the machine does makes it seem slower. Best times count.

    Args:
        dtype: of weights and inputs.
        device: cpu or cuda.
        methods: whose structures are timed; others count as the average of these.
        shapes: of weights, (rows, columns).

    Raises:
        OptionError: no such type or device.
    """
    if dtype not in ELEMENT_BYTES:
        raise OptionError(f"dtype is {', '.join(ELEMENT_BYTES)}, got {dtype!r}")
    if device.split(":")[0] not in ("cpu", "cuda") or (device != "cpu" and not torch.cuda.is_available()):
        raise OptionError(f"device is cpu, or cuda where there is one; got {device!r}")
    where = {"dtype": getattr(torch, dtype), "device": torch.device(device)}
    singles = single_operations(**where)
    layers = dict(_layers(methods, shapes, **where))
    with torch.inference_mode():
        times = best_times_s({**singles, **layers}, rounds, on_round)
    of_layers = {layer: times[layer] for layer in layers}
    plain = {layer: seconds for layer, seconds in of_layers.items() if layer[0] is None}
    dense = fit_speeds({(operation,): times[operation] for operation in singles}, _start(dtype))
    dense = fit_speeds(_works(plain), dense, hold=HOLD)
    factorised = {layer: seconds for layer, seconds in of_layers.items() if layer[0] is not None}
    kinds = {kind: fit_speeds(_works(of), dense, hold=HOLD) for kind, of in _by_kind(factorised).items()}
    together = fit_speeds(_works(factorised), dense, hold=HOLD) if kinds else dense
    tiny_s = TINY * (dense.layer_s + dense.gemm_call_s) if device == "cpu" else 0.0
    machine = Machine(
        name, _about(dtype, device), dtype, _notable_s(device), tiny_s, dense, together, tuple(kinds.items())
    )
    return Measured(machine, closeness(machine, of_layers), of_layers)


def closeness(machine: Machine, measured: Mapping[Layer, float]) -> dict[str, Closeness]:
    """By kind of structure, how near a machine's predictions come to times of layers, dense ones among them."""
    found: dict[str, Closeness] = {}
    for kind, layers in _by_kind(measured).items():
        expected = {layer: predicted_s(machine, layer) for layer in layers}
        off = np.exp(np.abs(np.log([expected[layer] / layers[layer] for layer in layers])))
        wrong = 0
        for layer in layers:
            plain = (None, *layer[1:])
            permitted = not machine.is_slower(expected[layer], predicted_s(machine, plain))
            wrong += permitted and layers[layer] > max(measured[plain] + machine.notable_s, 1.1 * measured[plain])
        found[kind] = Closeness(len(layers), float(np.median(off)), float(np.percentile(off, 90)), wrong)
    return found


def predicted_s(machine: Machine, layer: Layer) -> float:
    """What a machine is expected to take for a layer."""
    structure, *shape = layer
    speeds = machine.speeds(None if structure is None else structure.kind)
    return speeds.time_s(_operations(structure, *shape))


def best_times_s(calls: Mapping[Any, Call], rounds: int, on_round: OnRound | None = None) -> dict[Any, float]:
    """Least time of each call over rounds in which they take turns: whatever else the machine does only adds to it."""
    best: dict[Any, float] = {}
    repeats: dict[Any, int] = {}
    for name, call in calls.items():
        repeats[name] = max(1, round(SAMPLE_S / _time(call, 1)))
    for number in range(rounds):
        for name, call in calls.items():
            best[name] = min(best.get(name, np.inf), _time(call, repeats[name]))
        if on_round is not None:
            on_round(number + 1, rounds)
    return best


def _time(call: Call, repeats: int) -> float:
    call()  # libraries forget what they prepared for a size when many others came between
    _wait()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait()
    return max(time.perf_counter() - started, 1e-9) / repeats


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def single_operations(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> dict[Operation, Call]:
    """A grid of operations, each with a call that does just this."""

    def random_tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float32, device=device).to(dtype)

    calls: dict[Operation, Call] = {}
    for m, n, k in itertools.product(TOKENS, SIDES, SIDES):
        if m * n * k <= MAX_MACS:
            calls[Gemm(m, n, k)] = _product(random_tensor(m, k), random_tensor(n, k))
    for (m, n, k), batch in itertools.product(MIXES, TOKENS[1:]):
        calls[Gemm(m, n, k, batch=batch)] = _mixing(random_tensor(m, k), random_tensor(batch, k, n))
    for (a, b), tokens in itertools.product(GRIDS, TOKENS):
        grid = random_tensor(tokens, a, b)
        calls[Pass(2 * grid.numel(), strided=True)] = _transposition(grid)
        calls[Pass(2 * grid.numel())] = _copy(grid)
    return calls


def _product(x: torch.Tensor, weight: torch.Tensor) -> Call:
    return lambda: F.linear(x, weight)


def _mixing(small: torch.Tensor, grid: torch.Tensor) -> Call:
    return lambda: torch.matmul(small, grid)


def _transposition(grid: torch.Tensor) -> Call:
    return lambda: grid.mT.contiguous()


def _copy(grid: torch.Tensor) -> Call:
    return lambda: grid.clone()


def _layers(
    methods: Sequence[str], shapes: Sequence[tuple[int, int]], *, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[Layer, Call]]:
    """Dense layers, and structures over all sizes of each menu that multiply less."""
    for rows, cols in shapes:
        modules: dict[Structure | None, nn.Module] = {None: nn.Linear(cols, rows)}
        for method in methods:
            modules |= {structure: random_layer(structure) for structure in _spread(method, rows, cols)}
        for tokens in TOKENS:
            if tokens * rows * cols > 8 * MAX_MACS:
                continue
            x = torch.randn(tokens, cols).to(device, dtype)
            for structure, module in modules.items():
                yield (structure, rows, cols, tokens), _run(module.to(device, dtype), x)


def _spread(method: str, rows: int, cols: int) -> list[Structure]:
    """Structures of a menu, sorted by size and evenly spaced over it after a seeded shuffle of equals."""
    menu = [s for s in decomposition(method).menu(rows, cols) if s.macs < rows * cols and s.num_params < rows * cols]
    random.Random(0).shuffle(menu)  # noqa: S311 - a sample, no secret
    menu.sort(key=lambda structure: structure.num_params)
    steps = max(STRUCTURES - 1, 1)
    return [menu[i * (len(menu) - 1) // steps] for i in range(min(STRUCTURES, len(menu)))]


def random_layer(structure: Structure) -> nn.Module:
    """A layer of this structure with random factors and bias, in float32."""
    specs = structure.factor_specs()
    factors = {name: torch.randn(spec.shape) / max(spec.shape) ** 0.5 for name, spec in specs.items()}
    return FactorizedLinear(structure, factors, torch.randn(structure.rows))


def _run(module: nn.Module, x: torch.Tensor) -> Call:
    return lambda: module(x)


def _operations(structure: Structure | None, rows: int, cols: int, tokens: int) -> tuple[Operation, ...]:
    return dense_operations(rows, cols, tokens) if structure is None else tuple(structure.operations(tokens))


def _works(layers: Mapping[Layer, float]) -> dict[tuple[Operation, ...], float]:
    return {_operations(*layer): seconds for layer, seconds in layers.items()}


def _by_kind(layers: Mapping[Layer, float]) -> dict[str, dict[Layer, float]]:
    found: dict[str, dict[Layer, float]] = {}
    for layer, seconds in layers.items():
        found.setdefault("dense" if layer[0] is None else layer[0].kind, {})[layer] = seconds
    return found


def fit_speeds(measured: Mapping[tuple[Operation, ...], float], start: Speeds, *, hold: float = 0.0) -> Speeds:
    """The constants whose predictions are nearest, by the logarithm of the ratio; outliers count less.

    Args:
        measured: seconds that the operations of a layer take.
        start: where the search starts.
        hold: how hard it is held there.
    """
    works, times = list(measured), np.log(list(measured.values()))

    def search(begin: Any) -> Any:
        def miss(logs: Any) -> Any:
            speeds = _speeds(np.exp(logs), start.element_bytes)
            off = np.log([speeds.time_s(work) for work in works]) - times
            return np.concatenate([off, hold * np.sqrt(len(works)) * (logs - begin)])

        return least_squares(miss, begin, bounds=(begin - WIDEST, begin + WIDEST), loss="soft_l1", f_scale=0.3)

    calls = (start.gemm_call_s, *CALLS_S)
    begins = [_constants(replace(start, gemm_call_s=call_s)) for call_s in calls]  # it has several minima
    found = min((search(np.log(np.maximum(begin, LEAST))) for begin in begins), key=lambda search: search.cost)
    return _speeds([f"{constant:.3g}" for constant in np.exp(found.x)], start.element_bytes)


def _constants(speeds: Speeds) -> list[float]:
    """The constants as one list, of vector products without `half_m`, which has no meaning there."""
    vector = speeds.vector
    return [
        *astuple(speeds.single),
        *astuple(speeds.batched),
        *(vector.peak_macs_per_s, vector.half_n, vector.half_k),
        *(speeds.layer_s, speeds.gemm_call_s, speeds.pass_call_s),
        *(speeds.gemm_bytes_per_s, speeds.pass_bytes_per_s, speeds.strided_bytes_per_s),
    ]


def _speeds(constants: Any, element_bytes: int) -> Speeds:
    numbers = [float(constant) for constant in constants]
    peak, half_n, half_k = numbers[8:11]
    rates = Rates(*numbers[:4]), Rates(*numbers[4:8]), Rates(peak, 0.0, half_n, half_k)
    layer_s, gemm_call_s, pass_call_s, gemm, one, strided = numbers[11:]
    return Speeds(*rates, layer_s, gemm_call_s, pass_call_s, gemm, one, strided, element_bytes)


def _start(dtype: str) -> Speeds:
    rates = Rates(1e11, 10, 10, 10)
    return Speeds(rates, rates, rates, 1e-6, 1e-6, 1e-6, 1e11, 1e11, 3e10, ELEMENT_BYTES[dtype])


def _notable_s(device: str) -> float:
    """About ten calls of operators on a processor; calls of a GPU wait for each other."""
    return 20e-6 if device == "cpu" else 0.0


def _about(dtype: str, device: str) -> str:
    software = f"PyTorch {torch.__version__.partition('+')[0]}, {dtype}"
    if device != "cpu":
        return f"{torch.cuda.get_device_name(device)}, {software}"
    threads = torch.get_num_threads()
    kernel = ", with our compiled kernel" if dtype in kernel_state().types else ""
    return f"{threads} thread{'s' if threads > 1 else ''} of {processor()}, {software}{kernel}"
