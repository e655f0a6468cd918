"""The tables of quality, in README.md and benchmarks/README.md, are those of the committed results."""

import itertools
import json
import re

from benchmarks.machine import ROOT
from benchmarks.runner import RESULTS

PAGES = "\n".join((ROOT / name).read_text("utf-8") for name in ("README.md", "benchmarks/README.md"))
BALANCED = tuple(f"svd refined, balanced{text}" for text in ("", ", more text", ", most text"))
TABLES = (
    (
        *("svd plain", "svd weighted", "svd weighted, balanced", "svd robust", "svd gradients", "svd sequential"),
        *("svd refined", *BALANCED, "svd gradients refined, more text", "svd-llm", "asvd"),
    ),
    (
        *("kronecker plain", "kronecker weighted", "kronecker robust", "kronecker gradients"),
        *("kronecker sequential", "kronecker sequential robust", "kronecker refined"),
        *(f"kronecker {how}, searched" for how in ("weighted", "robust", "sequential robust")),
    ),
    (
        *("tucker plain", "tucker weighted", "tucker robust", "monarch weighted", "blast weighted", "svd weighted"),
        *("auto weighted", "auto compared"),
    ),
)
FAMILIES = tuple(f"{name} weighted" for name in ("kronecker", "tucker", "monarch", "blast", "svd", "auto"))
"""Whose agreement with the dense model on the pairs of STS-B is said, before that of `auto compared`."""


def results_of(suite):
    return [json.loads(path.read_text("utf-8")) for path in sorted((RESULTS / suite).glob("*.json"))]


def rows_below(heading, first):
    section = re.search(rf"^##+ {heading}\n(.*?)(?=^##|\Z)", PAGES, re.M | re.S)
    assert section is not None
    return [line for line in section[1].splitlines() if line.startswith(tuple(f"| {cell}" for cell in first))]


def line_of(cells):
    return f"| {' | '.join(cells)} |"


def distilled_row(result):
    configuration, figures = result["configuration"], result["figures"]
    part = {"model": "whole model", "encoder": "encoder alone"}[configuration["part"]]
    scores = [figures[when]["sts_b"] for when in ("before", "after")]
    rules = "".join(f", {rule}" for rule in configuration.get("rules", ()))
    more = f", {configuration['fit']}" if "fit" in configuration else ""
    more += f", budget by {configuration['budget']}" if "budget" in configuration else ""
    more += ", searched" if configuration.get("searched") else ""
    projected = figures["training"]["projection_params"] > 0  # its states have another size
    cells = [
        f"{part}, {configuration['ratio']:g}",
        configuration["method"] + rules + (", data-aware" if configuration["calibration"] else "") + more,
        f"{figures['report']['params_after']:,}",
        f"{figures['training']['steps']:,}",
        *(f"{score:.3f}" for score in scores),
        f"{scores[1] / figures['dense']['sts_b']:.1%}",
        "-" if projected else f"{figures['after']['hidden_error']:.3f}",
    ]
    return line_of(cells)


def task_row(result):
    figures, configuration = result["figures"], result["configuration"]
    primary, settings = figures["primary"], " ".join(configuration["settings"])
    on_gpu = "device" in configuration
    said = {
        ", task stage alone": configuration["stages"] == "one",
        ", longer": "task.epochs=8" in settings,
        ", balanced": "attention-scores.weight" in settings and ("compress.calibration" in settings or on_gpu),
    }
    cells = [
        f"{configuration['task']}, {configuration['ratio']:g}",
        configuration["preset"] + "".join(text for text, true in said.items() if true),
        f"{figures['parameters']:,}",
        primary,
        *(f"{scores[primary]:.3f}" for scores in (figures["teacher"], figures["metrics"])),
        f"{figures['kept']:.1%}",
    ]
    return line_of(cells)


