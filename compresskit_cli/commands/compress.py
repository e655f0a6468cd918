"""`compresskit compress`: shrink a model and save it as an ordinary checkpoint, with a report of what it cost."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compresskit_cli.calibration_options import PARAMETERS, Samples, calibration_options, sequential_options
from compresskit_cli.command import Command
from compresskit_cli.judge_options import TaskJudge, judge_options
from compresskit_cli.options import Choice, choice_options, model_options, read_plan

if TYPE_CHECKING:
    from compresskit import Report


@click.command(name="compress", cls=Command)
@model_options
@choice_options
@calibration_options
@judge_options
@sequential_options
@click.option(
    "--plan", "plan_file", type=click.Path(path_type=Path), help="Replay a plan that `compresskit plan` wrote."
)
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), help="Folder to write. Default: MODEL-METHOD-RATIO here."
)
@click.option("--force", is_flag=True, help="Replace an existing output folder, once the new one is complete.")
@click.option(
    "--measure/--no-measure", default=None, help="Time the result against the dense model. Default: if it is cheap."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(
    model: str,
    dtype: str,
    device: str,
    revision: str | None,
    seed: int,
    plan_file: Path | None,
    output: Path | None,
    force: bool,
    measure: bool | None,
    as_json: bool,
    calibrate: str | None,
    samples: int | None,
    max_length: int | None,
    gradients: bool,
    sensitivity: str,
    compare: bool,
    judge: str | None,
    judge_data: str | None,
    judge_split: str | None,
    robust: bool,
    even_words: bool,
    calibration: Path | None,
    sequential: bool,
    refine: int | None,
    **choice: Any,
) -> None:
    """Compress MODEL and save it as a Hugging Face checkpoint.

    MODEL is a folder or hub id. The result opens with AutoModel.from_pretrained after `import compresskit`. Examples:

    \b
        compresskit compress bert-base-uncased --method kronecker --ratio 19
        compresskit compress ./model -m svd --keep 0.25 --exclude '*embeddings*'
        compresskit compress ./model -m svd --ratio 8 --rule '*attention*=kronecker:terms=2'
        compresskit compress ./model -m svd --ratio 4 --calibrate texts
    """
    from compresskit import apply, compress, plan_from_json
    from compresskit.hub import check_output, model_card, save_checkpoint
    from compresskit_cli import render
    from compresskit_cli.loading import load
    from compresskit_cli.speed import speedup, time_dense

    options = Choice(**choice)
    texts = Samples(
        calibrate,
        samples,
        max_length,
        gradients,
        calibration,
        sequential=sequential,
        refine=refine,
        sensitivity=sensitivity,
        robust=robust,
        even_words=even_words,
        compare=compare,
    )
    by_task = TaskJudge(judge, judge_data, judge_split)
    texts.check(judged=judge is not None)
    by_task.check(texts)
    if plan_file is not None and (sensitivity != PARAMETERS or compare):
        option = "--compare" if compare else "--sensitivity"
        raise click.UsageError(f"--plan says what becomes of each layer: {option} has no say in it")
    arguments = None
    if plan_file is None:
        arguments = options.arguments()
        texts.check_methods(arguments)
    elif options.given():
        raise click.UsageError("--plan says what becomes of each layer: give no method, budget or pattern with it")
    output = output or Path(_default_name(model, options, plan_file))
    check_output(output, force=force)
    _spare_model(Path(model).expanduser(), output)
    data = None if plan_file is None else read_plan(plan_file)
    loaded, folder = load(model, revision=revision, dtype=dtype, device=device, seed=seed)
    provenance = _provenance(model, revision, seed, options, plan_file, texts, by_task)
    dense = time_dense(loaded, measure)
    with render.progress_bar() as on_progress:
        plan = None if arguments is not None else plan_from_json(data, loaded)
        by = by_task.made(loaded, folder)
        how = texts.collect(loaded, folder, seed=seed, planning=plan is None, judge=by, on_progress=on_progress)
        how |= {"on_progress": on_progress, "provenance": provenance}
        report = compress(loaded, **(arguments or {}), **how) if plan is None else apply(loaded, plan, **how)
    card = model_card(
        output.name,
        _facts(report),
        architecture=type(loaded).__name__,
        base_model=None if Path(model).expanduser().is_dir() else model,
        left_dense=[(refusal.name, refusal.reason) for refusal in report.left],
    )
    save_checkpoint(loaded, folder, output, force=force, card=card)
    costs = {**_costs(report, folder, output), "measured": speedup(dense, loaded)}
    if as_json:
        click.echo(json.dumps({"output": str(output), **costs, **report.to_json()}, indent=1))
    else:
        render.report(report)
        render.note_type(str(loaded.dtype), report.target)
        rows = [*_facts(report), ("measured speed-up of the model", _speed_text(costs["measured"]))]
        rows += [("bytes on disk", _disk_text(costs)), *_run_facts(costs, output)]
        render.facts("Result", rows)
        render.say("Open it with:\n    import compresskit, transformers")
        render.say(f"    model = transformers.{type(loaded).__name__}.from_pretrained({json.dumps(str(output))})")


def _spare_model(model: Path, output: Path) -> None:
    """Raise OutputError if `--force` would replace the model itself, or a folder that it is in."""
    from compresskit.errors import OutputError

    if model.is_dir():
        source, target = model.resolve(), output.expanduser().resolve()
        if target in (source, *source.parents):
            raise OutputError(f"{output} holds the model that is to be compressed; choose another folder")


def _name(model: str) -> str:
    """The last part of a hub id or of a folder's real path, even of `.`"""
    path = Path(model).expanduser()
    return (path.resolve() if path.is_dir() else path).name


