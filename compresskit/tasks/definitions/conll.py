"""Named entities of CoNLL-2003: files with one token a line, its tag last, blank lines between sentences.

Source: Tjong Kim Sang and De Meulder, CoNLL-2003.
"""

from compresskit.tasks.task import HubSource, Task, register_task

register_task(
    Task(
        name="conll2003",
        kind="token-classification",
        text_columns=(("tokens", "words"),),
        label_column=("ner_tags", "tags", "labels"),
        label_names=("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC"),
        hub=HubSource("eriktks/conll2003", revision="refs/convert/parquet"),
        folders=("conll2003", "conll"),
        splits={"train": ("train", "eng.train"), "dev": ("dev", "valid", "validation", "testa", "eng.testa")}
        | {"test": ("test", "testb", "eng.testb")},
        max_length=256,
    )
)
