"""Loading the model that a command works on."""

from pathlib import Path
from typing import TYPE_CHECKING

from compresskit_cli.memory import return_large_blocks

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def quiet_transformers() -> None:
    """Our own progress and messages are enough."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def usable_device(name: str) -> "torch.device":
    """The device of this name; `auto` is the accelerator, or the processor where there is none.

    Raises:
        OptionError: it does not exist here.
    """
    import torch

    from compresskit.errors import OptionError

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(name)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if where.type == "meta":
        raise OptionError("device 'meta' holds no values, so nothing can be fitted there")
    return where


def load(model: str, *, revision: str | None, dtype: str, device: str, seed: int) -> tuple["PreTrainedModel", Path]:
    """The dense model on the device, and the folder that it came from.

    Raises:
        CheckpointError: there is no such model, it is damaged, or it is compressed already.
        OptionError: the device does not exist here.
    """
    import torch

    from compresskit.errors import CheckpointError
    from compresskit.hub import load_model, read_map, resolve

    quiet_transformers()
    return_large_blocks()
    torch.manual_seed(seed)
    where = usable_device(device)
    folder = resolve(model, revision)
    if read_map(folder) is not None:
        raise CheckpointError(
            f"{folder} is compressed already; start from the original model (--rule puts several methods into one run)"
        )
    return load_model(folder, dtype=dtype).to(where), folder
