"""Running a suite: what has no result yet, one process after the other, each result written when it is complete."""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Literal, final

from benchmarks.experiments import SuiteError
from benchmarks.machine import ROOT, commit
from benchmarks.suites import Entry

RESULTS = Path(__file__).parent / "results"
WORK = Path(__file__).parent / "work"
"""Where experiments that take long keep checkpoints and what they share, unless another folder is given."""
FIELDS = (
    *("suite", "experiment", "configuration", "seed", "commit", "versions", "hardware"),
    *("figures", "skipped", "wall_time_s", "peak_memory_bytes"),
)
"""What every result holds."""
PRELOADED = ("benchmarks.worker", "benchmarks.corpus", "benchmarks.recipes", "transformers.models.bert.modeling_bert")
"""What takes seconds to import."""
State = Literal["current", "changed", "incomplete", "missing"]


@final
@dataclass(frozen=True)
class Tally:
    """Names of the experiments by what became of them."""

    kept: tuple[str, ...]
    measured: tuple[str, ...]
    skipped: tuple[str, ...]
    failed: tuple[str, ...]


def run_suite(
    entries: Sequence[Entry],
    results: Path,
    *,
    data: Path | None,
    work: Path = WORK,
    force: bool,
    jobs: int | None = None,
    echo: Callable[[str], None],
) -> Tally:
    """Measure what has no current result. One that fails does not keep the others from being measured.

    Args:
        results: folder of the results; changed one complete file at a time.
        data: folder with evaluation data, or None.
        work: folder where experiments that take long keep what a later run goes on from.
        force: measure everything anew.
        jobs: experiments at a time, begun in the order of the entries, each a fork of one process that has loaded the
            libraries; more than one is not for what takes times. None: one at a time, each a fresh interpreter.
        echo: gets a line of progress at a time.
    """
    became: dict[str, list[str]] = {name: [] for name in Tally.__dataclass_fields__}
    process = _Fresh() if jobs is None else _Forked(max(entry.experiment.threads for entry in entries))

    def measure(entry: Entry) -> None:
        if not force and state(entry, results, data=data) == "current":
            became["kept"].append(entry.name)
            return
        name = f"{entry.suite}/{entry.name}"
        echo(f"{name} ...")
        circumstances = {"commit": commit(results.resolve())}
        answer = _measure(entry, data, work, process)
        said = "" if jobs is None else f" {name}:"
        if answer is None:
            became["failed"].append(entry.name)
            echo(f" {said} failed, see above")
        elif "skip" in answer:
            became["skipped"].append(entry.name)
            echo(f" {said} skipped: {answer['skip']}")
        else:
            became["measured"].append(entry.name)
            _write(entry.path(results), _result(entry, {**circumstances, **answer}))
            echo(f" {said} {answer['wall_time_s']:.1f} s, peak {answer['peak_memory_bytes'] / 2**20:,.0f} MiB")
            for part, reason in answer["skipped"].items():
                echo(f" {said} without {part}: {reason}")

    if jobs is None:
        for entry in entries:
            measure(entry)
    else:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(measure, entries))
    return Tally(**{name: tuple(names) for name, names in became.items()})


def state(entry: Entry, results: Path, *, data: Path | None = None) -> State:
    """Whether an experiment has a result of exactly this configuration.

    `incomplete`: it has one, but parts were skipped for want of the data that is now given.
    """
    path = entry.path(results)
    if not path.exists():
        return "missing"
    result = read_result(path)
    if result["configuration"] != entry.experiment.configuration():
        return "changed"
    return "incomplete" if data is not None and result["skipped"] else "current"


def read_result(path: Path) -> dict[str, Any]:
    """A result as it was written.

    Raises:
        SuiteError: the file is not one.
    """
    wrong = f"{path} is not a result; remove it, or measure it anew with --force"
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise SuiteError(wrong) from error
    if not isinstance(result, dict) or not set(FIELDS) <= set(result):
        raise SuiteError(wrong)
    return result


def _measure(entry: Entry, data: Path | None, work: Path, process: "Process") -> dict[str, Any] | None:
    """What the process of one experiment answered; None if it failed, having said why."""
    request = {
        "configuration": entry.experiment.configuration(),
        "data": None if data is None else str(data.resolve()),
        "work": str(work.resolve()),
    }
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        if process(request, answer, entry.experiment.threads) != 0:
            return None
        measured: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return measured


Process = Callable[[Mapping[str, Any], Path, int], int]
"""Answers a request in a process of its own, with so many threads; returns its exit status."""


class _Fresh:
    """A fresh interpreter for each experiment."""

    def __call__(self, request: Mapping[str, Any], answer: Path, threads: int) -> int:
        command = [sys.executable, "-m", "benchmarks.worker", str(answer)]
        done = subprocess.run(
            command,
            input=json.dumps(request),
            text=True,
            cwd=ROOT,
            env=_environment(threads),
            stdout=sys.stderr,
            check=False,
        )
        return done.returncode


class _Forked:
    """Forks of one process that has loaded the libraries already: many short experiments start at once.

    Args:
        threads: of the libraries that read that when they are loaded.
    """

    def __init__(self, threads: int) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOADED))
        ours = dict(os.environ)
        # it keeps the environment that it finds now; a fork cannot use CUDA a second time
        os.environ.update(_environment(threads), PYTORCH_NVML_BASED_CUDA_CHECK="1")
        try:
            forkserver.ensure_running()
        finally:
            os.environ.clear()
            os.environ.update(ours)

    def __call__(self, request: Mapping[str, Any], answer: Path, threads: int) -> int:
        process = self._context.Process(target=_answer, args=(dict(request), answer, threads))
        process.start()
        process.join()
        return process.exitcode if process.exitcode is not None else 1


def _answer(request: Mapping[str, Any], path: Path, threads: int) -> None:
    import torch

    from benchmarks.worker import answer

    torch.set_num_threads(threads)
    answer(request, path)


def _environment(threads: int) -> dict[str, str]:
    """Our environment with a fixed number of threads, without network and without chatter."""
    return {
        **os.environ,
        "THP_MEM_ALLOC_ENABLE": "1",  # as the command line has it
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _result(entry: Entry, answer: Mapping[str, Any]) -> dict[str, Any]:
    fields = {
        "suite": entry.suite,
        "experiment": entry.name,
        "configuration": entry.experiment.configuration(),
        "seed": entry.experiment.seed,
        **answer,
    }
    return {name: fields[name] for name in FIELDS}


def _write(path: Path, result: Mapping[str, Any]) -> None:
    """Write a file that is either complete or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
