"""The nine tasks of GLUE, as its files and the hub name their columns.

Source: Wang et al., GLUE (ICLR 2019); metrics are those of its leaderboard, for QQP and MRPC both of them.
"""

from compresskit.tasks.task import SPLITS, HubSource, Kind, Task, register_task

HUB = "nyu-mll/glue"
FIRST, SECOND = ("sentence1", "#1 String", "premise"), ("sentence2", "#2 String", "hypothesis")
ENTAILMENT = ("entailment", "not_entailment")


def _glue(
    name: str,
    *text_columns: tuple[str, ...],
    label_names: tuple[str, ...] = (),
    label_column: tuple[str, ...] = ("label",),
    kind: Kind = "classification",
    metrics: tuple[str, ...] = ("accuracy",),
    headerless: tuple[str, ...] = (),
    splits: dict[str, tuple[str, ...]] | None = None,
) -> Task:
    return register_task(
        Task(
            name=name,
            kind=kind,
            text_columns=text_columns,
            label_column=label_column,
            label_names=label_names,
            metrics=metrics,
            hub=HubSource(HUB, name),
            folders=(name,),
            headerless=headerless,
            splits={**SPLITS, **(splits or {})},
        )
    )


_glue("sst2", ("sentence",), label_names=("negative", "positive"))
_glue(
    "cola",
    ("sentence",),
    label_names=("unacceptable", "acceptable"),
    metrics=("mcc", "accuracy"),
    headerless=("source", "label", "mark", "sentence"),
)
_glue(
    "mrpc",
    FIRST,
    SECOND,
    label_names=("not_equivalent", "equivalent"),
    label_column=("label", "Quality"),
    metrics=("f1", "accuracy"),
)
_glue(
    "qqp",
    ("question1",),
    ("question2",),
    label_names=("not_duplicate", "duplicate"),
    label_column=("label", "is_duplicate"),
    metrics=("accuracy", "f1"),
)
_glue("stsb", FIRST, SECOND, kind="regression", label_column=("score", "label"), metrics=("spearman", "pearson"))
_glue(
    "mnli",
    FIRST,
    SECOND,
    label_names=("entailment", "neutral", "contradiction"),
    label_column=("label", "gold_label"),
    splits={
        "dev": ("dev_matched", "validation_matched"),
        "dev-mismatched": ("dev_mismatched", "validation_mismatched"),
        "test": ("test_matched",),
    },
)
_glue("qnli", ("question",), ("sentence",), label_names=ENTAILMENT)
_glue("rte", FIRST, SECOND, label_names=ENTAILMENT)
_glue("wnli", FIRST, SECOND, label_names=("not_entailment", "entailment"))
