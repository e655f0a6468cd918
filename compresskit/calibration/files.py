"""A calibration as one safetensors file: the tensors, each once, and all else as JSON in its header."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compresskit.calibration.moments import Calibration, Use
from compresskit.errors import CalibrationError, OutputError

FORMAT_VERSION = 1
HEADER = "compresskit_calibration"
TENSORS = ("inputs", "mean", "counts", "gradients")


def save_calibration(calibration: Calibration, file: str | Path) -> None:
    """Write a file that is complete or not there.

    Raises:
        OutputError: it cannot be written.
    """
    path = Path(file).expanduser()
    tensors: dict[str, Tensor] = {}
    keys: dict[int, str] = {}
    uses: dict[str, dict[str, Any]] = {}
    for name, use in calibration.uses.items():
        uses[name] = {"kind": use.kind, "rows": use.rows, "cols": use.cols, "tokens": use.tokens}
        for part in TENSORS:
            tensor = getattr(use, part)
            if tensor is not None:
                key = keys.setdefault(id(tensor), f"{name}.{part}")
                tensors[key] = tensor.contiguous()
                uses[name][part] = key
    facts = {f.name: getattr(calibration, f.name) for f in dataclasses.fields(calibration) if f.name != "uses"}
    header = json.dumps({"format_version": FORMAT_VERSION, **facts, "uses": uses})
    draft = path.with_name(f".{path.name}.tmp")
    try:
        save_file(tensors, str(draft), metadata={HEADER: header})
        draft.replace(path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"the calibration cannot be written to {str(path)!r}: {error}") from error
    finally:
        draft.unlink(missing_ok=True)


def load_calibration(file: str | Path) -> Calibration:
    """The calibration that `Calibration.save` wrote; `check` says whether it is of a given model.

    Raises:
        CalibrationError: the file is missing, damaged, of a newer version or something else.
    """
    path = Path(file).expanduser()
    try:
        with safe_open(str(path), framework="pt") as opened:
            header = (opened.metadata() or {}).get(HEADER)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()} if header else {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CalibrationError(f"{str(path)!r} cannot be read as a calibration: {error}") from error
    if header is None:
        raise CalibrationError(f"{str(path)!r} is no calibration; `compresskit calibrate` writes one")
    facts = json.loads(header)
    version = facts.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise CalibrationError(f"{str(path)!r} has format version {version!r}, this release reads {FORMAT_VERSION}")
    try:
        uses = {name: _use(name, entry, tensors) for name, entry in facts.pop("uses").items()}
        lists: dict[str, Any] = {name: tuple(facts.pop(name)) for name in ("unreached", "unmasked")}
        return Calibration(uses=uses, **lists, **facts)
    except (AttributeError, KeyError, TypeError) as error:
        raise CalibrationError(f"the header of {str(path)!r} is damaged: {error}") from error


def _use(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Use:
    parts = {part: tensors[entry[part]] for part in TENSORS if part in entry}
    use = Use(**{**entry, **parts})
    width = use.cols if use.kind == "embedding" else use.rows
    wanted: dict[str, set[tuple[int, ...]]] = {
        "inputs": {(use.cols, use.cols), (use.cols,)},
        "mean": {(use.cols,)},
        "counts": {(use.rows,)},
        "gradients": {(width, width), (width,)},
    }
    for part, tensor in parts.items():
        if tuple(tensor.shape) not in wanted[part]:
            raise CalibrationError(f"{part} of {name!r} is {tuple(tensor.shape)}, its weight {use.rows} x {use.cols}")
    return use
