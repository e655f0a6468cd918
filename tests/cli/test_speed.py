"""Expected and measured speed-ups: `--speed`, and the forward pass that `compress` times."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import compresskit
from compresskit_cli import speed
from tests.cli.conftest import Cli, fingerprint
from tests.models import bert_config, build


def run_compress(cli: Cli, *arguments: object, model: str = "bert", output: str = "out") -> Any:
    """The report of `compresskit compress MODEL ... --json`."""
    outcome = cli("compress", model, *arguments, "-o", output, "--json")
    assert outcome.status == 0, outcome.err
    return outcome.json()


def test_speed_bounds_the_expected_speed_up(cli: Cli, work: Path) -> None:
    def speedup(*more: str) -> float:
        report = run_compress(cli, "-m", "svd", "--ratio", "3", "--include", "encoder.*", *more, "--force")
        times = [sum(site[f"time_ns_{when}"] for site in report["sites"]) for when in ("before", "after")]
        assert report["expected_speedup"] == times[0] / times[1]
        return float(report["expected_speedup"])

    assert speedup() < 3
    outcome = cli("compress", "bert", "-m", "svd", "--ratio", "3", "--speed", "100", "-o", "fast")
    assert outcome.status == 1
    assert re.search(
        r"speed 100 cannot be .* the highest expected speed-up that these rules reach is \d", outcome.err
    ), outcome.err
    config = bert_config()
    config.hidden_size, config.intermediate_size = 384, 768
    transformers.BertModel(config).save_pretrained(work / "big")
    report = run_compress(
        cli, "-m", "svd", "--ratio", "3", "--speed", "3", "--include", "encoder.*", model="big", output="big-out"
    )
    assert report["expected_speedup"] >= 3


def test_the_speed_up_is_measured_if_it_is_cheap_or_asked_for(
    cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = run_compress(cli, "-m", "svd", "--ratio", "3")["measured"]
    assert set(measured) == {"speedup", "batch", "length", "rounds", "device", "kernel"}
    assert 0 < measured["speedup"] < 100
    assert (measured["batch"], measured["length"], measured["device"]) == (1, 40, "cpu")
    assert 3 <= measured["rounds"] <= 15
    assert measured["kernel"] is False  # conftest gives an empty cache
    report = run_compress(cli, "-m", "svd", "--ratio", "3", "--no-measure", "--force")
    assert report["measured"] == {"skipped": "--no-measure"}
    monkeypatch.setattr(speed, "CHEAP_S", 0.0)
    report = run_compress(cli, "-m", "svd", "--ratio", "3", "--force")
    assert report["measured"] == {"skipped": "it would take longer than 0 s; --measure does it"}
    outcome = cli("compress", "bert", "-m", "svd", "--ratio", "3", "-o", "out", "--force")
    assert "not measured: it would take longer than 0 s; --measure does it" in outcome.out
    outcome = cli("compress", "bert", "-m", "svd", "--ratio", "3", "-o", "out", "--force", "--measure")
    assert re.search(r"measured speed-up of the model +\d+\.\d\d \(forward pass, 1 x 40 tokens on cpu", outcome.out)
    assert "median of 15 rounds; compresskit kernels --build may make it faster)" in outcome.out


def test_measuring_leaves_the_saved_model_as_it_is(cli: Cli, work: Path) -> None:
    for output, option in (("one", "--measure"), ("two", "--no-measure")):
        run_compress(cli, "-m", "svd", "--ratio", "4", option, output=output)
    one, two = (fingerprint(work / output) for output in ("one", "two"))
    assert {name for name in one if one[name] != two[name]} == {"README.md"}  # its title


@pytest.mark.parametrize("family", ["bert-mlm", "gpt2", "t5", "llama"])
def test_text_models_of_each_kind_are_measured(family: str) -> None:
    model = build(family)
    state = torch.get_rng_state()
    dense = speed.time_dense(model, True)
    torch.testing.assert_close(torch.get_rng_state(), state)
    compresskit.compress(model, "svd", ratio=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measured = speed.speedup(dense, model)
    assert (measured["rounds"], measured["batch"], measured["device"]) == (15, 1, "cpu")
    assert 0 < measured["speedup"] < 100
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_a_model_of_images_is_not_measured() -> None:
    model = build("vit")
    dense = speed.time_dense(model, True)
    assert speed.speedup(dense, model) == {"skipped": dense.skipped}
    assert dense.skipped == "the forward pass of ViTModel takes more than texts"
