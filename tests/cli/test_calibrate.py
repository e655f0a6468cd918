"""`compresskit calibrate`, and `compress` and `plan` with what it saves or collects."""

import pytest

TEXT = "a small model of a small model\na model a small a model\nsmall small model a a small\n"


@pytest.fixture
def texts(work):
    (work / "texts").mkdir()
    (work / "texts" / "some.txt").write_text(TEXT)
    return "texts"


def test_moments_are_saved_and_used(cli, work, texts):
    made = cli("calibrate", "bert", "--data", texts, "-o", "moments.safetensors", "--json").json()
    assert (made["samples"], made["unreached"], made["loss"]) == (3, [], None)
    assert made["warnings"]
    assert made["provenance"]["data"] == "texts"
    options = ("-m", "svd", "--ratio", "2", "--json")
    saved = cli("compress", "bert", *options, "-o", "one", "--calibration", "moments.safetensors").json()
    collected = cli("compress", "bert", *options, "-o", "two", "--calibrate", texts).json()
    assert saved["weighted_error"] == collected["weighted_error"] > 0
    assert saved["calibration"]["tokens"] == made["tokens"]
    plain = cli("compress", "bert", *options, "-o", "three").json()
    assert (plain["weighted_error"], plain["calibration"]) == (None, None)


def test_people_are_told(cli, work, texts):
    shown = cli("calibrate", "bert", "--data", texts, "-o", "moments.safetensors", "--gradients")
    assert "Gauss-Newton" in shown.out
    assert "Warning: " in shown.out
    assert "Moments of the layers take " in shown.err
    shown = cli("compress", "bert", "-m", "svd", "--ratio", "2", "--calibration", "moments.safetensors", "-o", "out")
    assert "output error" in shown.out
    assert "relative error of outputs" in shown.out
    shown = cli("plan", "bert", "-m", "svd", "--ratio", "2", "--calibrate", texts, "--samples", "2")
    assert "of the layer's output on the samples" in shown.out


def test_a_plan_is_replayed_with_moments(cli, work, texts):
    cli("calibrate", "bert", "--data", texts, "-o", "moments.safetensors")
    moments = ("--calibration", "moments.safetensors")
    assert cli("plan", "bert", "-m", "svd", "--ratio", "2", *moments, "-o", "plan.json").status == 0
    done = cli("compress", "bert", "--plan", "plan.json", *moments, "-o", "out", "--json").json()
    assert done["weighted_error"] > 0


def test_measured_sensitivities_change_the_plan(cli, work, texts):
    options = ("plan", "bert", "-m", "svd", "--ratio", "2", "--calibrate", texts, "--json")
    hows = ("parameters", "balanced", "measured", "searched")
    plans = {how: cli(*options, "--sensitivity", how).json() for how in hows}
    sizes = {how: tuple(site["params"] for site in plan["sites"]) for how, plan in plans.items()}
    assert len(set(sizes.values())) == len(hows)
    assert all(plan["ratio"] >= 2 for plan in plans.values())


def test_layers_of_whose_outputs_little_is_left_are_named(cli, work, texts):
    options = ("compress", "bert", "-m", "kronecker", "--ratio", "12", "--calibrate", texts)
    sites = cli(*options, "-o", "plain", "--json").json()["sites"]
    lost = [s for s in sites if (s["relative_error"] if s["weighted_error"] is None else s["weighted_error"]) > 0.9]
    said = cli(*options, "-o", "out").out
    warning = f"{len(lost)} of {len(sites)} layers keep less than a fifth of the energy of their outputs"
    assert bool(lost) is (warning in said)
    assert len(lost) != len([s for s in sites if s["relative_error"] > 0.9])


def test_robust_fits_are_said_so(cli, work, texts):
    done = cli("compress", "bert", "-m", "svd", "--ratio", "2", "--calibrate", texts, "--robust", "-o", "out", "--json")
    assert done.json()["calibration"]["robust"] is True


