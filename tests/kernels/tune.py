"""Run by hand on a GPU: how long the fused kernel takes with other tiles than those that `tiles_for` gives.

    python -m tests.kernels.tune [options;options] [shape,shape] [tokens,tokens] [seconds]

Prints a line for each structure and number of tokens: dense, PyTorch and mixed, then the tiles of the rule, then the
best ones, in microseconds of GPU time (replays of a CUDA graph).
"""

import sys
import time

import torch

import compresskit
from compresskit import use_kernels
from compresskit.core import kron_gpu
from compresskit.core.kron_gpu import SHAPES, Tiles, gpu_of, tiles_for
from tests.kernels.cases import layer_of

CALLS = 20
MORE_SHAPES = (
    (32, 128, 4),
    (32, 128, 8),
    (32, 64, 8),
    (16, 64, 4),
    (16, 128, 4),
    (16, 16, 4),
    (16, 16, 2),
    (16, 32, 8),
)


def graph_us(call):
    """Microseconds of one call, the least of five graphs' replays."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    found = []
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) * 1000 / CALLS)
    return min(found[1:])


def candidates(form, n, gpu):
    """Tiles that fit, each with the longest inner step and one half as long."""
    p, q, k = form.p, form.q, form.terms
    held = (q if k == 1 else p + q) if q <= p else p
    for tokens, wide, warps in (*SHAPES, *MORE_SHAPES):
        if held * tokens * wide > 160 * 32 * warps or (tokens > 16 and tokens >= 2 * n) or wide >= 2 * form.r:
            continue
        row = 2 * (q * tokens + (1 if q <= p else k) * wide)
        inners = [i for i in (128, 64, 32, 16) if 2 * i * row <= gpu.shared_bytes - 8192 and i < 2 * form.s][:2]
        for inner in inners:
            yield Tiles(tokens, wide, inner, warps, max(2, min(4, (gpu.shared_bytes - 8192) // (inner * row))))


def tune(options, shape, n, until):
    given = dict(item.split("=", 1) for item in options.split(","))
    (structure,) = compresskit.decomposition("kronecker", given).menu(*map(int, shape.split("x")))
    layer, form = layer_of(structure, torch.bfloat16, device="cuda"), structure._form
    dense = torch.nn.Linear(structure.cols, structure.rows, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(n, structure.cols, device="cuda", dtype=torch.bfloat16)
    gpu, line = gpu_of(x.device), [f"{options} {shape} {n}: dense {graph_us(lambda: dense(x)):.1f}"]
    for way in ("pytorch", "mixed", "fused"):
        with use_kernels(way):
            line.append(f"{way} {graph_us(lambda: layer(x)):.1f}")
    chosen = tiles_for(form, n, 2, gpu)
    line.append(f"by {tuple(vars(chosen).values())}, auto is {kron_gpu.choose(form, n, 2, tensor_cores=True)}; best")
    factors, found = (layer.small, layer.wide.weight, layer.bias), {}
    for tiles in candidates(form, n, gpu):
        if time.monotonic() < until:
            try:
                found[tiles] = graph_us(lambda tiles=tiles: kron_gpu.fused(x, n, *factors, form, tiles, "ieee"))
            except kron_gpu._compile_errors() as error:
                print(options, tiles, type(error).__name__)
    best = sorted(found, key=found.get)[:4]
    print(*line, *(f"{found[tiles]:.1f} {tuple(vars(tiles).values())}" for tiles in best), flush=True)


def main(options="left=2x2;left=8x8;left=2x8", shapes="768x768,4096x4096", tokens="1,128,1024,8192", seconds="150"):
    until = time.monotonic() + float(seconds)
    with torch.inference_mode():
        for one in options.split(";"):
            for shape in shapes.split(","):
                for n in map(int, tokens.split(",")):
                    if time.monotonic() < until:
                        tune(one, shape, n, until)


if __name__ == "__main__":
    main(*sys.argv[1:])
