"""Writing a checkpoint so that it is complete or not there at all."""

import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel

from compresskit.errors import CheckpointError, OutputError
from compresskit.hub.names import Model

COMPANIONS = re.compile(
    r"(tokenizer.*|vocab.*|merges.*|.*\.model|.*\.tiktoken|special_tokens_map\.json|added_tokens\.json|"
    r"(pre)?processor_config\.json|.*_preprocessor_config\.json|generation_config\.json|chat_template.*|"
    r"modules\.json|config_sentence_transformers\.json|sentence_.*_config\.json)"
)
"""Files beside the weights that a user of the model needs, and that compression does not change."""
FOLDERS = re.compile(r"\d+_(?!Transformer).*|additional_chat_templates")
"""Modules of sentence-transformers after the encoder (pooling, a dense layer with its weights), templates."""


def check_output(output: str | Path, *, force: bool) -> None:
    """Raise OutputError unless a checkpoint can be written there; for use before hours of work, too.

    Args:
        force: replace an earlier checkpoint; a folder that holds anything else is never replaced.
    """
    path = Path(output).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file; give the name of a folder")
    if path.is_dir() and any(path.iterdir()):
        if not force:
            raise OutputError(f"{path} exists and is not empty; choose another folder or force its replacement")
        if not (path / "config.json").is_file():
            raise OutputError(f"{path} holds something else than a model (it has no config.json) and is not replaced")
    parent = next(ancestor for ancestor in path.parents if ancestor.exists())
    if not parent.is_dir():
        raise OutputError(f"{path} cannot be made: {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path} cannot be made: {parent} is not writable")


def save_checkpoint(
    model: Model,
    source: Path | None,
    output: str | Path,
    *,
    force: bool = False,
    card: str | None = None,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Write a model folder in one step: whatever goes wrong, an earlier one stays and no half of a new one is left.

    Args:
        model: a transformers model, marked by `mark_compressed` if it is compressed.
        source: the folder it came from: tokenizer and other small files are copied; None: there are none.
        force: replace an earlier checkpoint, once the new one is complete.
        card: text of README.md.
        texts: further files by name.

    Returns:
        The folder.

    Raises:
        OutputError: the folder exists, is not writable, or there is no space left.
        CheckpointError: not a transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        raise CheckpointError(
            f"only transformers models have checkpoints of this kind, this is a {type(model).__name__}; use torch.save "
            "or safetensors for its state_dict"
        )
    check_output(output, force=force)
    target = Path(output).expanduser().resolve()
    try:
        with _staging(target, size_bytes=model.get_memory_footprint()) as staged:
            model.save_pretrained(staged)
            if source is not None:
                _copy_companions(source, staged)
            for name, text in {**(texts or {}), **({} if card is None else {"README.md": card})}.items():
                (staged / name).write_text(text, encoding="utf-8")
            _replace(target, staged)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{target} could not be written: {error}. What was there before is untouched") from error
    return target


@contextmanager
def _staging(target: Path, *, size_bytes: int) -> Iterator[Path]:
    """A new empty folder beside `target`, gone afterwards, as are parents that were made for nothing."""
    made = [parent for parent in target.parents if not parent.exists()]
    staged = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        staged.mkdir(parents=True)
        free = shutil.disk_usage(staged).free
        if free < size_bytes:
            raise OutputError(
                f"no space left for {target}: the model takes {size_bytes / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free"
            )
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        for parent in made:  # innermost first
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def _replace(target: Path, staged: Path) -> None:
    """Put `staged` where `target` is; if that fails, the old one is put back."""
    old = staged.with_suffix(".old")
    try:
        if target.exists():
            target.rename(old)
        staged.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _copy_companions(source: Path, staged: Path) -> None:
    for path in sorted(source.iterdir()):
        copy = staged / path.name
        if path.is_file() and COMPANIONS.fullmatch(path.name) and not copy.exists():
            shutil.copyfile(path, copy)
        elif path.is_dir() and FOLDERS.fullmatch(path.name):
            shutil.copytree(path, copy, copy_function=shutil.copyfile)
