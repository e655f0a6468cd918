"""`compresskit distill`: make a student of a teacher as a preset says, and train it against the teacher."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compresskit_cli.command import Command
from compresskit_cli.distill_options import changed, preset_options
from compresskit_cli.options import Count
from compresskit_cli.task_options import TaskChoice, task_options

if TYPE_CHECKING:
    from compresskit.recipes import Distilled, Preset


@click.command(name="distill", cls=Command)
@click.option("--preset", required=True, metavar="PRESET", help="NAME, NAME:VARIANT or a file: `compresskit presets`.")
@click.option("--teacher", required=True, metavar="MODEL", help="Model that was trained on the task (finetune).")
@task_options
@click.option("--corpus", metavar="WHERE", help="Plain text for stage 1: folder of *.txt, or hub id.")
@click.option(
    "--base", metavar="MODEL", help="Start and teacher of stage 1, e.g. the untuned model. Default: the teacher."
)
@click.option("--student", metavar="MODEL", help="A compressed or small model to train, in place of making one.")
@click.option("--ratio", type=float, help="Teacher's / student's parameters, whole models. Default: the preset's.")
@click.option("--params", type=Count(), help="Parameters of the student, e.g. 5.7M.")
@preset_options
@click.option("--cache", type=click.Path(path_type=Path), help="Folder that keeps the tokenised text for other runs.")
@click.option("--cache-teacher", is_flag=True, help="Also keep the teacher's answers: for data seen several times.")
@click.option(
    "--cache-bytes", type=Count(), help="Most that these may take, e.g. 50G; others are asked again.  [20 GiB]"
)
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--resume", is_flag=True, help="Go on with a run that was interrupted, from its last checkpoint.")
@click.option("--force", is_flag=True, help="Replace an existing output; discard an interrupted run.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    preset: str,
    teacher: str,
    data: str | None,
    max_length: int | None,
    output: Path,
    resume: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a small student against its teacher.

    The preset says how the student is made and how two stages train it: stage 1 on plain text (--corpus), stage 2 on
    the task (--task, --data). One of them may be left out; with --task sts stage 1 is scored by sentence similarity.
    Checkpoints and logs lie in OUTPUT.run until the output is complete: after an interruption --resume goes on.

    \b
        compresskit distill --preset kroneckerbert:k21 --teacher ./teacher --task sst2 \\
            --data glue --corpus text --output ./student
        compresskit distill --preset svd-kd --ratio 7.7 --teacher ./encoder --corpus text --task sts -o ./small
    """
    from compresskit.hub import check_output
    from compresskit.recipes import distill
    from compresskit.recipes import preset as find
    from compresskit.tasks import is_first
    from compresskit_cli import render
    from compresskit_cli.training import begin_training, run_folder, spare_model, stage_bars

    choice = TaskChoice(**{name: options.pop(name) for name in TaskChoice.__dataclass_fields__})
    task = None if choice.task is None and choice.kind is None else choice.chosen()
    models = {name: options.pop(name) for name in ("base", "student")}
    sources = {
        name: options.pop(name) for name in ("corpus", "ratio", "params", "cache", "cache_teacher", "cache_bytes")
    }
    chosen = changed(find(preset), options)
    check_output(output, force=force)
    for model in (teacher, *models.values()):
        if model is not None:
            spare_model(model, output)
    begin_training()
    run = run_folder(output, resume=resume, force=force)
    try:
        with stage_bars() as on_progress:
            result = distill(
                chosen,
                teacher,
                run,
                task=task,
                data=data,
                max_length=max_length,
                resume=resume,
                on_progress=on_progress,
                on_note=partial(render.progress_console.print, soft_wrap=True) if is_first() else None,
                **models,
                **sources,
            )
    except (KeyboardInterrupt, SystemExit):
        if is_first():
            click.echo(f"Checkpoints are in {run}: the same command with --resume goes on.", err=True)
        raise
    if not is_first():
        return
    _save(result, teacher, models["base"], output, run, force=force)
    if as_json:
        click.echo(json.dumps({"output": str(output), **result.to_json()}, indent=1))
    else:
        render.facts("Distilled", [*_facts(result), ("time", f"{result.time_s:,.1f} s"), ("saved to", str(output))])


def _save(result: "Distilled", teacher: str, base: str | None, output: Path, run: Path, *, force: bool) -> None:
    from compresskit import layout_of
    from compresskit.hub import resolve, save_checkpoint, training_card
    from compresskit.recipes import combined_log
    from compresskit.tasks import close_run

    made_of = [(what, Path(name).name) for what, name in (("teacher", teacher), ("pre-trained model", base)) if name]
    card = training_card(
        output.name,
        [("preset", result.preset.title), *made_of, *_facts(result), *_settings(result.preset, result)],
        architecture=type(result.student).__name__,
        compressed=bool(layout_of(result.student)),
        base_model=None if Path(teacher).expanduser().is_dir() else teacher,
        how=f"{result.preset.summary[:1].upper()}{result.preset.summary[1:]} (source: {result.preset.source}). Made",
    )
    texts = {
        "distillation.jsonl": combined_log(run, [stage.name for stage in result.stages]),
        "preset.toml": result.preset.to_toml(),
    }
    folder = resolve(teacher, None)
    save_checkpoint(result.student, folder, output, force=force, card=card, texts=texts)
    close_run(run)


def _facts(result: "Distilled") -> list[tuple[str, str]]:
    """What came out, for the screen and for the model card."""
    rows = [("parameters", f"{result.params:,} of {result.teacher_params:,}, ratio {result.ratio:.3f}")]
    for name, value in result.metrics.items():
        teacher, before = result.teacher[name], result.before[name]
        compared = teacher > 0 and name != "perplexity"  # less is better there
        share = f", {value / teacher:.1%} of it" if compared else ""
        rows.append((f"dev {name}", f"{value:.4f}; before training {before:.4f}, teacher {teacher:.4f}{share}"))
    for stage in result.stages:
        steps = f"{stage.steps:,} steps, student of step {stage.best_step:,}"
        terms = [f"{name.removeprefix('loss_')} {value:.4g}" for name, value in stage.loss.items() if name != "loss"]
        rows.append((f"stage {stage.name}", f"{steps}; loss {stage.loss['loss']:.4g} ({', '.join(terms)})"))
    return rows


def _settings(preset: "Preset", result: "Distilled") -> list[tuple[str, str]]:
    """Settings of each stage that was done; all values of the preset lie beside the card."""
    rows = []
    for stage in result.stages:
        recipe = preset.corpus if stage.name == "corpus" else preset.task
        assert recipe is not None
        if result.task is not None and stage.name == "task":
            recipe = recipe.for_task(result.task.name)
        said = {name: value for name, value in vars(recipe.settings).items() if value is not None}
        rows.append((f"settings of {stage.name}", ", ".join(f"{name} {value}" for name, value in said.items())))
    return rows
