"""Semantic textual similarity without a head: rank correlation of the cosines of embeddings with human scores.

Source: Cer et al., SemEval-2017 task 1 (STS benchmark); Reimers and Gurevych, EMNLP 2019, for the cosine.
"""

from compresskit.tasks.task import HubSource, Task, register_task

register_task(
    Task(
        name="sts",
        kind="similarity",
        text_columns=(("sentence1",), ("sentence2",)),
        label_column=("score", "label"),
        hub=HubSource("nyu-mll/glue", "stsb"),
        folders=("sts", "stsb", "stsbenchmark"),
    )
)
