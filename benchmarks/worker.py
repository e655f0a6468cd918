"""The fresh process of one experiment: reads what to run from stdin, writes what was measured to a file.

Run by the runner as `python -m benchmarks.worker ANSWER`.
"""

import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.experiments import ExperimentSkipped, make_experiment
from benchmarks.machine import hardware, peak_memory_bytes, versions
from benchmarks.timing import prepare_kernel, rounded


def main() -> None:
    """Run the experiment that stdin describes."""
    answer(json.load(sys.stdin), Path(sys.argv[1]))


def answer(request: Mapping[str, Any], path: Path) -> None:
    """Run one experiment and write its answer: figures and their circumstances, or why it was skipped."""
    experiment = make_experiment(request["configuration"])
    data = None if request["data"] is None else Path(request["data"])
    started = time.perf_counter()
    try:
        prepare_kernel(experiment, path.parent / "no-kernels")
        outcome = experiment.run_in(data, Path(request["work"]))
    except ExperimentSkipped as skipped:
        written: dict[str, Any] = {"skip": str(skipped)}
    else:
        time_s = time.perf_counter() - started
        peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        written = {
            "versions": versions(),
            "hardware": hardware(),
            "figures": rounded(outcome.figures),
            "skipped": dict(outcome.skipped),
            "wall_time_s": rounded(time_s),
            "peak_memory_bytes": peak_memory_bytes(max(peaks)),
        }
    path.write_text(json.dumps(written, allow_nan=False), encoding="utf-8")


if __name__ == "__main__":
    main()