def test_words_that_count_alike_lose_less_in_all_and_more_where_the_texts_look(cli, work, texts):
    options = (
        "compress",
        "bert",
        "-m",
        "svd",
        "--ratio",
        "1.05",
        "--include",
        "*word_embeddings*",
        "--calibrate",
        texts,
    )
    counted, even = cli(*options, "-o", "a", "--json").json(), cli(*options, "--even-words", "-o", "b", "--json").json()
    sites = [said["sites"] for said in (counted, even)]
    assert [len(found) for found in sites] == [1, 1]
    assert sites[1][0]["relative_error"] < sites[0][0]["relative_error"]


def test_a_plan_has_no_place_for_sensitivities(cli, fails, work, texts):
    cli("plan", "bert", "-m", "svd", "--ratio", "2", "-o", "plan.json")
    options = ("--plan", "plan.json", "--calibrate", texts, "--sensitivity", "measured")
    fails("compress", "bert", *options, match="--sensitivity has no say in it", status=2)
    options = ("--plan", "plan.json", "--calibrate", texts, "--compare")
    fails("compress", "bert", *options, match="--compare has no say in it", status=2)
    assert cli("compress", "bert", "--plan", "plan.json", "--calibrate", texts, "-o", "planned").status == 0


def test_a_method_that_chooses_is_compared_with_its_choices(cli, work, texts):
    options = ("bert", "-m", "auto", "--set", "methods=svd+monarch", "--ratio", "2", "--calibrate", texts)
    planned = cli("plan", *options, "--compare", "--json").json()
    made = cli("compress", *options, "--compare", "-o", "a", "--json").json()
    assert {"together", "svd"} <= set(planned["compared"])
    assert made["compared"] == pytest.approx(planned["compared"], rel=1e-3)
    said = cli("compress", *options, "--compare", "-o", "b").out
    assert said.count("(taken)") == 1
    assert "together" in said
    assert "together" in (work / "b" / "README.md").read_text()
    alone = cli("compress", *options, "-o", "c", "--json").json()
    assert alone["compared"] == {}
    said = cli("plan", *options, "--compare").out
    assert "Whole models compared, each wrong by" in said


@pytest.mark.parametrize(
    ("arguments", "match", "status"),
    [
        (("--calibrate", "x", "--calibration", "y"), "give one of them", 2),
        (("--sensitivity", "measured"), "--sensitivity measured need --calibrate", 2),
        (("--robust",), "--robust need --calibrate", 2),
        (("--compare",), "--compare need --calibrate", 2),
        (("--even-words",), "--even-words need --calibrate", 2),
        (("--samples", "3"), "--samples need --calibrate FILE_OR_FOLDER", 2),
        (("--calibrate", "nowhere"), "there is no file or folder nowhere", 1),
        (("--calibration", "bert/model.safetensors"), "is no calibration", 1),
        (("--calibration", "nowhere.safetensors"), "cannot be read as a calibration", 1),
    ],
)
def test_options_that_cannot_be(fails, arguments, match, status):
    fails("compress", "bert", "-m", "svd", "--ratio", "2", *arguments, match=match, status=status)


def test_moments_of_another_model_are_refused(cli, fails, models, work, texts):
    cli("calibrate", models / "gpt2", "--data", texts, "-o", "moments.safetensors")
    options = ("-m", "svd", "--ratio", "2", "--calibration", "moments.safetensors")
    fails("compress", "bert", *options, match="made for another model")


def test_output_that_exists_is_kept(cli, fails, work, texts):
    cli("calibrate", "bert", "--data", texts, "-o", "moments.safetensors")
    fails("calibrate", "bert", "--data", texts, "-o", "moments.safetensors", match="exists; --force replaces it")
    fails("calibrate", "bert", "--data", texts, "-o", "small", match="is a folder")
    fails("calibrate", "bert", "--data", texts, "-o", "no/m.safetensors", match="there is no folder 'no'")
    assert cli("calibrate", "bert", "--data", texts, "-o", "moments.safetensors", "--force").status == 0


def test_a_model_without_tokenizer_is_explained(fails, work, texts):
    for file in (work / "bert").iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    fails("calibrate", "bert", "--data", texts, "-o", "moments.safetensors", match="no tokenizer in")
