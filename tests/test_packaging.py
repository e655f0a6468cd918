"""What an installed package holds, beside Python's files: all that the source folders do."""

import pathlib
import sys

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("package", ["compresskit", "compresskit_cli"])
def test_files_that_are_no_python_are_installed(package):
    data = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"]
    folder = ROOT / package
    there = {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    installed = {path for pattern in data[package] for path in folder.glob(pattern)}
    assert there - installed == set()
    assert all(list(folder.glob(pattern)) for pattern in data[package])
