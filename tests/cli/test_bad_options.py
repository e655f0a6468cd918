"""What a user can type wrong: explained, with the right status, and nothing is touched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import compresskit
from tests.cli.conftest import Cli, Fails

START = ("compress", "bert", "-o", "small", "--force")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], r"say what to do: --method METHOD \(see `compresskit methods`\) or --rule PATTERN=METHOD"),
        (["--ratio", "4"], "say what to do: --method METHOD"),
        (["-m", "svd", "--ratio", "4", "--keep", "0.2"], "--ratio, --params and --keep say the same thing: give one"),
        (["-m", "svd", "--ratio", "4", "--params", "9k"], "say the same thing: give one"),
        (["-m", "svd", "--keep", "0.2", "--params", "9k"], "say the same thing: give one"),
        (["--rule", "*=svd", "--set", "rank=4"], "--set and --include belong to --method, which is missing"),
        (["--rule", "*=svd", "--include", "*key"], "--set and --include belong to --method, which is missing"),
        (["-m", "svd", "--set", "rank"], "--set takes KEY=VALUE, got 'rank'"),
        (["-m", "svd", "--set", "rank="], "--set takes KEY=VALUE, got 'rank='"),
        (["--rule", "svd"], "--rule takes PATTERN=METHOD or PATTERN=METHOD:KEY=VALUE,..., got 'svd'"),
        (["--rule", "*=svd:rank"], "--rule takes KEY=VALUE, got 'rank'"),
        (["-m", "svd", "--params", "5,7Q"], "'5,7Q' is not a count of at least 1; write 5700000, 5.7M, 350k or 1.2B"),
        (["-m", "svd", "--params", "0"], "'0' is not a count of at least 1"),
        (["-m", "svd", "--params", "-5k"], "'-5k' is not a count of at least 1"),
        (["-m", "svd", "--params", "nan"], "'nan' is not a count of at least 1"),
        (["-m", "svd", "--params", "infm"], "'infm' is not a count of at least 1"),
        (["-m", "svd", "--ratio", "4", "--max-macs", "0"], "'0' is not a count of at least 1"),
        (["-m", "svd", "--ratio", "4", "--seed", "-1"], "-1 is not in the range 0<=x<="),
        (["-m", "svd", "--ratio", "4", "--seed", str(2**64)], "is not in the range 0<=x<="),
    ],
)
def test_wrong_usage_is_seen_before_anything_is_read(arguments: list[str], match: str, fails: Fails) -> None:
    fails(*START, *arguments, match=match, status=2)
    fails("plan", "no-such-folder/", *arguments, match=match, status=2)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["-m", "svdd", "--ratio", "4"], "no decomposition is called 'svdd'; did you mean 'svd'"),
        (["--rule", "*=kroneker", "--ratio", "4"], "no decomposition is called 'kroneker'; did you mean 'kronecker'"),
        (["-m", "svd", "--set", "rnak=4"], r"svd has no option 'rnak'; its options: rank \(integer or none\), solver"),
        (["-m", "svd", "--set", "rank=four"], "option 'rank' takes integer, got 'four'"),
        (["-m", "svd", "--set", "rank=-4"], "rank is a count, at least 1; got -4"),
        (["--rule", "*=svd:solver=fast"], "option 'solver' takes auto or exact or randomized, got 'fast'"),
        (["-m", "svd", "--ratio", "0.5"], "ratio is original / compressed parameters, a number of at least 1; got 0.5"),
        (["-m", "svd", "--ratio", "-3"], "a number of at least 1; got -3"),
        (["-m", "svd", "--ratio", "nan"], "a number of at least 1; got nan"),
        (["-m", "svd", "--ratio", "inf"], "a number of at least 1; got inf"),
        (["-m", "svd", "--ratio", "1e300"], "the highest ratio that these rules reach is .* Most is held by: "),
        (["-m", "svd", "--ratio", "40"], "the highest ratio that these rules reach is .* Most is held by: embeddings"),
        (
            ["-m", "svd", "--keep", "0"],
            "keep is the share of the parameters that is kept, above 0 and at most 1; got 0",
        ),
        (["-m", "svd", "--keep", "1.5"], "above 0 and at most 1; got 1.5"),
        (["-m", "svd", "--keep", "nan"], "above 0 and at most 1; got nan"),
        (["-m", "svd", "--params", "5.7M"], "params is 1 to 48,144, the model's own number; got 5,700,000"),
        (["-m", "svd"], "nothing to choose by: give ratio, params or keep"),
        (["-m", "svd", "--ratio", "4", "--max-macs", "1"], "1 multiply-adds per token cannot be kept .* rules reach"),
        (
            ["-m", "svd", "--ratio", "4", "--include", "*qeury"],
            r"match no layer: \*qeury. Layers look like: embeddings",
        ),
        (["-m", "svd", "--ratio", "4", "--exclude", "*qeury"], r"these patterns match no layer: \*qeury"),
        (["--rule", "*qeury=svd", "--ratio", "4"], r"these patterns match no layer: \*qeury"),
        (["-m", "svd", "--ratio", "4", "--include", "re:("], "'re:\\(' is not a regular expression"),
        (["-m", "svd", "--ratio", "4", "--include", ""], "an empty pattern matches nothing"),
        (["-m", "svd", "--ratio", "4", "--exclude", "*"], "nothing is left to compress: .*excluded by"),
        (["-m", "svd", "--ratio", "4", "--include", "*token_type*"], "match only what is left alone: .*fewer than 16"),
        (
            ["-m", "svd", "--ratio", "4", "--device", "gpu"],
            "device 'gpu' cannot be used here: Expected one of cpu, cuda",
        ),
        (["-m", "svd", "--ratio", "4", "--device", "cuda:999"], "device 'cuda:999' cannot be used here: "),
        (["-m", "svd", "--ratio", "4", "--device", "meta"], "device 'meta' holds no values"),
        (["-m", "svd", "--ratio", "4", "--revision", "v2"], r"bert is a folder; a revision \(v2\) belongs to a hub id"),
    ],
)
def test_what_cannot_be_done_is_explained(arguments: list[str], match: str, fails: Fails) -> None:
    fails(*START, *arguments, match=match)
    fails("plan", "bert", *arguments, "--json", match=match)


@pytest.mark.parametrize("command", [["compress", "-m", "svd", "--ratio", "4"], ["plan", "-m", "svd"], ["inspect"]])
def test_a_model_that_is_not_there(
    command: list[str], fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    fails(*command, "./bret", match=r"there is no folder bret; did you mean (\./)?bert\?$")
    fails(
        *command, "owner/model", match=r"'owner/model' is not a folder, and the hub could not be asked for it\. Check"
    )
    fails(
        *command, "bret", match=r"'bret' is not a folder, .* did you mean bert\? Check the connection \(HF_HUB_OFFLINE"
    )
    fails(*command, "bert/config.json", match="bert/config.json is a file; give the folder that holds config.json")


def test_a_hub_that_cannot_be_reached(work: Path, tmp_path: Path) -> None:
    environment = os.environ | {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path / "cache"),
        "PYTHONPATH": str(Path(compresskit.__file__).parent.parent),
    }
    command = [sys.executable, "-m", "compresskit_cli", "inspect", "owner/model"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(
        "Error: 'owner/model' is not a folder, and the hub could not be asked for it. Check"
    )
    assert len(result.stderr.splitlines()) == 1


def test_counts_are_read_as_people_write_them(cli: Cli, work: Path) -> None:
    texts = ("20000", "20k", "0.02M", "20_000", "20,000", "0.00002B")
    plans = [cli("plan", "bert", "-m", "svd", "--params", text, "--json").out for text in texts]
    assert len(set(plans)) == 1
