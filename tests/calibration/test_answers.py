"""What models answer is compared by the same tensors, however many are kept, and padding does not count."""

import copy

import pytest
import torch
from torch import nn

from compresskit.calibration import answers
from compresskit.calibration.answers import Answers
from compresskit.errors import CalibrationError
from tests.calibration.test_compress import samples
from tests.calibration.test_search import output_error
from tests.models import assert_unchanged, build, snapshot


def other(model):
    small = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(0.9)
    return small


def test_the_error_is_that_of_real_tokens():
    model, batches = build("bert").eval(), samples(3)
    small = other(model)
    assert Answers(model, batches).squared_error(small) ** 0.5 == pytest.approx(
        output_error(small, model, batches), rel=1e-5
    )
    longer = [{name: nn.functional.pad(tensor, (0, 3)) for name, tensor in batch.items()} for batch in batches]
    assert Answers(model, longer).squared_error(small) == pytest.approx(
        Answers(model, batches).squared_error(small), rel=1e-5
    )
    assert Answers(model, batches).squared_error(model) == 0


@pytest.mark.parametrize("most", [0, 4 * 12 * 48 * 4, 2**28])
def test_what_is_not_kept_is_asked_again(monkeypatch, most):
    model, batches = build("bert").train(), samples(3)
    small, before, asked = other(model), snapshot(model), []
    wanted = Answers(model, batches).squared_error(small)
    monkeypatch.setattr(answers, "MOST_BYTES", most)
    found = Answers(model, batches)
    handle = model.register_forward_hook(lambda *_: asked.append(1))
    assert found.squared_error(small) == pytest.approx(wanted, rel=1e-6)
    assert len(asked) == 3 - min(most // (4 * 12 * 48 * 4), 3)
    handle.remove()
    assert_unchanged(model, before)
    assert model.training
    assert all(parameter.requires_grad for parameter in (*model.parameters(), *small.parameters()))


class Odd(nn.Module):
    """Answers under names that nobody knows."""

    def __init__(self, answer):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self._answer = answer

    def forward(self, x):
        return self._answer(self.linear(x))


def test_other_outputs_are_compared_by_their_first_tensor():
    batches = [{"x": torch.randn(5, 4)}]
    fields = {"loss": lambda y: y.sum(), "ids": lambda y: y.argmax(-1)}
    named = Odd(lambda y: {**{name: f(y) for name, f in fields.items()}, "prediction_logits": y, "pooled": 100 * y})
    plain = Odd(lambda y: y)
    plain.load_state_dict(named.state_dict())
    wanted = Answers(plain, batches).squared_error(other(plain))
    assert wanted > 0
    assert Answers(named, batches).squared_error(other(named)) == pytest.approx(wanted)


def test_nothing_to_compare_is_said():
    with pytest.raises(CalibrationError, match="Odd returns no tensor of numbers"):
        Answers(Odd(lambda y: {"loss": y.sum()}), [{"x": torch.randn(5, 4)}])
