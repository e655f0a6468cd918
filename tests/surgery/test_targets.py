"""Plans for a machine and a number of tokens: what they take, refuse and remember."""

import json

import pytest
import torch
from torch import nn

import compresskit
from compresskit.errors import BudgetError, OptionError, PlanError, UnknownNameError
from compresskit.machines import machine, machine_text


def model():
    return nn.Sequential(nn.Linear(384, 384), nn.ReLU(), nn.Linear(384, 1536))


def test_times_are_those_of_the_machine_and_the_tokens():
    for name, tokens in (("cpu", 128), ("h100", 1), ("cpu-bf16", 1024)):
        planned = compresskit.plan(model(), "svd", ratio=4, machine=name, tokens=tokens, allow_slower=True)
        site, made = planned.sites[0], machine(name)
        assert planned.target == site.target
        assert (planned.target.machine.name, planned.target.tokens) == (name, tokens)
        expected_s = made.speeds("low-rank").time_s(site.structure.operations(tokens))
        assert site.time_ns == round(1e9 * expected_s)


def test_what_is_fast_on_one_machine_and_slow_on_another_is_taken_there_only():
    """Small Kronecker layers in bfloat16: by PyTorch slower than dense, by the compiled kernel not."""
    names = {name: compresskit.decomposition("kronecker") for name in ("cpu", "cpu-bf16-kernel")}
    for name, method in names.items():
        planned = compresskit.plan(model(), method, ratio=8, machine=name)
        assert planned.speedup > 1.5, name
        assert not any(site.slower for site in planned.sites)
    with pytest.raises(BudgetError, match=r"0 147,456 \(no structure as fast as dense\).* on cpu-bf16: two cores"):
        compresskit.plan(model(), "kronecker", ratio=8, machine="cpu-bf16")
    forced = compresskit.plan(model(), "kronecker", ratio=8, machine="cpu-bf16", allow_slower=True)
    assert any(site.slower for site in forced.sites)


def test_the_default_follows_the_type_of_the_weights():
    """Plans are those of the model, wherever they are made."""
    for dtype, name in ((torch.float32, "cpu"), (torch.float64, "cpu"), (torch.bfloat16, "cpu-bf16")):
        planned = compresskit.plan(model().to(dtype), "svd", ratio=4, allow_slower=True)
        assert planned.target.machine.name == name
    with pytest.raises(BudgetError, match=r"Times are expected for 128 tokens on cpu-bf16: two .*; allow_slower"):
        compresskit.plan(model().to(torch.bfloat16), "kronecker", ratio=8)
    assert compresskit.plan(model().to(torch.bfloat16), "kronecker", ratio=8, machine="cpu").speedup > 1


def test_plans_and_reports_remember_their_target():
    planned = compresskit.plan(model(), "svd", ratio=4, machine="cpu-kernel", tokens=16)
    data = json.loads(json.dumps(planned.to_json()))
    again = compresskit.plan_from_json(data, model())
    assert again.target == planned.target
    assert [site.time_ns for site in again.sites] == [site.time_ns for site in planned.sites]
    net = model()
    report = compresskit.apply(net, again)
    assert report.target == planned.target
    assert report.to_json()["target"]["machine"] == "cpu-kernel"
    assert report.expected_speedup == planned.speedup


def test_a_plan_of_before_has_the_default_target():
    data = compresskit.plan(model(), "svd", ratio=4, machine="cpu-kernel").to_json()
    del data["target"]
    assert compresskit.plan_from_json(data, model()).target == compresskit.plan(model(), "svd", ratio=4).target


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"tokens": "8", "machine": {}}, "'target' of a plan is an object"),
        (lambda target: target | {"tokens": 0}, "at least 1; got 0"),
        ({"tokens": 8, "machine": {}}, r"'target\.machine' of the plan lacks name, about"),
        ("cpu", "'target' of a plan is an object"),
    ],
)
def test_a_malformed_target_of_a_plan_is_refused(target, message):
    data = compresskit.plan(model(), "svd", ratio=4).to_json()
    data["target"] = target(data["target"]) if callable(target) else target
    with pytest.raises(PlanError, match=message):
        compresskit.plan_from_json(data, model())


def test_a_machine_may_be_a_file(tmp_path):
    (tmp_path / "mine.toml").write_text(machine_text(machine("cpu-bf16-kernel")), encoding="utf-8")
    by_file = compresskit.plan(model(), "svd", ratio=4, machine=tmp_path / "mine.toml")
    assert by_file.target == compresskit.plan(model(), "svd", ratio=4, machine="cpu-bf16-kernel").target


def test_unknown_machines_and_no_tokens_leave_the_model_alone():
    net = model()
    with pytest.raises(UnknownNameError, match="did you mean 'h100'"):
        compresskit.compress(net, "svd", ratio=4, machine="h10")
    with pytest.raises(OptionError, match="at least 1; got 0"):
        compresskit.compress(net, "svd", ratio=4, tokens=0)
    assert all(type(layer) in (nn.Linear, nn.ReLU) for layer in net)
