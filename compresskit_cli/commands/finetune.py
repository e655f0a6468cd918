"""`compresskit finetune`: train a model on a task, for instance the teacher of a distillation."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compresskit_cli.command import Command
from compresskit_cli.task_options import TaskChoice, task_options
from compresskit_cli.train_options import train_options

if TYPE_CHECKING:
    from compresskit.tasks import Task, Training, TrainSettings


@click.command(name="finetune", cls=Command)
@click.argument("model")
@task_options
@train_options
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--resume", is_flag=True, help="Go on with a run that was interrupted, from its last checkpoint.")
@click.option("--force", is_flag=True, help="Replace an existing output; discard an interrupted run.")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    model: str,
    data: str | None,
    max_length: int | None,
    output: Path,
    resume: bool,
    force: bool,
    revision: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Train MODEL, dense or compressed, on a task.

    The best checkpoint by the first metric of the dev split becomes the output, with the log as training.jsonl.
    Until then checkpoints lie in OUTPUT.run: after an interruption --resume goes on from there. Example:

    \b
        compresskit finetune ./model --task mrpc --data glue --output ./teacher --epochs 3 --lr 2e-5
    """
    from compresskit.hub import check_output
    from compresskit.tasks import TrainSettings, is_first
    from compresskit_cli.training import begin_training, run_folder, spare_model

    choice = TaskChoice(**{name: options.pop(name) for name in TaskChoice.__dataclass_fields__})
    task, settings = choice.chosen(), TrainSettings(**options)
    check_output(output, force=force)
    spare_model(model, output)
    begin_training()
    run = run_folder(output, resume=resume, force=force)
    result = _train(model, task, data, run, settings, revision=revision, max_length=max_length, resume=resume)
    if not is_first():
        return
    trained, folder, task, training = result
    _save(trained, folder, output, run, task, training, settings, force=force, model=model)
    facts = {"output": str(output), "task": task.name, **vars(training)}
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        _print(output, task, training)


def _train(
    model: str,
    task: "Task",
    data: str | None,
    run: Path,
    settings: "TrainSettings",
    *,
    revision: str | None,
    **how: Any,
) -> tuple[Any, Path, "Task", "Training"]:
    """The trained model, the folder it came from, its task with all labels, and how it went."""
    import transformers

    from compresskit import kernel_advice
    from compresskit.hub import resolve
    from compresskit.tasks import align_labels, finetune_, is_first, model_for, tokenizer_for, with_labels_of
    from compresskit_cli.render import progress_console
    from compresskit_cli.training import training_bar

    folder = resolve(model, revision)
    task = with_labels_of(task, data, "train")
    transformers.set_seed(settings.seed)  # of the new head
    loaded, tokenizer = model_for(task, folder, new_head=True), tokenizer_for(folder)
    for advice in filter(None, (kernel_advice(loaded, settings.torch_device()), settings.advice())):
        if is_first():
            progress_console.print(advice, soft_wrap=True)
    with training_bar() as on_progress:
        training = finetune_(loaded, tokenizer, task, data, run, settings, on_progress=on_progress, **how)
    return loaded.cpu(), folder, align_labels(task, loaded.config), training


def _save(
    trained: Any,
    folder: Path,
    output: Path,
    run: Path,
    task: "Task",
    training: "Training",
    settings: "TrainSettings",
    *,
    force: bool,
    model: str,
) -> None:
    from compresskit.hub import read_map, save_checkpoint, training_card
    from compresskit.tasks import close_run

    asked = [(name, str(value)) for name, value in vars(settings).items() if value is not None]
    card = training_card(
        output.name,
        [("task", task.name), *_facts(training), *asked],
        architecture=type(trained).__name__,
        compressed=read_map(folder) is not None,
        base_model=None if Path(model).expanduser().is_dir() else model,
    )
    log = (run / "log.jsonl").read_text("utf-8")
    save_checkpoint(trained, folder, output, force=force, card=card, texts={"training.jsonl": log})
    close_run(run)


def _facts(training: "Training") -> list[tuple[str, str]]:
    return [
        *((f"dev {name}", f"{value:.4f}") for name, value in training.metrics.items()),
        ("best step", f"{training.best_step:,} of {training.steps:,}"),
        ("tokens of an input at most", str(training.max_length)),
        ("examples", f"{training.num_train:,} to train, {training.num_dev:,} to score"),
    ]


def _print(output: Path, task: "Task", training: "Training") -> None:
    from compresskit_cli import render

    facts = [*_facts(training), ("time", f"{training.time_s:,.1f} s"), ("saved to", str(output))]
    render.facts(f"Trained on {task.name}", facts)
