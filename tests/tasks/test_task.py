"""Tasks as data: the registry, tasks of one's own, and what they refuse."""

import dataclasses
import typing

import click
import pytest

import compresskit.tasks as tasks
from compresskit.errors import OptionError, UnknownNameError
from compresskit.tasks.task import METRICS_OF, Kind
from compresskit_cli import task_options, train_options

GLUE = {"sst2", "mrpc", "rte", "cola", "stsb", "qnli", "qqp", "mnli", "wnli"}


def test_the_tasks_that_are_promised_are_there() -> None:
    assert GLUE | {"squad", "squad-v2", "sts", "conll2003", "text"} <= set(tasks.tasks())


@pytest.mark.parametrize("name", sorted(GLUE))
def test_glue_tasks_have_metrics_a_hub_id_and_their_own_number_of_labels(name: str) -> None:
    task = tasks.find_task(name)
    assert task.hub is not None
    assert (task.hub.id, task.hub.config) == ("nyu-mll/glue", name)
    assert task.primary in METRICS_OF[task.kind]
    assert len(task.label_names) == {"stsb": 0, "mnli": 3}.get(name, 2)


def test_a_name_is_found_in_any_case_and_a_wrong_one_suggests_the_nearest() -> None:
    assert tasks.find_task("SST2") is tasks.find_task("sst2")
    with pytest.raises(UnknownNameError, match="no task is called 'sst-2'; did you mean 'sst2'"):
        tasks.find_task("sst-2")


def test_two_tasks_cannot_share_a_name_but_one_may_be_registered_twice() -> None:
    task = tasks.find_task("rte")
    assert tasks.register_task(task) == task
    with pytest.raises(OptionError, match="two tasks are called 'rte'"):
        tasks.register_task(dataclasses.replace(task, max_length=64))
    assert tasks.find_task("rte") == task


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("sentiment", ("text",)), "'sentiment' is no kind of task; known: classification"),
        (("classification", ("a", "b", "c")), r"classification has 1 or 2 text column\(s\), not 3"),
        (("similarity", ("a",)), r"similarity has 2 text column\(s\), not 1"),
    ],
)
def test_a_custom_task_that_cannot_be_is_refused(arguments: tuple, match: str) -> None:
    with pytest.raises(OptionError, match=match):
        tasks.custom_task(*arguments)


def test_metrics_must_fit_the_kind_and_the_first_is_primary() -> None:
    assert tasks.custom_task("regression", ("a",), metrics=("pearson",)).primary == "pearson"
    with pytest.raises(OptionError, match="regression has no metric 'mcc'; it has: pearson, spearman"):
        tasks.custom_task("regression", ("a",), metrics=("mcc",))
    with pytest.raises(OptionError, match="two labels have the same name"):
        tasks.custom_task("classification", ("a",), label_names=("x", "x"))


def test_columns_can_be_renamed() -> None:
    task = tasks.with_columns(tasks.find_task("rte"), text_columns=("p", "h"), label_column="y", label_names=("u", "v"))
    assert (task.text_columns, task.label_column, task.label_names) == ((("p",), ("h",)), ("y",), ("u", "v"))
    assert tasks.with_columns(task) == task


def test_the_command_line_knows_the_kinds_and_the_settings() -> None:
    assert set(task_options.KINDS) == set(typing.get_args(Kind)) - {"text"}
    options = {parameter.name: parameter for parameter in _options(train_options.train_options)}
    fields = {field.name: field for field in dataclasses.fields(tasks.TrainSettings)}
    assert set(options) == set(fields)
    given = click.Command("train", params=list(options.values())).make_context("train", []).params
    assert given == {name: field.default for name, field in fields.items()}


def _options(decorate):
    def command():
        pass

    return decorate(command).__click_params__
