"""Writing one file of text: whole or not at all, and never over another one unless that is asked for."""

from pathlib import Path


def check_file(path: Path, *, force: bool, kind: str) -> None:
    """Raise OutputError if the file could not be written there; before the work, not after it."""
    from compresskit.errors import OutputError

    if path.is_dir():
        raise OutputError(f"{str(path)!r} is a folder; give the name of a {kind} file")
    if path.exists() and not force:
        raise OutputError(f"{str(path)!r} exists; --force replaces it")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{str(path)!r} cannot be written: there is no folder {str(path.parent)!r}")


def write_file(path: Path, text: str) -> None:
    """Write the file in one step.

    Raises:
        OutputError: it cannot be written; what was there before is untouched.
    """
    from compresskit.errors import OutputError

    draft = path.with_name(f".{path.name}.tmp")
    try:
        draft.write_text(text, "utf-8")
        draft.replace(path)
    except OSError as error:
        raise OutputError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error
    finally:
        draft.unlink(missing_ok=True)
