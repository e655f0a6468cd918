"""Run by test_processes.py in a fresh process: opens checkpoints, first without compresskit, then with it.

python child.py FOLDER; prints JSON: `without` and `with` -> folder and class -> "equal", "opened", or the error.
"""

import importlib
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file


def attempt(folder: Path, name: str) -> str:
    try:
        model = getattr(transformers, name).from_pretrained(folder).eval()
    except (OSError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    inputs = load_file(folder / "expected" / "tensors.safetensors")
    expected = inputs.pop("expected")
    if name.startswith("Auto"):
        return "opened"
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # a mapped file is aligned otherwise, which shows in the last bit
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], expected, rtol=0, atol=0)
    return "equal"


def attempts(root: Path) -> dict[str, str]:
    return {
        f"{folder.name} {name}": attempt(folder, name)
        for folder in sorted(path for path in root.iterdir() if path.is_dir())
        for name in json.loads((folder / "expected" / "classes.json").read_text())
    }


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    without = attempts(Path(sys.argv[1]))
    assert "compresskit" not in sys.modules
    importlib.import_module("compresskit")
    print(json.dumps({"without": without, "with": attempts(Path(sys.argv[1]))}))


if __name__ == "__main__":
    main()
