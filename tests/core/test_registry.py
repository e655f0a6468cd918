"""Names, contracts and plug-ins: what may be registered, what is found, and what a wrong name is answered with."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import ClassVar

import pytest

import compresskit
from compresskit.core import registry
from compresskit.core.decomposition import Decomposition
from compresskit.core.registry import decomposition, decompositions, register
from compresskit.core.structure import Structure
from compresskit.decompositions.kronecker import Kronecker
from compresskit.decompositions.svd import SVD, LowRank
from compresskit.errors import OptionError, UnknownNameError
from tests.core.toy import Toy, ToyDecomposition
from tests.models import build

PACKAGE = pathlib.Path(compresskit.__file__).parent
TOY = (pathlib.Path(__file__).parent / "toy.py").read_text()
REGISTERED_TOY = f"{TOY}\n\nfrom compresskit.core.registry import register\n\nregister(ToyDecomposition)\n"


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_decompositions", dict(registry._decompositions))
    monkeypatch.setattr(registry, "_structures", dict(registry._structures))


def variant(base=ToyDecomposition, **attributes):
    """A frozen dataclass that differs from the sound decomposition in these attributes."""
    return dataclasses.dataclass(frozen=True)(type("Variant", (base,), attributes))


def test_the_built_in_ones_are_listed_by_name():
    known = decompositions()
    assert {"kronecker", "svd"} <= set(known)
    assert list(known) == sorted(known)
    assert known["svd"] is SVD


def test_options_are_read_from_text():
    assert decomposition("kronecker", {"terms": "3", "left": "2x4"}) == Kronecker(terms=3, left=(2, 4))
    assert decomposition("svd") == SVD()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kronekcer", "no decomposition is called 'kronekcer'; did you mean 'kronecker'\\? Known: auto, "),
        ("SVD", "no decomposition is called 'SVD'"),
        ("zzz", "no decomposition is called 'zzz'\\. Known: auto, "),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, message):
    with pytest.raises(UnknownNameError, match=message):
        decomposition(name)


def test_an_option_that_the_decomposition_refuses():
    with pytest.raises(OptionError, match="terms is a number of Kronecker products, at least 1; got 0"):
        decomposition("kronecker", {"terms": "0"})


def test_registering_makes_name_and_structures_known():
    assert register(ToyDecomposition) is ToyDecomposition
    assert decompositions()["toy"] is ToyDecomposition
    assert registry.structure_from_json({"kind": "toy", "rows": 4, "cols": 3, "rank": 2}) == Toy(4, 3, 2)
    register(ToyDecomposition)  # the same class again is no second one


@dataclasses.dataclass(frozen=True)
class Kindless(Structure):
    def validate(self): ...
    def factor_specs(self): ...
    def dense(self, factors): ...
    def matmul(self, x, factors, bias=None): ...
    def take_rows(self, index, factors): ...

    macs = lookup_macs = 0


class NotAgainADataclass(Toy):
    kind: ClassVar[str] = "bare-toy"
    extra: int


@dataclasses.dataclass(frozen=True)
class WithoutDefault(ToyDecomposition):
    bare: int


@dataclasses.dataclass(frozen=True)
class OddType(ToyDecomposition):
    odd: dict = dataclasses.field(default=None)


BAD = {
    "not a class": ("svd", "is not a subclass of Decomposition"),
    "another class": (LowRank, "is not a subclass of Decomposition"),
    "abstract": (Decomposition, "lacks analyse, menu"),
    "no name": (variant(name=""), "has no name"),
    "a name that is no text": (variant(name=3), "the name 3 is not lower case with single dashes"),
    "no summary": (variant(summary=""), "has no summary"),
    "no source": (variant(source=""), "has no source"),
    "no structures": (variant(structures=()), "has no structures"),
    "capitals": (variant(name="Toy"), "the name 'Toy' is not lower case with single dashes"),
    "double dash": (variant(name="toy--two"), "is not lower case"),
    "not a dataclass": (type("Plain", (ToyDecomposition,), {}), "is not a frozen dataclass"),
    "no default": (WithoutDefault, "option 'bare' of WithoutDefault has no default"),
    "unreadable": (OddType, "option 'odd' of OddType has type <class 'dict'>, which has no text form"),
    "foreign structure": (variant(structures=(int,)), "<class 'int'> is not a Structure with a kind"),
    "structure instance": (variant(structures=(Toy(2, 2, 1),)), "is not a Structure with a kind"),
    "no kind": (variant(structures=(Kindless,)), "Kindless'> is not a Structure with a kind"),
    "abstract structure": (
        variant(structures=(type("Half", (Structure,), {"kind": "half"}),)),
        "Half'> lacks dense, factor_specs",
    ),
    "bare structure": (variant(structures=(NotAgainADataclass,)), "NotAgainADataclass'> is not a frozen dataclass"),
}


@pytest.mark.parametrize(("cls", "message"), BAD.values(), ids=BAD)
def test_a_broken_contract_is_refused(cls, message):
    with pytest.raises(OptionError, match=message):
        register(cls)


def test_two_decompositions_of_one_name_are_refused():
    with pytest.raises(OptionError, match=r"two decompositions are called 'svd': compresskit.decompositions.svd and"):
        register(variant(name="svd"))


def test_two_classes_of_one_name_from_two_modules_are_refused():
    other = variant(name="svd")
    other.__qualname__ = "SVD"
    with pytest.raises(OptionError, match="two decompositions are called 'svd'"):
        register(other)


def test_two_structures_of_one_kind_are_refused():
    impostor = dataclasses.dataclass(frozen=True)(type("Impostor", (Toy,), {"kind": "low-rank"}))
    with pytest.raises(OptionError, match="two structures are of kind 'low-rank'"):
        register(variant(structures=(impostor,)))
    assert "toy" not in decompositions()


def run_python(code, *paths):
    """Standard output of a fresh interpreter that finds these folders first."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=paths[0]).stdout


