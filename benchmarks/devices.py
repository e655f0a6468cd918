"""Running an experiment on a CPU or GPU: where, in which type, how its time is taken. Imports torch: import it late."""

from collections.abc import Callable
from typing import Literal

import torch

from benchmarks.experiments import ExperimentSkipped, SuiteError
from benchmarks.timing import time_call

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        ExperimentSkipped: it is not there.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ExperimentSkipped(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def find_dtype(name: str) -> torch.dtype:
    """The type of this name.

    Raises:
        SuiteError: there is none.
    """
    if name not in DTYPES:
        raise SuiteError(f"there is no dtype {name!r}. Known: {', '.join(DTYPES)}")
    return DTYPES[name]


def trains_on(device: str) -> Literal["auto", "cpu"]:
    """How `TrainSettings` says that; what is no CPU is the machine's accelerator."""
    return "cpu" if device == "cpu" else "auto"


def multiply_in(dtype: str) -> None:
    """Let products of float32 run in TensorFloat-32 if that is the type; changes the process."""
    if dtype == "tf32":
        torch.set_float32_matmul_precision("high")


def device_name(device: torch.device) -> str | None:
    """What accelerator it is; None for a CPU, which every result names."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def timed(call: Callable[[], object], device: torch.device, *, repeats: int = 1) -> Callable[[], float]:
    """A task that returns the seconds of one call, of several in a row, with the device idle before and after."""

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    def many() -> None:
        for _ in range(repeats):
            call()
        wait()

    def task() -> float:
        wait()
        return time_call(many) / repeats

    return task
