"""A training in a process of its own: `python -m tests.distill.worker FOLDER MODE`, by `start`.

MODE is `whole`, `killed` (kills itself one step after the first checkpoint) or `resumed`; WORLD_SIZE in the environment
makes it one process of several.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from compresskit.distill import Objective, TeacherCache, make_loss
from tests.distill.tiny import examples, model, trainer

ROOT = Path(__file__).parent.parent.parent


def start(folder: Path, mode: str, *, processes: int = 1, **settings: str) -> list[subprocess.Popen[str]]:
    """The processes of one training."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.distill.worker", str(folder), mode]
    started = []
    for rank in range(processes):
        several = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        several |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(processes)}
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **settings}
        environment |= several if processes > 1 else {}
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True))
    return started


class _Kill(transformers.TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)


def goal() -> Objective:
    return Objective(
        make_loss("hidden-states", {"projection": "linear"}),
        make_loss("relations", {"layers": [-1], "weight": 0.5}),
        make_loss("logits", {"temperature": 2.0}),
        make_loss("task"),
    )


def main() -> None:
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dropout = float(os.environ.get("DROPOUT", "0.1"))
    teacher = model("masked-lm")
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "hidden_dropout_prob": dropout}
    student = model("masked-lm", seed=1, attention_probs_dropout_prob=dropout, **sizes)
    torch.manual_seed(9)  # of the projections
    distillation = trainer(
        teacher,
        student,
        goal(),
        folder,
        data=examples("masked-lm", count=16),
        callbacks=[_Kill()] if mode == "killed" else [],
        cache=TeacherCache(folder / "cache") if "CACHE" in os.environ else None,
        per_device_train_batch_size=int(os.environ.get("BATCH", "4")),
        gradient_accumulation_steps=int(os.environ.get("ACCUMULATE", "1")),
        optim=os.environ.get("OPTIMISER", "adamw_torch"),
        learning_rate=float(os.environ.get("RATE", "1e-3")),
        train_sampling_strategy=os.environ.get("SAMPLING", "random"),
        save_strategy="steps",
        save_steps=3,
        **({"ddp_backend": "gloo"} if "WORLD_SIZE" in os.environ else {}),
    )
    projections = distillation._projections.modules
    distillation.train(resume_from_checkpoint=mode == "resumed")
    if distillation.is_world_process_zero():
        state = {name: tensor.clone() for name, tensor in student.state_dict().items()}
        state |= {f"projections.{name}": tensor for name, tensor in projections.state_dict().items()}
        state |= {"loss": torch.tensor([entry["loss"] for entry in distillation.state.log_history if "loss" in entry])}
        save_file(state, folder / "result.safetensors")


if __name__ == "__main__":
    main()
