"""Trainings that are killed and resumed, and trainings in several processes."""

import signal

import torch
from safetensors.torch import load_file

from compresskit.distill import last_checkpoint
from tests.distill.worker import start


def finish(processes):
    """Wait for all of them; their statuses."""
    outputs = [process.communicate(timeout=120) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode in (0, -signal.SIGKILL), errors[-3000:]
    return [process.returncode for process in processes]


def result(folder):
    return load_file(folder / "result.safetensors")


def test_a_killed_training_resumes_bit_equal(tmp_path):
    """With dropout, shuffling, accumulation and learned projections; weights, projections and all losses."""
    settings = {"BATCH": "2", "ACCUMULATE": "2"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    running = start(whole, "whole", **settings)
    assert finish(start(broken, "killed", **settings)) == [-signal.SIGKILL]
    assert last_checkpoint(broken).name == "checkpoint-3"
    assert finish(start(broken, "resumed", **settings)) == [0]
    assert finish(running) == [0]
    torch.testing.assert_close(result(broken), result(whole), rtol=0, atol=0)


def test_two_processes_train_as_one(tmp_path):
    """Each has half the batch, with examples of different lengths and numbers of labels; only rounding differs.

    With plain gradient descent: Adam makes whole steps of gradients that are 0 but for rounding (biases of keys).
    """
    settings = {"SAMPLING": "sequential", "DROPOUT": "0", "OPTIMISER": "sgd", "RATE": "0.02"}
    alone = start(tmp_path / "one", "whole", BATCH="4", **settings)
    both = start(tmp_path / "two", "whole", processes=2, BATCH="2", **settings)
    assert finish([*alone, *both]) == [0, 0, 0]
    one, two = result(tmp_path / "one"), result(tmp_path / "two")
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
