"""`--judge`: whole models are compared and searched by the score on a task."""

import math
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Cli, Fails

METHOD = ("-m", "auto", "--set", "methods=svd+monarch+tucker", "--ratio", "2")


@pytest.fixture
def pairs(work: Path) -> Path:
    """Rows as STS-B has them."""
    lines = ["sentence1\tsentence2\tscore"]
    lines += [
        f"{a}\t{b}\t{n % 6}"
        for n, (a, b) in enumerate(
            (a, b) for a in ("a", "small model", "a model") for b in ("model", "small", "a small", "small a model")
        )
    ]
    (work / "pairs").mkdir()
    (work / "pairs" / "dev.tsv").write_text("\n".join(lines) + "\n")
    return work / "pairs"


def test_the_best_by_the_score_is_made(cli: Cli, work: Path, pairs: Path) -> None:
    by = ("--compare", "--judge", "sts", "--judge-data", pairs)
    made = cli("compress", "bert", *METHOD, *by, "-o", "a", "--json").json()
    assert "together" in made["compared"]
    assert len(made["compared"]) > 1
    taken = next(iter(made["compared"].values()))
    assert taken == min(made["compared"].values())
    scored = cli("evaluate", "a", "--task", "sts", "--data", pairs, "--json").json()
    assert 1 - next(iter(scored["metrics"].values())) == pytest.approx(taken, abs=1e-4)
    said = cli("plan", "bert", *METHOD, *by).out
    assert "Whole models compared, each wrong by" in said


def test_the_checkpoint_remembers_the_task(cli: Cli, work: Path, pairs: Path) -> None:
    cli("compress", "bert", *METHOD, "--compare", "--judge", "sts", "--judge-data", pairs, "-o", "a")
    asked = cli("inspect", "a", "--json").json()["provenance"]["asked"]
    assert asked["judge"] == "sts"
    assert asked["judge_data"] == "pairs"
    assert asked["judge_split"] == "dev"


@pytest.mark.parametrize("model", ["gpt2", "mlm"])
def test_language_models_are_judged_by_their_words(cli: Cli, work: Path, models: Path, model: str) -> None:
    """Both have the same tokenizer, with a mask: the model decides whether words are masked."""
    (work / "dev.txt").write_text("a small model a model small a\nmodel a a small small model\n" * 4)
    data = ("--task", "perplexity", "--data", work / "dev.txt")
    by = ("--compare", "--judge", "perplexity", "--judge-data", work / "dev.txt")
    how = (*METHOD[:-1], "1.3")
    shutil.copytree(models / model, work / model)
    made = cli("compress", model, *how, *by, "-o", "a", "--json").json()
    found = cli("evaluate", "a", *data, "--against", model, "--json").json()
    assert -found["metrics"]["log_likelihood"] == pytest.approx(next(iter(made["compared"].values())), abs=1e-4)
    assert found["metrics"]["perplexity"] == pytest.approx(math.exp(-found["metrics"]["log_likelihood"]))
    assert found["against"]["agreement"]["mean_difference"] > 0
    assert "perplexity" in cli("evaluate", "a", *data).out


def test_what_layers_count_is_searched_without_texts(cli: Cli, work: Path, pairs: Path) -> None:
    by = ("--judge", "sts", "--judge-data", pairs)
    plain = cli("compress", "bert", "-m", "svd", "--ratio", "2", "-o", "plain", "--json").json()
    how = ("bert", "-m", "svd", "--ratio", "2", "--sensitivity", "searched", *by)
    said = cli("compress", *how, "-o", "searched").out
    found = cli("plan", *how, "--json").json()["searched"]
    assert found
    assert all(f"{factor:g} times for {shape}" in said for shape, factor in found.items())
    scores = {
        name: cli("evaluate", name, "--task", "sts", "--data", pairs, "--json").json()["metrics"]["spearman"]
        for name in ("plain", "searched")
    }
    assert scores["searched"] >= scores["plain"] - 1e-6
    assert plain["calibration"] is None
    asked = cli("inspect", "searched", "--json").json()["provenance"]["asked"]
    assert (asked["sensitivity"], asked["judge"]) == ("searched", "sts")


@pytest.mark.parametrize(
    ("arguments", "match", "status"),
    [
        (("--compare", "--judge", "stss"), "no task is called 'stss'; did you mean 'sts'", 1),
        (("--compare", "--judge", "sts", "--judge-data", "nowhere"), "nowhere", 1),
        (("--compare", "--judge", "sts", "--judge-data", "pairs", "--judge-split", "tset"), "tset", 1),
        (("--compare", "--judge", "sst2", "--judge-data", "pairs"), "sentence", 1),
        (("--judge-data", "pairs"), "--judge-data need --judge TASK", 2),
        (("--judge-split", "dev"), "--judge-split need --judge TASK", 2),
        (("--judge", "sts"), "--compare and --sensitivity searched go by: give one", 2),
        (("--judge", "sts", "--sensitivity", "measured"), "--sensitivity measured need --calibrate FILE_OR_FOLDER", 2),
        (("--compare",), "--compare need --calibrate FILE_OR_FOLDER, .* or --judge TASK", 2),
        (("--compare", "--judge", "sts", "--plan", "plan.json"), "--compare has no say in it", 2),
    ],
)
def test_what_cannot_be_is_explained(
    fails: Fails, pairs: Path, arguments: tuple[str, ...], match: str, status: int
) -> None:
    method = () if "--plan" in arguments else METHOD
    fails("compress", "bert", *method, *arguments, match=match, status=status)


@pytest.mark.parametrize("command", ["compress", "plan"])
def test_a_method_that_does_not_choose_is_not_compared(fails: Fails, pairs: Path, command: str) -> None:
    by = ("--compare", "--judge", "sts", "--judge-data", "pairs")
    fails(command, "bert", "-m", "svd", "--ratio", "2", *by, match="svd does not", status=2)


def test_a_model_without_the_head_is_refused(fails: Fails, work: Path, pairs: Path) -> None:
    (work / "pairs" / "dev.tsv").write_text("sentence\tlabel\na model\t1\nsmall\t0\n")
    by = ("--compare", "--judge", "sst2", "--judge-data", "pairs")
    fails("compress", "bert", *METHOD, *by, match="no head for it")
