"""Peers compute what ours compute, those that are missing say so, and a difference is an error."""

import importlib.metadata

import pytest
import torch

import compresskit
from benchmarks import peers
from benchmarks.experiments import ExperimentSkipped, SuiteError
from benchmarks.experiments.peers import Peers
from benchmarks.experiments.roofline import Roofline, one_structure
from benchmarks.peers import PEERS, Place, make_peer, our_layer
from benchmarks.suites import read_suite

HERE = Place(torch.device("cpu"), torch.float32)


@pytest.fixture(autouse=True)
def _same_numbers():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("shape", [(384, 384), (768, 384)])
def test_a_peer_and_our_layer_compute_the_same_with_as_many_parameters(name, shape):
    try:
        peer = make_peer(name, *shape, HERE)
    except ExperimentSkipped as skipped:
        pytest.skip(str(skipped))
    ours, num_params = our_layer(peer, HERE)
    x = torch.randn(5, shape[1])
    with torch.inference_mode():
        expected = x @ peer.weight.T
        for forward in (peer.forward, ours):
            torch.testing.assert_close(
                forward(x) / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=1e-4
            )
    assert num_params <= peer.num_params <= num_params + peers.RANK
    assert num_params < shape[0] * shape[1]


def test_all_peers_are_in_the_suite():
    assert {entry.experiment.peer for entry in read_suite("peers")} == set(PEERS)


def test_a_peer_that_is_not_installed_is_skipped_with_the_remedy(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    remedies = {"fastkron": r"pyfastkron is not installed: pip install --no-deps pyfastkron"}
    for name in PEERS:
        with pytest.raises(
            ExperimentSkipped, match=remedies.get(name, r"is not installed: pip install 'compresskit\[bench")
        ):
            make_peer(name, 64, 64, HERE)


def test_a_peer_that_nobody_knows():
    with pytest.raises(SuiteError, match="there is no peer 'tltorch'"):
        make_peer("tltorch", 64, 64, HERE)


def test_layers_that_differ_are_not_compared(monkeypatch):
    def other(peer, place):
        return compresskit.SVD(rank=2).fit(torch.randn(64, 64), ratio=1).to_module(), 256

    monkeypatch.setattr(peers, "our_layer", other)
    with pytest.raises(AssertionError, match="ours of peft-lokr computes something else: off by"):
        Peers(peer="peft-lokr", shape="64x64", tokens=(4,), repeats=1).run(None)


def test_a_device_that_is_not_there_skips_the_experiment():
    for experiment in (Peers(peer="peft-lokr", device="cuda:99"), read_suite("gpu")[0].experiment):
        if experiment.device == "cuda" and torch.cuda.is_available():
            continue
        with pytest.raises(ExperimentSkipped, match=f"device '{experiment.device}' cannot be used here"):
            experiment.run(None)


def test_bfloat16_runs_too():
    figures = Peers(peer="peft-lokr", shape="64x64", tokens=(4,), repeats=1, dtype="bfloat16").run(None).figures
    assert figures["tokens_4"]["differences"]["ours"] < 0.05


def test_the_roofline_needs_one_structure():
    with pytest.raises(SuiteError, match=r"roofline: svd with '' has 32 structures for 64x64"):
        Roofline(method="svd", options="", shape="64x64").run(None)


def test_structures_of_the_gpu_suite_exist():
    shapes = {"768x768", "3072x768", "768x3072", "4096x4096", "11008x4096", "4096x11008"}
    experiments = [entry.experiment for entry in read_suite("gpu")]
    layers = [experiment for experiment in experiments if experiment.kind == "roofline"]
    assert {layer.shape for layer in layers} == shapes
    for layer in layers:
        assert layer._structure().macs > 0
    fused = [experiment for experiment in experiments if experiment.kind == "fused"]
    assert {experiment.shape for experiment in fused} == shapes
    for experiment in fused:
        for options in experiment.options:
            assert one_structure("kronecker", options, experiment.shape).macs > 0
