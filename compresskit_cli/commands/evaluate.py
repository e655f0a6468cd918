"""`compresskit evaluate`: the metrics of a model on a task, beside those of another if one is given."""

import json
from typing import TYPE_CHECKING, Any

import click

from compresskit_cli.command import Command
from compresskit_cli.options import DTYPES
from compresskit_cli.task_options import TaskChoice, task_options

if TYPE_CHECKING:
    from compresskit.tasks import Evaluation, Task


@click.command(name="evaluate", cls=Command)
@click.argument("model")
@task_options
@click.option("--split", default="dev", show_default=True, help="Split to score: dev, test, train, or as files say.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Examples in a batch.")
@click.option("--against", metavar="MODEL", help="A second model, to see what differs.")
@click.option("--limit", type=click.IntRange(2), help="Score the first examples only.")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", help="Load weights as; auto: as they are.")
@click.option("--device", default="auto", help="Run on this device; auto: a GPU if there is one.")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str,
    data: str | None,
    max_length: int | None,
    split: str,
    batch_size: int,
    against: str | None,
    limit: int | None,
    dtype: str,
    device: str,
    revision: str | None,
    as_json: bool,
    **choice: Any,
) -> None:
    """Score MODEL, dense or compressed, on a task.

    MODEL is a folder or hub id. Examples:

    \b
        compresskit evaluate ./model --task sst2 --data glue
        compresskit evaluate ./small --task sts --data glue --against ./model
      compresskit evaluate ./small --task perplexity --data ./held_out.txt --against ./model
        compresskit evaluate ./model --kind classification --text-column review --label-column stars --data dev.csv
    """
    from compresskit.tasks import agreement
    from compresskit_cli.training import quiet

    chosen = TaskChoice(**choice)
    task = chosen.chosen()
    quiet()
    options: dict[str, Any] = {
        "data": data,
        "split": split,
        "batch_size": batch_size,
        "max_length": max_length,
        "limit": limit,
    }
    options |= {"dtype": dtype, "device": device, "align": not chosen.label_names}
    aligned, found, parameters = _score(model, task, revision=revision, **options)
    result = _facts(model, found, parameters)
    if against is not None:
        other_aligned, other, other_parameters = _score(against, task, revision=None, **options)
        result["against"] = {
            **_facts(against, other, other_parameters),
            "agreement": agreement(aligned, found.predictions, _reordered(other_aligned, aligned, other.predictions)),
        }
    result = {"task": task.name, "split": split, "examples": found.num_examples, **result}
    if as_json:
        click.echo(json.dumps(result, indent=1))
    else:
        _print(result)


def _score(
    model: str, task: "Task", *, revision: str | None, data: str | None, split: str, dtype: str, device: str, **how: Any
) -> tuple["Task", "Evaluation", int]:
    """The task with its labels in the model's order, what was found, and the number of parameters."""
    from compresskit.hub import resolve
    from compresskit.tasks import align_labels, load_task_data, model_for, run_evaluation, tokenizer_for
    from compresskit_cli.loading import usable_device
    from compresskit_cli.training import evaluation_bar

    where, folder = usable_device(device), resolve(model, revision)
    loaded, tokenizer = model_for(task, folder, dtype=dtype), tokenizer_for(folder)
    if how.pop("align") or not task.label_names:
        task = align_labels(task, loaded.config)
    limit = how.pop("limit")
    examples = load_task_data(task, data, split)
    if limit is not None:
        examples = examples.select(range(min(limit, len(examples))))
    with evaluation_bar("evaluating") as on_batch:
        found = run_evaluation(loaded.to(where), tokenizer, task, examples, align=False, on_batch=on_batch, **how)
    return task, found, sum(parameter.numel() for parameter in loaded.parameters())


def _reordered(theirs: "Task", mine: "Task", predictions: Any) -> Any:
    """Predicted label numbers of one order of the labels in those of the other."""
    import numpy

    if mine.kind != "classification" or theirs.label_names == mine.label_names:
        return predictions
    return numpy.array([mine.label_names.index(name) for name in theirs.label_names])[predictions]


def _facts(model: str, found: "Evaluation", parameters: int) -> dict[str, Any]:
    return {
        "model": model,
        "parameters": parameters,
        "time_s": found.time_s,
        "examples_per_s": found.examples_per_s,
        "metrics": found.metrics,
    }


def _print(result: dict[str, Any]) -> None:
    from compresskit_cli import render

    models = [result, *([result["against"]] if "against" in result else [])]
    columns = ("model", "parameters", *result["metrics"], "examples/s")
    rows = [
        (
            found["model"],
            render.count(found["parameters"]),
            *(f"{value:.4f}" for value in found["metrics"].values()),
            f"{found['examples_per_s']:,.0f}",
        )
        for found in models
    ]
    render.table(f"{result['task']}, {result['split']}, {result['examples']:,} examples", columns, rows)
    if "against" in result:
        said = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in models[1]["agreement"].items())
        render.say(f"Agreement of the two: {said}.")
