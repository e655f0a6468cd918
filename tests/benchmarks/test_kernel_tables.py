"""The tables of what the compiled kernel gains, in benchmarks/README.md, are those of the committed results."""

import statistics

import pytest

from tests.benchmarks.test_readme_tables import line_of, results_of, rows_below

NAMES = {"kronecker": "Kronecker", "svd": "SVD", "tucker": "Tucker", "tensor-train": "tensor train"}
COLUMNS = (("forward", "1"), ("forward", "16"), ("forward", "128"), ("forward", "1024"), ("step", "128"))


SECTIONS = {
    "The compiled kernel": ("float32", "eager"),
    "In bfloat16": ("bfloat16", "eager"),
    "In a compiled layer": ("float32", "compile"),
}


def compiled(suite, section):
    for result in results_of(suite):
        configuration = result["configuration"]
        how = configuration.get("dtype", "float32"), configuration.get("mode", "eager")
        planned = result["experiment"].startswith("planned")
        if configuration.get("kernel") == "compiled" and how == SECTIONS[section] and not planned:
            yield result


def layer_row(result):
    """Median share of the limit by PyTorch and by the kernel, and the kernel's worst."""
    configuration, structures = result["configuration"], result["figures"]["structures"].values()
    cells = [f"{NAMES[configuration['method']]} {configuration['shape'].replace('x', ' x ')} ({len(structures)})"]
    for kind, count in COLUMNS[: 4 + bool(configuration["step_tokens"])]:
        plain, ours = ([of[kind][count] / s["limit"] for s in structures for of in (way(s),)] for way in WAYS)
        cells.append(f"{statistics.median(plain):.2f} → {statistics.median(ours):.2f} ({min(ours):.2f})")
    slower = []
    for count in ("1", "16", "128", "1024"):
        plain, ours = (sum(s["limit"] > 1 > way(s)["forward"][count] for s in structures) for way in WAYS)
        slower += [f"{count}: {plain} → {ours}"] * (plain + ours > 0)
    if configuration["step_tokens"]:
        plain, ours = (sum(s["limit"] > 1 > way(s)["step"]["128"] for s in structures) for way in WAYS)
        slower += [f"step: {plain} → {ours}"] * (plain + ours > 0)
    return line_of([*cells, ", ".join(slower) or "none"])


WAYS = (lambda structure: structure["plain"], lambda structure: structure)


def model_rows(results):
    """One row for each model and length: time / dense by PyTorch and by the kernel, of the floor in brackets."""
    found = {}
    for result in results:
        configuration, figures = result["configuration"], result["figures"]
        row = found.setdefault((configuration["shape"], configuration["tokens"], configuration["model"]), [])
        for batch in configuration["batches"]:
            of = figures[f"batch_{batch}"]
            row.append(f"{of['plain_ratio']:.2f} → {of['time_ratio']:.2f} ({of['floor_ratio']:.2f})")
    return [line_of([shape, model, str(tokens), *cells]) for (shape, tokens, model), cells in found.items()]


@pytest.mark.parametrize("section", SECTIONS)
def test_layers(section):
    wanted = [layer_row(result) for result in compiled("layers", section)]
    assert wanted
    assert sorted(rows_below(section, NAMES.values())) == sorted(wanted)


@pytest.mark.parametrize("section", [*SECTIONS][:2])
def test_whole_models(section):
    wanted = model_rows(compiled("model-speed", section))
    assert wanted
    assert sorted(rows_below(section, ("minilm-l6", "bert-base"))) == sorted(wanted)


def step_row(result):
    """Time of a step / a dense student's, by PyTorch and by the kernel; what the kernel saves; and against by hand."""
    configuration, figures = result["configuration"], result["figures"]
    return line_of(
        [
            f"{NAMES[configuration['method']]} {configuration['ratio']:g}",
            configuration.get("dtype", "float32"),
            f"{figures['plain_over_dense']:.2f} → {figures['time_over_dense']:.2f}",
            f"{figures['time_over_plain']:.2f}",
            f"{figures['time_ratio']:.2f}",
        ]
    )


def memory_row(result):
    figures = result["figures"]
    over = [figures[f"{what}_over_{how}"] for what in ("time", "peak") for how in ("small", "system")]
    return line_of([result["configuration"]["dtype"], *(f"{value:.2f}" for value in over)])


def test_what_becomes_of_memory():
    results = [result for result in results_of("distill") if result["configuration"]["kind"] == "distill-memory"]
    assert results
    found = rows_below("Memory in training", ("bfloat16", "float32"))
    assert sorted(found) == sorted(map(memory_row, results))


def test_steps_of_distillation():
    results = [result for result in results_of("distill") if result["configuration"].get("kernel") == "compiled"]
    assert results
    wanted = sorted(map(step_row, results))
    assert sorted(rows_below("A step of distillation", ("Kronecker", "SVD"))) == wanted
