"""The README's table of distilled models is that of the committed results."""

import json
import re

from benchmarks.machine import ROOT
from benchmarks.runner import RESULTS

SECTION = re.search(r"^### After distillation\n(.*?)(?=^##)", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)


def row(result):
    configuration, figures = result["configuration"], result["figures"]
    part = {"model": "whole model", "encoder": "encoder alone"}[configuration["part"]]
    scores = [figures[when]["sts_b"] for when in ("before", "after")]
    rules = "".join(f", {rule}" for rule in configuration.get("rules", ()))
    projected = figures["training"]["projection_params"] > 0  # its states have another size
    cells = [
        f"{part}, {configuration['ratio']:g}",
        configuration["method"] + rules + (", data-aware" if configuration["calibration"] else ""),
        f"{figures['report']['params_after']:,}",
        f"{figures['training']['steps']:,}",
        *(f"{score:.3f}" for score in scores),
        f"{scores[1] / figures['dense']['sts_b']:.1%}",
        "-" if projected else f"{figures['after']['hidden_error']:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def test_every_result_of_corpus_distillation_is_a_row_and_there_is_no_other():
    results = [json.loads(path.read_text("utf-8")) for path in (RESULTS / "corpus-distill").glob("*.json")]
    assert SECTION is not None
    rows = [line for line in SECTION[1].splitlines() if line.startswith(("| whole model", "| encoder alone"))]
    assert results
    assert sorted(rows) == sorted(map(row, results))
