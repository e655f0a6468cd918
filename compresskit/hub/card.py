"""The model card: README.md of a compressed checkpoint."""

from collections.abc import Sequence

from huggingface_hub import ModelCardData

Row = tuple[str, str]


def model_card(
    title: str,
    rows: Sequence[Row],
    *,
    architecture: str = "AutoModel",
    base_model: str | None = None,
    tags: Sequence[str] = (),
    left_dense: Sequence[Row] = (),
) -> str:
    """Text of a model card: what this is, how to open it, its numbers, and what was left as it was.

    Args:
        title: name of the checkpoint.
        rows: label and value of each number of the report, in order.
        architecture: class to open it with.
        base_model: hub id of the original, if it has one.
        tags: beside `compresskit`.
        left_dense: weight matrices that were not replaced, each with the reason.
    """
    data = ModelCardData(
        base_model=base_model, library_name="compresskit", tags=list(dict.fromkeys(["compresskit", *tags]))
    )
    origin = f" of [{base_model}](https://huggingface.co/{base_model})" if base_model else ""
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title}",
        f"A compressed version{origin}: weight matrices were replaced by products of small factors with "
        "[compresskit](https://pypi.org/project/compresskit/). It is an ordinary Hugging Face checkpoint with one "
        "condition: import compresskit first. Without it, transformers stops with an error about the sizes of weights.",
        "## How to open it",
        "```python\nimport compresskit\n"
        f'from transformers import {architecture}\n\nmodel = {architecture}.from_pretrained("{title}")\n```',
        "`model.dequantize()` gives dense layers again, for tools that need them.",
    ]
    if rows:
        parts += ["## Numbers", _table(("measure", "value"), rows)]
    if left_dense:
        parts += ["## Left as it was", _table(("weight", "reason"), left_dense)]
    return "\n\n".join(parts) + "\n"


def training_card(
    title: str,
    rows: Sequence[Row],
    *,
    architecture: str,
    compressed: bool,
    base_model: str | None = None,
    how: str = "Trained on a task",
) -> str:
    """Text of the model card of a model that was trained.

    Args:
        how: it was made; a sentence that goes on "with compresskit".
        rows: label and value of each setting and metric, in order.
        compressed: it has factorised layers, so compresskit has to be imported first.
    """
    data = ModelCardData(base_model=base_model, tags=["compresskit"] if compressed else None)
    header = [f"---\n{data.to_yaml()}\n---"] if data.to_dict() else []
    lines = ["import compresskit"] if compressed else []
    lines += [f"from transformers import {architecture}", "", f'model = {architecture}.from_pretrained("{title}")']
    parts = [
        *header,
        f"# {title}",
        f"{how} with [compresskit](https://pypi.org/project/compresskit/).",
        "## How to open it",
        "\n".join(["```python", *lines, "```"]),
        "## Numbers",
        _table(("measure", "value"), rows),
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: Row, rows: Sequence[Row]) -> str:
    lines = [head, ("---", "---"), *rows]
    return "\n".join(f"| {_cell(label)} | {_cell(value)} |" for label, value in lines)


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
