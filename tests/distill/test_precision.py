"""Which precision attention is trained in; that it changes nothing else."""

import contextlib
import functools
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors import SafetensorError
from torch.nn.functional import scaled_dot_product_attention

from compresskit.distill import Stage, run_stages
from compresskit.distill.precision import trained_attention
from compresskit.errors import OutputError
from tests.distill.tiny import arguments, collate, compressed, examples, model, objective, trainer

CPU = torch.device("cpu")


def asked(*, bf16=True, device=CPU, gradient_checkpointing=False, torch_compile=False):
    return trained_attention(
        SimpleNamespace(
            bf16=bf16, device=device, gradient_checkpointing=gradient_checkpointing, torch_compile=torch_compile
        )
    )


def attend(dtype, *, mask, trains=True):
    """Attention of 2 x 3 heads over 5 tokens, and the gradient of the queries."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 8).to(dtype).requires_grad_(trains) for _ in range(3))
    masks = {"none": None, "bool": torch.rand(2, 1, 5, 5) < 0.8, "float": torch.randn(2, 1, 5, 5).to(dtype)}
    result = scaled_dot_product_attention(query, key, value, attn_mask=masks[mask], scale=0.3)
    if trains:
        result.square().sum().backward()
    return result.detach(), query.grad


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_it_is_that_of_float32_rounded_once(mask):
    with torch.autocast("cpu", torch.bfloat16), asked():
        ours, gradient = attend(torch.bfloat16, mask=mask)
    assert ours.dtype == gradient.dtype == torch.bfloat16
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 8).bfloat16().float().requires_grad_() for _ in range(3))
    masks = {"none": None, "bool": torch.rand(2, 1, 5, 5) < 0.8}
    masks["float"] = torch.randn(2, 1, 5, 5).bfloat16().float() if mask == "float" else None
    wide = scaled_dot_product_attention(query, key, value, attn_mask=masks[mask], scale=0.3)
    torch.testing.assert_close(ours, wide.detach().bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "how",
    [{"bf16": False}, {"device": torch.device("cuda")}, {"gradient_checkpointing": True}, {"torch_compile": True}],
)
def test_elsewhere_it_is_left_alone(how):
    plain = attend(torch.bfloat16, mask="none")
    with asked(**how):
        ours = attend(torch.bfloat16, mask="none")
    torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_with_dropout_it_is_left_alone():
    found = []
    for context in (asked(), contextlib.nullcontext()):
        torch.manual_seed(0)
        query, key, value = (torch.randn(2, 3, 5, 8).bfloat16().requires_grad_() for _ in range(3))
        with context:
            found.append(scaled_dot_product_attention(query, key, value, dropout_p=0.5).detach())
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_what_it_does_not_know_is_left_to_pytorch():
    with asked(), pytest.raises(TypeError, match="unheard_of"):
        scaled_dot_product_attention(*(torch.randn(1, 1, 2, 4).bfloat16() for _ in range(3)), unheard_of=True)


def test_without_a_gradient_and_in_other_precisions_it_is_left_alone():
    with asked():
        for dtype in (torch.float32, torch.float64):
            assert attend(dtype, mask="float")[0].dtype == dtype
        with torch.no_grad():
            ours, _ = attend(torch.bfloat16, mask="none", trains=False)
    plain, _ = attend(torch.bfloat16, mask="none", trains=False)
    torch.testing.assert_close(ours, plain, rtol=0, atol=0)


@pytest.mark.parametrize("own", [False, True])
def test_a_student_gets_its_forward_pass_back(own, tmp_path):
    """After stages in bfloat16 it answers as its saved weights do, also where it had a forward pass of its own."""
    teacher = model("sequence")
    student = compressed(teacher)
    if own:
        student.forward = functools.partial(type(student).forward, student)
    before = student.__dict__.get("forward")
    args = arguments(tmp_path, bf16=True, max_steps=2)
    stage = Stage(
        name="a",
        teacher=teacher,
        objective=objective("logits"),
        args=args,
        train_dataset=examples("sequence"),
        data_collator=collate,
    )
    run_stages(student, [stage])
    assert student.__dict__.get("forward") is before
    assert "_original_forward" not in student.__dict__
    assert student(torch.tensor([[5, 6, 7]])).logits.dtype == torch.float32


def test_the_student_s_backward_pass_is_in_float32_and_the_teacher_s_forward_pass_is_not(tmp_path):
    """Seen below autograd, where the types are those that are computed in."""
    teacher = model("sequence", attention_probs_dropout_prob=0)
    goal = objective("hidden-states", "logits")
    training = trainer(teacher, compressed(teacher), goal, tmp_path, data=examples("sequence"), bf16=True, max_steps=1)
    kinds = []

    class _Types(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "scaled_dot_product" in str(func):
                kinds.append(("backward" in str(func), args[0].dtype))
            return func(*args, **(kwargs or {}))

    with _Types():
        training.train()
    assert {dtype for backward, dtype in kinds if backward} == {torch.float32}
    assert {dtype for backward, dtype in kinds if not backward} == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_checkpoint_that_cannot_be_written_is_said(error, tmp_path, monkeypatch):
    teacher = model("sequence")
    training = trainer(teacher, compressed(teacher), objective("logits"), tmp_path, data=examples("sequence"))

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(transformers.Trainer, "_save", fail)
    with pytest.raises(OutputError, match=r"no checkpoint could be written .*No space left"):
        training._save_checkpoint(training.model, None)
