"""Plain text without labels: what a corpus stage of distillation reads. See `load_corpus`."""

from compresskit.tasks.task import Task, register_task

register_task(Task(name="text", kind="text", text_columns=(("text",),), label_column=()))