def data_aware_rows(results):
    """One row for each table, part and ratio; what several experiments have measured, they agree on."""
    found = {}
    for result in results:
        configuration = result["configuration"]
        if "texts" in configuration:
            continue
        part = {"whole": "whole model", "encoder": "encoder alone"}[configuration["scope"]]
        rules = "".join(f", `{rule}`" for rule in configuration.get("rules", ()))
        cells = found.setdefault(f"{part}, {configuration['ratio']:g}{rules}", {})
        counted = f", {configuration['sensitivity']}" if "sensitivity" in configuration else ""
        counted += {6144: ", more text", 12288: ", most text"}.get(configuration["samples"], "")
        for name, figures in result["figures"]["fits"].items():
            fit = name + counted
            said = f"{figures['sts_b']:.3f}"
            assert cells.setdefault(fit, said) == said
    assert {fit for cells in found.values() for fit in cells} >= {fit for fits in TABLES for fit in fits}
    return [
        line_of([name, *(cells.get(fit, "") for fit in fits)])
        for fits in TABLES
        for name, cells in found.items()
        if cells.keys() & set(fits)
    ]


FIRST = ("svd plain", "svd weighted", "auto weighted", "svd-llm", "asvd")
"""What the first table of texts has."""


def first_rows(results):
    """The same for a few fits, sizes without rules."""
    parts = {"encoder": "encoder alone", "whole": "whole model"}
    return [
        line_of([f"{parts[scope]}, {ratio:g}", *(f"{fits[name]['sts_b']:.3f}" for name in FIRST)])
        for (scope, ratio), fits in sorted(sizes_of(results).items())
        if fits.keys() >= set(FIRST)
    ]


def agreement_rows(results):
    """One row for each part and ratio that all families were measured at in one run."""
    rows = []
    for result in results:
        fits, configuration = result["figures"]["fits"], result["configuration"]
        if "texts" not in configuration and fits.keys() >= {*FAMILIES, "auto compared"}:
            part = {"whole": "whole model", "encoder": "encoder alone"}[configuration["scope"]]
            cells = [f"{fits[name]['sts_b_agreement']:.3f}" for name in (*FAMILIES, "auto compared")]
            rows.append(line_of([f"{part}, {configuration['ratio']:g}", *cells]))
    return rows


def sizes_of(results):
    """All fits to 512 plain texts without options, by part and ratio."""
    by_size = {}
    for result in results:
        configuration, fits = result["configuration"], result["figures"]["fits"]
        if configuration.keys().isdisjoint({"texts", "sensitivity", "rules"}) and configuration["samples"] == 512:
            by_size.setdefault((configuration["scope"], configuration["ratio"]), {}).update(fits)
    return by_size


def searched_rows(results):
    """The best single family without a search; SVD and the best of all where what layers count was searched."""
    rows = []
    for (scope, ratio), fits in sizes_of(results).items():
        if not fits.keys() & {"svd searched", "auto searched judged"}:
            continue
        cells = [f"{'whole model' if scope == 'whole' else 'encoder alone'}, {ratio:g}"]
        for measure in ("sts_b", "sts_b_agreement"):
            single = {name.split()[0]: fits[name].get(measure) or 0.0 for name in FAMILIES[:-1]}
            best = max(single, key=single.__getitem__)
            found = [fits.get(name, {}).get(measure) for name in ("svd searched", "auto searched judged")]
            cells.append(f"{best} {single[best]:.3f}" if single[best] else "")
            cells += ["" if value is None else f"{value:.3f}" for value in found]
        made = fits.get("auto searched judged") or fits["svd searched"]
        factors = ", ".join(f"{shape} by {factor:g}" for shape, factor in made["searched"].items())
        rows.append(line_of([*cells, f"{next(iter(made['compared']), 'svd')}: {factors}"]))
    return rows


