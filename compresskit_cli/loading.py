"""Loading the model that a command works on."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def quiet_transformers() -> None:
    """Our own progress and messages are enough."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def load(model: str, *, revision: str | None, dtype: str, device: str, seed: int) -> tuple["PreTrainedModel", Path]:
    """The dense model on the device, and the folder that it came from.

    Raises:
        CheckpointError: there is no such model, or it is damaged.
        OptionError: the device does not exist here.
    """
    import torch

    from compresskit.errors import OptionError
    from compresskit.hub import load_model, resolve

    quiet_transformers()
    torch.manual_seed(seed)
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    folder = resolve(model, revision)
    return load_model(folder, dtype=dtype).to(where), folder
