"""From what a user typed, a folder or a hub id, to a folder on this machine."""

import difflib
import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from compresskit.errors import CheckpointError

ALLOWED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py")
IGNORED = ("onnx/*", "openvino/*", "coreml/*", "original/*", "consolidated*")


def resolve(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: itself, or the snapshot of a hub id, downloaded if it is not there yet.

    Pickled weights are not downloaded. The last part of a snapshot's path is the commit that was resolved.

    Raises:
        CheckpointError: neither a folder nor a hub id that can be reached; names folders that are spelt alike.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"{folder} is a folder; a revision ({revision}) belongs to a hub id")
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; give the folder that holds config.json and the weights")
    if not _is_hub_id(str(model)):
        raise CheckpointError(f"there is no folder {folder}{_near(folder)}")
    try:
        return Path(
            snapshot_download(
                str(model), revision=revision, allow_patterns=list(ALLOWED), ignore_patterns=list(IGNORED)
            )
        )
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{model!r} on the hub has no revision {revision!r}") from error
    except GatedRepoError as error:
        raise CheckpointError(f"{model!r} on the hub is gated: accept its terms there, then `hf auth login`") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"{model!r} is neither a folder nor a model on the hub that can be read here{_near(folder) or '.'} A "
            "private model needs `hf auth login`"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        said, _, _ = str(error).partition("\n")
        raise CheckpointError(
            f"{model!r} is not a folder, and the hub could not be asked for it{_near(folder) or '.'} Check the "
            f"connection (HF_HUB_OFFLINE unset?), or give a folder. The hub said: {said}"
        ) from error


def _is_hub_id(text: str) -> bool:
    """`name` or `owner/name`, and not meant as a path."""
    return text.count("/") <= 1 and not text.startswith((".", "~", "/")) and "\\" not in text and not text.endswith("/")


def _near(folder: Path) -> str:
    """`; did you mean ...?` if folders beside it are spelt alike."""
    parent = folder.parent
    others = [other.name for other in parent.iterdir() if other.is_dir()] if os.access(parent, os.R_OK) else []
    near = [str(parent / name) for name in difflib.get_close_matches(folder.name, others)]
    return f"; did you mean {' or '.join(near)}?" if near else ""
