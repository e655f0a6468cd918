"""`--compare-by`: plans of methods that choose are compared by the score on a task."""

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
    by = ("--compare-by", "sts", "--compare-data", pairs)
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
    cli("compress", "bert", *METHOD, "--compare-by", "sts", "--compare-data", pairs, "-o", "a")
    asked = cli("inspect", "a", "--json").json()["provenance"]["asked"]
    assert asked["compare_by"] == "sts"
    assert asked["compare_data"] == "pairs"
    assert asked["compare_split"] == "dev"


@pytest.mark.parametrize(
    ("arguments", "match", "status"),
    [
        (("--compare-by", "stss"), "no task is called 'stss'; did you mean 'sts'", 1),
        (("--compare-by", "sts", "--compare-data", "nowhere"), "nowhere", 1),
        (("--compare-by", "sts", "--compare-data", "pairs", "--compare-split", "tset"), "tset", 1),
        (("--compare-by", "sst2", "--compare-data", "pairs"), "sentence", 1),
        (("--compare-data", "pairs"), "--compare-data need --compare-by TASK", 2),
        (("--compare-split", "dev"), "--compare-split need --compare-by TASK", 2),
        (("--compare-by", "sts", "--compare", "--calibrate", "pairs"), "give one of them", 2),
        (("--compare-by", "sts", "--plan", "plan.json"), "--compare-by has no say in it", 2),
    ],
)
def test_what_cannot_be_is_explained(
    fails: Fails, pairs: Path, arguments: tuple[str, ...], match: str, status: int
) -> None:
    method = () if "--plan" in arguments else METHOD
    fails("compress", "bert", *method, *arguments, match=match, status=status)


@pytest.mark.parametrize("command", ["compress", "plan"])
def test_a_method_that_does_not_choose_is_not_compared(fails: Fails, pairs: Path, command: str) -> None:
    asked = (command, "bert", "-m", "svd", "--ratio", "2", "--compare-by", "sts", "--compare-data", "pairs")
    fails(*asked, match="svd does not", status=2)


def test_a_model_without_the_head_is_refused(fails: Fails, work: Path, pairs: Path) -> None:
    (work / "pairs" / "dev.tsv").write_text("sentence\tlabel\na model\t1\nsmall\t0\n")
    fails("compress", "bert", *METHOD, "--compare-by", "sst2", "--compare-data", "pairs", match="no head for sst2")