def test_a_plug_in_is_found_by_its_entry_point(tmp_path):
    (tmp_path / "toy_plugin.py").write_text(REGISTERED_TOY)
    info = tmp_path / "toy_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[compresskit.decompositions]\ntoy = toy_plugin\n")
    code = (
        "from compresskit.core.registry import decomposition, structure_from_json\n"
        "print(type(decomposition('toy')).__module__)\n"
        "print(structure_from_json({'kind': 'toy', 'rows': 4, 'cols': 3, 'rank': 2}))\n"
    )
    assert run_python(code, tmp_path, PACKAGE.parent).split() == ["toy_plugin", "toy(rank=2)"]


def test_a_plug_in_that_cannot_be_imported_is_not_passed_over(monkeypatch):
    class Entry:
        def load(self):
            raise ImportError("No module named 'missing'")

    monkeypatch.setattr(registry, "entry_points", lambda group: [Entry()])
    registry._load_plugins.cache_clear()
    with pytest.raises(ImportError, match="missing"):
        decompositions()
    monkeypatch.undo()
    registry._load_plugins.cache_clear()


def test_one_file_dropped_into_the_package_is_a_decomposition(tmp_path):
    copied = tmp_path / "compresskit"
    shutil.copytree(PACKAGE, copied, ignore=shutil.ignore_patterns("__pycache__"))
    (copied / "decompositions" / "toy.py").write_text(REGISTERED_TOY)
    code = (
        "import compresskit.decompositions\n"
        "from compresskit.core.registry import decompositions\n"
        "from compresskit.testing import check_decomposition\n"
        "check_decomposition(decompositions()['toy'])\n"
        "print(compresskit.__file__, *decompositions())\n"
    )
    path, *names = run_python(code, tmp_path).split()
    assert pathlib.Path(path).parent == copied
    assert set(names) == {*decompositions(), "toy"}


def test_the_command_line_knows_a_dropped_file_and_its_options(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "compresskit", ignore=shutil.ignore_patterns("__pycache__"))
    ours = "analysis: ClassVar[type[ToyAnalysis]] = ToyAnalysis\n"
    ranks = "rows * cols // (rows + cols) + 1"
    text = REGISTERED_TOY.replace(ours, f"{ours}    most: int = 99\n").replace(ranks, f"min(self.most + 1, {ranks})")
    (tmp_path / "compresskit" / "decompositions" / "toy.py").write_text(text)
    build("bert").save_pretrained(tmp_path / "model")

    def command(*arguments):
        code = f"import sys; sys.argv[1:] = {list(arguments)!r}; from compresskit_cli.app import main; main()"
        return json.loads(run_python(code, tmp_path, PACKAGE.parent))

    (shown,) = [method for method in command("methods", "--json") if method["name"] == "toy"]
    assert shown["options"] == {"most": {"type": "integer", "default": "99"}}
    asked = ("compress", "model", "-m", "toy", "--ratio", "2", "--output", "small", "--json")
    report = command(*asked, "--set", "most=3")
    assert report["ratio"] >= 2
    assert {site["structure"] for site in report["sites"]} <= {f"toy(rank={rank})" for rank in (1, 2, 3)}
    assert command("inspect", "small", "--json")["ratio"] == report["ratio"]
