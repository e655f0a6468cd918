"""Tables of expected times in benchmarks/README.md are those of the committed results; machines keep what they say."""

import pytest

from benchmarks.experiments.roofline import one_structure
from compresskit.machines import closeness, machine
from tests.benchmarks.test_readme_tables import line_of, results_of, rows_below

KINDS = ("dense", "kronecker", "low-rank", "tucker", "tensor-train", "blast", "monarch")


def row_of(result):
    """How many times predictions are off, at the median and nine of ten, and layers slower though permitted."""
    found = result["figures"]["committed"]
    cells = [f"{of['off_median']:.2f}, {of['off_90']:.2f}; {of['faster_but_slower']}" for of in map(found.get, KINDS)]
    return line_of([f"`{result['configuration']['machine']}`", *cells])


def test_the_table_of_expected_times_is_that_of_the_results():
    found = [line for line in rows_below("Expected times", ("`cpu",)) if line.count("|") == 9]
    assert sorted(found) == sorted(map(row_of, results_of("cost-model")))


def test_a_gpu_is_expected_to_take_what_it_took():
    """Dense and Kronecker layers of the committed results, by the faster kernel in graphs."""
    times = {}
    for result in results_of("gpu"):
        if result["configuration"]["kind"] == "fused":
            times |= layer_times(result)
    found = closeness(machine("h100"), times)
    assert found["kronecker"].number >= 96
    assert found["dense"].off_median < 1.2
    assert found["kronecker"].off_median < 1.2
    assert found["kronecker"].off_90 < 1.6
    assert found["kronecker"].faster_but_slower == 0


def layer_times(result):
    shape = result["configuration"]["shape"]
    times = {}
    for options, by_tokens in result["figures"]["structures"].items():
        structure = one_structure("kronecker", options, shape)
        for tokens, ways in by_tokens.items():
            size = (structure.rows, structure.cols, int(tokens))
            times[(structure, *size)] = ways["graph"]["times_s"]["auto"]
            times[(None, *size)] = ways["graph"]["times_s"]["dense"]
    return times


@pytest.mark.parametrize("name", ["cpu", "cpu-kernel", "cpu-bf16", "cpu-bf16-kernel"])
def test_each_machine_of_a_processor_was_compared_with_layers(name):
    assert name in {result["configuration"]["machine"] for result in results_of("cost-model")}


def planned_row(result):
    """Expected speed-up of the layers, that which is left without what the floor takes, and the time of the model."""
    configuration, figures = result["configuration"], result["figures"]
    one = figures["batch_1"]
    cells = [f"`{configuration.get('machine', 'cpu')}`", configuration["model"], WITH[configuration.get("kernel")]]
    cells += [f"{figures['expected_speedup']:.2f}", f"{1 / (1 - one['won']):.2f}", f"{one['time_ratio']:.2f}"]
    return line_of(cells)


WITH = {None: "PyTorch", "compiled": "compiled kernel"}


def test_the_table_of_planned_models_is_that_of_the_results():
    results = [result for result in results_of("model-speed") if result["experiment"].startswith("planned")]
    found = [line for line in rows_below("Expected times", ("`cpu",)) if line.count("|") == 7]
    assert sorted(found) == sorted(map(planned_row, results))