def judged_rows(results):
    """The best single families, and `auto` that chose by agreement on other pairs: sizes, not more."""
    rows = []
    for (scope, ratio), fits in sizes_of(results).items():
        if "auto judged" in fits:
            part, judged = {"whole": "whole model", "encoder": "encoder alone"}[scope], fits["auto judged"]
            cells = [f"{part}, {ratio:g}"]
            for measure in ("sts_b", "sts_b_agreement"):
                single = {name.split()[0]: fits[name].get(measure) or 0.0 for name in FAMILIES[:-1]}
                best = max(single, key=single.__getitem__)
                cells += [f"{best} {single[best]:.3f}" if single[best] else "", f"{judged[measure]:.3f}"]
            rows.append(line_of([*cells, next(iter(judged["compared"]), "together")]))
    return rows


def alike_rows(results):
    """STS-B and agreement of each family, fitted to texts like those of STS-B."""
    rows = []
    for result in results:
        fits, configuration = result["figures"]["fits"], result["configuration"]
        if configuration.get("texts") == "alike":
            part = {"whole": "whole model", "encoder": "encoder alone"}[configuration["scope"]]
            scored = [fits[name] for name in (*FAMILIES, "auto compared")]
            cells = [f"{fit['sts_b']:.3f} ({fit['sts_b_agreement']:.3f})" for fit in scored]
            rows.append(line_of([f"{part}, {configuration['ratio']:g}", *cells]))
    return rows


def test_every_result_of_corpus_distillation_is_a_row_and_there_is_no_other():
    results = results_of("corpus-distill")
    assert results
    rows = rows_below("After distillation", ("whole model", "encoder alone"))
    assert sorted(rows) == sorted(map(distilled_row, results))


TASKS = ("sst2", "stsb", "mrpc", "cola", "rte")
TAUGHT = (
    *("kronecker-svd-kd, full rank", "kronecker-svd-kd", "svd-kd", "svd-hidden-kd"),
    *("tucker-kd", "small-dense", "kroneckerbert, full rank"),
)


def by_teacher(result):
    return result["configuration"].get("first") == "teacher"


def of_first_seed(result):
    return result["configuration"]["seed"] == 0


def column_of(result):
    """Its preset; the rows of svd-kd are balanced, too."""
    configuration, options = result["configuration"], (result["figures"].get("compress") or {}).get("options", {})
    full = bool(options.get("full_rank")) or "compress.options.full_rank=true" in configuration["settings"]
    return configuration["preset"].replace("svd-balanced-kd", "svd-kd") + ", full rank" * full


def seed_rows(results):
    """One row for each task, ratio and preset that several seeds were tried of: the part of the teacher's score."""
    found = {}
    for result in results:
        configuration, figures = result["configuration"], result["figures"]
        settings, before = " ".join(configuration["settings"]), configuration.get("before", "")
        preset = column_of(result)
        if preset in TAUGHT and "corpus.max_steps=800" in settings and "altered_copies" not in settings:
            task = configuration["task"] + (f" after {before}" if before else "")
            seeds = found.setdefault((TASKS.index(configuration["task"]), task, configuration["ratio"], preset), {})
            seeds[configuration["seed"]] = figures["kept"]
    return [
        line_of(
            [
                f"{task}, {ratio:g}, {len(seeds)} seeds",
                preset,
                ", ".join(f"{seeds[seed]:.1%}" for seed in sorted(seeds)),
                f"{sum(seeds.values()) / len(seeds):.1%}",
            ]
        )
        for (_, task, ratio, preset), seeds in sorted(found.items())
        if len(seeds) > 1
    ]


def taught_rows(results):
    """One row for each task, what was learnt before, ratio, length and examples; one column for each preset."""
    found = {}
    for result in results:
        configuration, figures = result["configuration"], result["figures"]
        primary = figures["primary"]
        longer = "corpus.max_steps=800" in configuration["settings"]
        before = configuration.get("before", "")
        altered = "task.altered_copies" in " ".join(configuration["settings"])
        key = (TASKS.index(configuration["task"]), before, configuration["ratio"], not longer, altered)
        row = found.setdefault(key, {"metric": primary, "teacher": figures["teacher"][primary]})
        row[column_of(result)] = f"{figures['metrics'][primary]:.3f} ({figures['kept']:.1%})"
    rows = []
    for (task, before, ratio, short, altered), row in sorted(found.items()):
        first = TASKS[task] + (f" after {before}" if before else "") + f", {ratio:g}" + ("" if short else ", longer")
        first += ", altered" * altered
        cells = [first, row["metric"], f"{row['teacher']:.3f}", *(row.get(preset, "") for preset in TAUGHT)]
        rows.append(line_of(cells))
    return rows


