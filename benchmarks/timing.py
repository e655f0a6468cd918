"""Timing that survives a shared machine: baseline and candidates take turns, and only ratios are reported."""

import gc
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from benchmarks.machine import ROOT, peak_memory_bytes

BLOCK_S = 0.002
"""A block's figure is the mean of as many calls as fill this time, at least one."""
WAYS = ("pytorch", "compiled")
"""What runs our layers on a processor: PyTorch's operations, or our compiled kernel."""


def time_call(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def timed_block(call: Callable[[Any], object], x: Any) -> Callable[[], float]:
    """A task that returns seconds per call with `x`, after two calls that do not count."""
    call(x)
    number = max(1, int(BLOCK_S / max(time_call(lambda: call(x)), 1e-9)))

    def block() -> float:
        return time_call(lambda: [call(x) for _ in range(number)] and None) / number

    return block


def interleave(
    tasks: Mapping[str, Callable[[], float]], repeats: int, *, collect: bool = True
) -> dict[str, list[float]]:
    """Figures of each task, which returns one per call; the tasks take turns, so that a slow spell hits all of them.

    Args:
        collect: garbage before each call, which takes tenths of a second: for tasks that build models.
    """
    figures: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            if collect:  # models are cyclic: what one task leaves is neither the next one's time nor its memory
                gc.collect()
            figures[name].append(task())
    return figures


def median_ratio(figures: Sequence[float], baseline: Sequence[float]) -> float:
    """Median over the rounds of figure / baseline in the same round."""
    return statistics.median(a / b for a, b in zip(figures, baseline, strict=True))


@final
@dataclass(frozen=True)
class ProcessCost:
    """Wall time of a process and the most memory that it, not counting its own children, ever held."""

    time_s: float
    peak_bytes: int


def run_process(command: Sequence[str], environment: Mapping[str, str] | None = None) -> ProcessCost:
    """Run a command in the root of this repository until it ends, in our environment with these variables.

    Raises:
        RuntimeError: it did not end with status 0; with the end of what it wrote.
    """
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
            time_s = time.perf_counter() - started
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if process.returncode is None:  # Ctrl-C
                process.kill()
        if process.returncode != 0:
            log.seek(0)
            text = log.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}:\n{text}")
    return ProcessCost(time_s, peak_memory_bytes(usage.ru_maxrss))


def against(limit: float | None, value: float) -> str:
    """A target cell: what is asked, and whether the value keeps it."""
    return "" if limit is None else f"≤ {limit:g} {'yes' if value <= limit else 'NO'}"


def rounded(figures: Any) -> Any:
    """Figures with six significant digits: more would be noise in a committed file."""
    if isinstance(figures, float):
        return float(f"{figures:.6g}")
    if isinstance(figures, Mapping):
        return {key: rounded(value) for key, value in figures.items()}
    return [rounded(value) for value in figures] if isinstance(figures, list | tuple) else figures


def prepare_kernel(experiment: Any, empty: Path) -> None:
    """Compile our kernel for an experiment that is about it; others must not find one that happens to be there.

    Args:
        empty: a folder without kernels, which need not exist; for child processes, too.

    Raises:
        SuiteError: `kernel` of the experiment is no way to run layers.
        ExperimentSkipped: the kernel cannot be compiled here.
    """
    from benchmarks.experiments import ExperimentSkipped, SuiteError

    wanted = getattr(experiment, "kernel", WAYS[0])
    if wanted not in WAYS:
        raise SuiteError(f"{experiment.kind}: kernel is {' or '.join(WAYS)}, got {wanted!r}")
    if wanted == WAYS[0]:
        os.environ["COMPRESSKIT_CACHE"] = str(empty)
        return
    import compresskit
    from compresskit.errors import KernelError

    try:
        compresskit.build_kernels()
    except KernelError as error:
        raise ExperimentSkipped(str(error)) from error


def without_kernel(task: Callable[[], float]) -> Callable[[], float]:
    """The same without our compiled kernel."""
    import compresskit

    def run() -> float:
        with compresskit.use_kernels("pytorch"):
            return task()

    return run
