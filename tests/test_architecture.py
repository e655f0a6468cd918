"""The shape of the code: who may import whom, how long a file may be, and what is never used."""

import ast
import importlib
import pathlib

import pytest

import compresskit

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "compresskit"
PRODUCT = ("compresskit", "compresskit_cli", "benchmarks")
MAX_LINES = 400

LAYERS = {
    "errors": set(),
    "version": set(),
    "memory": set(),
    "options": {"errors"},
    "registration": {"errors", "options"},
    "core": {"errors", "options", "registration"},
    "decompositions": {"errors", "core"},
    "testing": {"errors", "core", "machines"},
    "tables": {"errors", "registration"},
    "machines": {"errors", "registration", "core", "tables"},
    "surgery": {"errors", "options", "core", "machines"},
    "texts": {"errors"},
    "calibration": {"errors", "options", "core", "surgery", "texts"},
    "hub": {"errors", "version", "core", "surgery"},
    "distill": {"errors", "options", "registration", "core"},
    "tasks": {"errors", "hub", "distill", "texts"},
    "api": {"errors", "core", "machines", "surgery", "hub", "calibration"},
    "recipes": {
        "errors",
        "tables",
        "options",
        "registration",
        "core",
        "machines",
        "surgery",
        "hub",
        "calibration",
        "distill",
        "tasks",
        "api",
    },
}
"""What each part of compresskit may import from the others; `__init__` collects the public names from all."""

PUBLIC_MODULES = (
    "compresskit",
    "compresskit.calibration",
    "compresskit.distill",
    "compresskit.errors",
    "compresskit.hub",
    "compresskit.machines",
    "compresskit.recipes",
    "compresskit.tasks",
    "compresskit.testing",
)
"""Where compresskit_cli and benchmarks find names."""

TASKS = "tasks"
"""It uses transformers' Trainer, auto classes and tokenizers; opening and writing checkpoints is the hub's."""

UNSAFE_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def python_files(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def relative(path):
    return str(path.relative_to(ROOT))


def imports(source):
    """(line, module, name or None) of every import, those inside functions included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, module, alias.name) for alias in node.names)


def part_of(module):
    """The part of compresskit that a module belongs to: `compresskit.core.lazy` -> `core`."""
    return module.split(".")[1] if module.startswith("compresskit.") else module


def wrong_layers(source, part):
    """Imports that point against the arrows."""
    for line, module, name in imports(source):
        if module.startswith("."):
            yield f"line {line}: relative import of {module}"
        elif module.split(".")[0] == "compresskit" and (target := part_of(module)) not in LAYERS[part] | {part}:
            yield f"line {line}: {part} imports {target}" + (f" ({name})" if name else "")


def private_imports(source):
    """Imports of compresskit that are not of public names."""
    for line, module, name in imports(source):
        if module.split(".")[0] != "compresskit":
            continue
        if module not in PUBLIC_MODULES:
            yield f"line {line}: {module} is not public"
        elif name is not None and name not in public_names(module):
            yield f"line {line}: {module}.{name} is not public"


def public_names(module):
    loaded = importlib.import_module(module)
    return set(getattr(loaded, "__all__", [name for name in vars(loaded) if not name.startswith("_")]))


def unsafe_uses(source):
    """Imports of pickle and its kin, and calls of torch.load."""
    for line, module, name in imports(source):
        if module.split(".")[0] in UNSAFE_MODULES or (module, name) == ("torch", "load"):
            yield f"line {line}: imports {module}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr == "load" and ast.unparse(node.value) == "torch":
            yield f"line {node.lineno}: torch.load"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield f"line {node.value.lineno}: allow_pickle"


TRAINER = ("Trainer", "TrainerCallback", "TrainerControl", "TrainerState", "TrainingArguments")


def loading_machinery(source):
    """Imports of transformers other than Conv1D, which stores its weight transposed, PreTrainedModel and Trainer."""
    for line, module, name in imports(source):
        harmless = {("transformers.pytorch_utils", "Conv1D"), ("transformers", "PreTrainedModel")}
        harmless |= {("transformers", name) for name in TRAINER}
        if module.split(".")[0] == "transformers" and (module, name) not in harmless:
            yield f"line {line}: {module} {name or ''}"


@pytest.mark.parametrize("path", python_files("compresskit"), ids=relative)
def test_imports_follow_the_arrows(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        return
    assert part in LAYERS, f"{part} is new: say in LAYERS what it may import"
    assert list(wrong_layers(path.read_text(), part)) == []


@pytest.mark.parametrize("path", python_files("compresskit_cli", "benchmarks"), ids=relative)
def test_the_command_line_and_the_benchmarks_use_public_names_only(path):
    assert list(private_imports(path.read_text())) == []


@pytest.mark.parametrize("path", python_files("compresskit"), ids=relative)
def test_only_the_hub_knows_how_transformers_loads(path):
    if path.relative_to(PACKAGE).parts[0] not in ("hub", TASKS):
        assert list(loading_machinery(path.read_text())) == []


@pytest.mark.parametrize("path", python_files(*PRODUCT, "tests"), ids=relative)
def test_no_file_is_long(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", python_files(*PRODUCT), ids=relative)
def test_nothing_is_unpickled(path):
    assert list(unsafe_uses(path.read_text())) == []


def test_public_names_exist_and_are_no_modules():
    assert len(set(compresskit.__all__)) == len(compresskit.__all__)
    for name in compresskit.__all__:
        assert not isinstance(getattr(compresskit, name), type(ast)), f"{name} is a module"


@pytest.mark.parametrize(
    ("source", "part", "found"),
    [
        ("from compresskit.surgery.plan import Plan", "core", ["line 1: core imports surgery (Plan)"]),
        ("def f():\n    import compresskit.hub.load", "surgery", ["line 2: surgery imports hub"]),
        ("from compresskit import compress", "core", ["line 1: core imports compresskit (compress)"]),
        ("from ..surgery import plan", "core", ["line 1: relative import of ..surgery"]),
        ("from compresskit.decompositions.svd import SVD", "surgery", ["line 1: surgery imports decompositions (SVD)"]),
        ("from compresskit.core.lazy import LazyWeight\nimport compresskit_other", "core", []),
    ],
)
def test_wrong_directions_are_found(source, part, found):
    assert list(wrong_layers(source, part)) == found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from compresskit.core.lazy import LazyWeight", ["line 1: compresskit.core.lazy is not public"]),
        ("from compresskit import _secret", ["line 1: compresskit._secret is not public"]),
        ("import compresskit.surgery", ["line 1: compresskit.surgery is not public"]),
        ("import compresskit\nfrom compresskit import Kronecker\nfrom compresskit.errors import PlanError", []),
    ],
)
def test_private_imports_are_found(source, found):
    assert list(private_imports(source)) == found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", ["line 1: imports pickle"]),
        ("from pickle import loads", ["line 1: imports pickle"]),
        ("import torch\nx = torch.load('a')", ["line 2: torch.load"]),
        ("from torch import load", ["line 1: imports torch"]),
        ("import numpy\nnumpy.load('a', allow_pickle=True)", ["line 2: allow_pickle"]),
        ("import json, torch\njson.load(f)\ntorch.save(1, 'a')", []),
    ],
)
def test_unsafe_loading_is_found(source, found):
    assert list(unsafe_uses(source)) == found


def test_loading_machinery_is_found():
    source = "from transformers.quantizers import HfQuantizer\nfrom transformers.pytorch_utils import Conv1D"
    assert list(loading_machinery(source)) == ["line 1: transformers.quantizers HfQuantizer"]
