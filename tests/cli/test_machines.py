"""`compresskit machines`, and plans for one of them."""

import json

import pytest

from compresskit.machines import machine, measure_machine
from tests.cli.conftest import Cli, Fails


def test_machines_are_listed_and_printed(cli: Cli) -> None:
    listed = json.loads(cli("machines", "--json").out)
    assert listed[0]["name"] == "cpu"
    assert {row["name"]: row["about"] for row in listed}["h100"] == machine("h100").about
    table = cli("machines").out
    assert all(row["about"] in table for row in listed)
    assert cli("machines", "h100").out.startswith('name = "h100"\n')
    assert json.loads(cli("machines", "cpu", "--json").out)["dense"]["gemm_bytes_per_s"] == 67e9


def test_this_machine_is_measured_and_planned_for(cli: Cli, work, monkeypatch) -> None:
    def quickly(name, dtype, **how):
        return measure_machine(name, dtype, **how, methods=("svd",), shapes=((64, 96),), rounds=1)

    monkeypatch.setattr("compresskit.machines.measure.measure_machine", quickly)
    mine = work / "mine.toml"
    done = cli("machines", "--measure", "--dtype", "bfloat16", "-o", mine)
    assert done.status == 0, done.err
    assert "slower though expected faster" in done.out
    assert f"compresskit compress ... --machine {mine}" in done.out
    assert (machine(mine).name, machine(mine).dtype) == ("mine", "bfloat16")
    planned = cli("plan", "bert", "-m", "svd", "--ratio", "2", "--machine", mine, "--tokens", "7", "--allow-slower")
    assert planned.status == 0, planned.err
    assert "(7 tokens on mine: " in planned.out
    assert "Note: times are expected for bfloat16, this model computes in float32" in planned.out
    fit = json.loads(cli("machines", "--measure", "--json").out)
    assert fit["closeness"]["low-rank"]["number"] > 0


def test_a_compressed_model_says_for_what_it_was_planned(cli: Cli, work) -> None:
    out = work / "other"
    arguments = ("compress", "bert", "-m", "svd", "--ratio", "2", "--machine", "cpu-kernel", "-o", out)
    done = cli(*arguments, "--no-measure")
    assert done.status == 0, done.err
    assert "128 tokens on cpu-kernel: two cores" in done.out
    assert "Note: times are expected" not in done.out
    config = json.loads((out / "config.json").read_text("utf-8"))
    assert "cpu-kernel" in json.dumps(config)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("machines", "cpu", "--measure"), 2, "takes no name of another"),
        (("machines", "--dtype", "bfloat16"), 2, "--dtype and --device belong to --measure"),
        (("machines", "-o", "x.toml"), 2, "--output belongs to one machine"),
        (("plan", "bert", "-m", "svd", "--ratio", "2", "--tokens", "0"), 2, "0 is not in the range x>=1"),
        (("plan", "bert", "-m", "svd", "--ratio", "2", "--machine", "cpu-b16"), 1, "did you mean 'cpu-bf16'"),
        (("machines", "h10"), 1, "did you mean 'h100'"),
        (("machines", "cpu", "-o", "bert/config.json"), 1, "--force"),
        (("machines", "--measure", "--device", "tpu"), 1, "device is cpu, or cuda where there is one; got 'tpu'"),
    ],
)
def test_what_makes_no_sense_is_refused(fails: Fails, arguments, status: int, message: str) -> None:
    fails(*arguments, match=message, status=status)