def _default_name(model: str, options: Choice, plan_file: Path | None) -> str:
    base = _name(model) or "model"
    if plan_file is not None:
        return f"{base}-{plan_file.stem}"
    if options.ratio is not None:
        size = f"-{options.ratio:g}x"
    elif options.keep is not None:
        size = f"-keep{options.keep:g}"
    else:
        size = f"-{options.params}" if options.params is not None else ""
    return f"{base}-{options.method or 'rules'}{size}"


def _provenance(
    model: str,
    revision: str | None,
    seed: int,
    options: Choice,
    plan_file: Path | None,
    texts: Samples,
    by_task: TaskJudge,
) -> dict[str, Any]:
    """What a checkpoint remembers of the command. Folder names of this machine do not go into it."""
    from compresskit import __version__

    return {
        "compresskit": __version__,
        "model": _name(model) if Path(model).expanduser().is_dir() else model,
        "revision": revision,
        "seed": seed,
        "asked": {
            **(options.given() if plan_file is None else {"plan": plan_file.name}),
            **texts.given(),
            **by_task.given(),
        },
    }


def _facts(report: "Report") -> list[tuple[str, str]]:
    """The report in short, for the screen and for the model card."""
    from compresskit_cli.render import compared, count, searched, size

    return [
        ("parameters", f"{count(report.params_before)} -> {count(report.params_after)}"),
        ("in replaceable layers", f"{report.coverage:.1%} of the parameters"),
        ("ratio, whole model", f"{report.ratio:.3f}"),
        ("ratio, replaced layers", f"{report.site_ratio:.3f}"),
        ("ratio, without embedding tables", f"{report.body_ratio:.3f}"),
        ("ratio, bytes of parameters", f"{report.bytes_ratio:.3f}"),
        ("bytes of parameters", f"{size(report.bytes_before)} -> {size(report.bytes_after)}"),
        ("multiply-adds in replaced layers", f"{report.macs_ratio:.2f} times fewer"),
        ("expected speed-up of replaced layers", f"{report.expected_speedup:.2f} ({report.target})"),
        ("relative error of replaced weights", f"{report.relative_error:.4f}"),
        *([] if report.weighted_error is None else [("relative error of outputs", f"{report.weighted_error:.4f}")]),
        *([("by the search errors count", searched(report.searched))] if report.searched else []),
        *([("whole models compared, each wrong by", compared(report.compared))] if report.compared else []),
    ]


def _speed_text(measured: dict[str, Any]) -> str:
    if "skipped" in measured:
        return f"not measured: {measured['skipped']}"
    where = f"{measured['batch']} x {measured['length']} tokens on {measured['device']}"
    faster = "; compresskit kernels --build may make it faster" if measured.get("kernel") is False else ""
    return f"{measured['speedup']:.2f} (forward pass, {where}, median of {measured['rounds']} rounds{faster})"


def _costs(report: "Report", folder: Path, output: Path) -> dict[str, Any]:
    return {
        "disk_bytes_before": _weight_bytes(folder),
        "disk_bytes_after": _weight_bytes(output),
        "peak_memory_bytes": _peak_memory_bytes(),
        "compress_time_s": report.time_s,
    }


def _peak_memory_bytes() -> int | None:
    """Of this process so far; None where the system does not say (Windows)."""
    if importlib.util.find_spec("resource") is None:
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _run_facts(costs: dict[str, Any], output: Path) -> list[tuple[str, str]]:
    from compresskit_cli.render import size

    peak = costs["peak_memory_bytes"]
    return [
        ("time to compress", f"{costs['compress_time_s']:.1f} s"),
        *([] if peak is None else [("peak memory of this command", size(peak))]),
        ("saved to", str(output)),
    ]


def _disk_text(costs: dict[str, Any]) -> str:
    from compresskit_cli.render import size

    before, after = costs["disk_bytes_before"], costs["disk_bytes_after"]
    return f"{size(before)} -> {size(after)}, ratio {before / after:.2f}"


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