def test_every_result_on_a_task_is_in_a_table_and_there_is_no_other():
    results = results_of("recipe")
    assert results
    taught = list(filter(by_teacher, results))
    assert rows_below("On tasks", TASKS) == [*taught_rows(filter(of_first_seed, taught)), *seed_rows(taught)]
    others = [result for result in results if not by_teacher(result)]
    assert sorted(rows_below("On tasks by the untuned model", TASKS)) == sorted(map(task_row, others))


def start_rows(results):
    """One row for each method, ratio and start, over the seeds."""
    found = {}
    for result in results:
        configuration = result["configuration"]
        rules = "".join(f", {rule}" for rule in configuration.get("rules", ()))
        fit = {None: "as often as in texts", "even-words": "all alike"}[configuration.get("fit")]
        start = fit if configuration["calibration"] else "weights alone"
        found.setdefault((f"{configuration['method']}{rules}, {configuration['ratio']:g}", start), []).append(result)
    return [line_of([*key, str(len(of)), *_spread(of)]) for key, of in found.items()]


def _spread(results):
    before, after = ([result["figures"][when] for result in results] for when in ("before", "after"))
    means = [
        sum(found[name] for found in of) / len(of)
        for of, name in ((before, "sts_b"), (after, "sts_b"), (after, "similarity_spearman"), (after, "hidden_error"))
    ]
    least, most = (f(found["sts_b"] for found in after) for f in (min, max))
    cells = [f"{mean:.3f}" for mean in means]
    return [cells[0], f"{cells[1]} ({least:.3f} to {most:.3f})", *cells[2:]]


def test_every_start_that_was_compared_on_a_gpu_is_a_row_and_there_is_no_other():
    results = results_of("gpu-corpus")
    assert results
    rows = rows_below("Which words count", ("svd", "kronecker"))
    assert sorted(rows) == sorted(start_rows(results))


def test_every_result_on_a_task_on_a_gpu_is_a_row_and_there_is_no_other():
    results = results_of("gpu-recipe")
    assert results
    rows = rows_below("On tasks with more text", TASKS)
    assert sorted(rows) == sorted(map(task_row, results))


def kernel_rows(results):
    """Time of dense / ours in graphs, by the faster of our kernels, and in brackets by PyTorch."""
    rows = []
    for result in results:
        for options, found in result["figures"]["structures"].items():
            ratios = [found[tokens]["graph"]["dense_ratio"] for tokens in ("1", "128", "1024", "16384")]
            cells = [f"{max(of['fused'], of['mixed']):.2f} ({of['pytorch']:.2f})" for of in ratios]
            rows.append(line_of([result["configuration"]["shape"].replace("x", " x "), f"`{options}`", *cells]))
    return rows


def test_every_layer_that_was_timed_on_a_gpu_is_a_row_and_there_is_no_other():
    results = [result for result in results_of("gpu") if result["configuration"]["kind"] == "fused"]
    assert results
    rows = [row for row in rows_below("Layers on a GPU", ("768", "3072", "4096", "11008")) if "`left=" in row]
    assert sorted(rows) == sorted(kernel_rows(results))


def test_every_data_aware_fit_that_was_measured_is_in_the_table_and_no_other():
    results = results_of("data-aware")
    assert results
    rows = rows_below("Fits to texts", ("whole model", "encoder alone"))
    made = [of(results) for of in (data_aware_rows, agreement_rows, judged_rows, searched_rows, alike_rows)]
    assert sorted(rows) == sorted(itertools.chain(*made))
    few = rows_below("With some texts, without training", ("whole model", "encoder alone"))
    assert few == first_rows(results)
    assert len(few) == 10
