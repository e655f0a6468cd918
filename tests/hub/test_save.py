"""Writing checkpoints: complete or not at all, and with all that a user of the model needs beside the weights."""

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from compresskit.errors import CheckpointError, OutputError
from compresskit.hub import check_output, load_model, save, save_checkpoint
from tests.hub.tiny import assert_same_tensors, compressed, dense, outputs


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model folder with a tokenizer and much else."""
    folder = tmp_path / "source"
    dense("bert").save_pretrained(folder)
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "a", "b", "c"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    options = {"tokenizer_object": tokenizer, "pad_token": "[PAD]", "unk_token": "[UNK]"}
    transformers.PreTrainedTokenizerFast(**options).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True})
    )
    names = ("Transformer", ""), ("Pooling", "1_Pooling")
    modules = [
        {"idx": idx, "name": str(idx), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for idx, (kind, path) in enumerate(names)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 16, "do_lower_case": False}))
    for name in ("vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "preprocessor_config.json"):
        (folder / name).write_text("{}")
    for name in ("pytorch_model.bin", "README.md", "training_args.bin", "optimizer.pt", ".gitattributes"):
        (folder / name).write_text("not to be copied")
    (folder / "0_Transformer").mkdir()
    (folder / "onnx").mkdir()
    return folder


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_weights_companions_and_card(source: Path, tmp_path: Path) -> None:
    model = compressed("bert")
    written = save_checkpoint(model, source, tmp_path / "new" / "small", card="# small\n")
    assert written == tmp_path / "new" / "small"
    assert set(listing(written)) == {
        "config.json",
        "model.safetensors",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        "chat_template.jinja",
        "preprocessor_config.json",
        "modules.json",
        "sentence_bert_config.json",
        "1_Pooling/config.json",
    }
    assert (written / "README.md").read_text() == "# small\n"
    assert list((tmp_path / "new").iterdir()) == [written]
    assert_same_tensors(model, load_model(written))
    assert transformers.AutoTokenizer.from_pretrained(written)("a c")["input_ids"] == [2, 4]


def test_sentence_transformers_opens_the_result(source: Path, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    written = save_checkpoint(compressed("bert"), source, tmp_path / "small")
    encoder = sentence_transformers.SentenceTransformer(str(written), device="cpu")
    ids = torch.tensor([[2, 3, 4]])
    with torch.no_grad():
        mean = compressed("bert")(ids).last_hidden_state.mean(1)
    torch.testing.assert_close(torch.tensor(encoder.encode(["a b c"])), mean)
    encoder.save(str(tmp_path / "again"))
    torch.testing.assert_close(load_model(tmp_path / "again")(ids)[0], compressed("bert")(ids)[0])


def test_files_of_the_new_model_win(source: Path, tmp_path: Path) -> None:
    (source / "generation_config.json").write_text(json.dumps({"max_length": 7}))
    model = compressed("gpt2")
    model.generation_config.max_length = 9
    written = save_checkpoint(model, source, tmp_path / "small")
    assert json.loads((written / "generation_config.json").read_text())["max_length"] == 9


def test_an_output_that_exists_is_kept(source: Path, tmp_path: Path) -> None:
    before = listing(source)
    with pytest.raises(OutputError, match=r"source exists and is not empty; choose another folder or force"):
        save_checkpoint(compressed("bert"), None, source)
    assert listing(source) == before
    (tmp_path / "empty").mkdir()
    assert load_model(save_checkpoint(compressed("bert"), None, tmp_path / "empty"))


def test_force_replaces_a_model_even_the_one_it_came_from(source: Path, tmp_path: Path) -> None:
    model = compressed("bert")
    link = tmp_path / "link"
    link.symlink_to(source)
    save_checkpoint(model, source, link, force=True)
    assert link.is_symlink()
    assert_same_tensors(model, load_model(source))
    assert (source / "tokenizer.json").is_file()
    assert not (source / "pytorch_model.bin").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"source", "link"}


def test_force_replaces_nothing_but_models(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("dear")
    with pytest.raises(OutputError, match=r"home holds something else than a model .* and is not replaced"):
        save_checkpoint(compressed("bert"), None, tmp_path / "home", force=True)
    assert listing(tmp_path) == {"home/letters.txt": b"dear"}


def test_outputs_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output, match in (("file", "file is a file; give the name of a folder"), ("file/below/it", "file is a file")):
        with pytest.raises(OutputError, match=match):
            check_output(tmp_path / output, force=True)
    check_output(tmp_path / "new" / "folder", force=False)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(OutputError, match=f"cannot be made: {tmp_path} is not writable"):
        check_output(tmp_path / "new", force=False)


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("where", ["copyfile", "copytree", "rename"])
@pytest.mark.parametrize(
    ("error", "expected"),
    [(OSError(errno.ENOSPC, "No space left on device"), OutputError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_failures_leave_everything_as_it_was(
    error: BaseException,
    expected: type[BaseException],
    where: str,
    force: bool,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "old" if force else tmp_path / "new" / "folder"
    if force:
        shutil.copytree(source, output)
    before = listing(tmp_path)
    if where == "rename":
        rename = Path.rename
        # the last step, after the old folder was moved away
        monkeypatch.setattr(
            Path, "rename", lambda path, to: rename(path, to) if path.suffix != ".tmp" else failing(error)()
        )
    else:
        monkeypatch.setattr(save.shutil, where, failing(error))
    with pytest.raises(expected, match="No space left" if expected is OutputError else None):
        save_checkpoint(compressed("bert"), source, output, force=force)
    assert listing(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == ({"source", "old"} if force else {"source"})


def test_a_file_that_cannot_grow(tmp_path: Path) -> None:
    """What a full disk does to safetensors: the operating system refuses further bytes."""
    model = compressed("bert")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OutputError, match=r"could not be written: .*What was there before is untouched"):
            save_checkpoint(model, None, tmp_path / "small")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_no_space_left_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(save.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"no space left for .*: the model takes 0 MB, 0 MB are free"):
        save_checkpoint(compressed("bert"), None, tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_other_modules_have_no_checkpoints_of_this_kind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"only transformers models .*, this is a Linear"):
        save_checkpoint(nn.Linear(2, 2), None, tmp_path / "small")


def test_a_dense_model_is_saved_just_so(tmp_path: Path) -> None:
    again = load_model(save_checkpoint(dense("bert"), None, tmp_path / "same"))
    torch.testing.assert_close(outputs(again), outputs(dense("bert")), rtol=0, atol=0)
