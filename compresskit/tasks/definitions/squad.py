"""SQuAD 1.1 and 2.0: the answer is a span of the context, in 2.0 perhaps none.

Source: Rajpurkar et al., EMNLP 2016 and ACL 2018.
"""

from compresskit.tasks.task import HubSource, Task, register_task

for _name, _hub, _version, _unanswerable in (
    ("squad", "rajpurkar/squad", "v1.1", False),
    ("squad-v2", "rajpurkar/squad_v2", "v2.0", True),
):
    register_task(
        Task(
            name=_name,
            kind="question-answering",
            text_columns=(("question",), ("context",)),
            label_column=("answers",),
            metrics=("answer_f1", "exact_match"),
            hub=HubSource(_hub),
            folders=(_name, f"squad-{_version}"),
            splits={"train": (f"train-{_version}", "train"), "dev": (f"dev-{_version}", "dev", "validation")},
            max_length=384,
            unanswerable=_unanswerable,
        )
    )
