"""What the tests of surgery share."""

import pytest
import torch

from compresskit.decompositions.blast import Blast


@pytest.fixture(autouse=True)
def _short_fits(monkeypatch):
    """Plans and swaps are the same with shorter searches, and half of the time would go into them."""
    *others, rounds = Blast.__init__.__defaults__
    assert rounds == Blast().rounds
    monkeypatch.setattr(Blast.__init__, "__defaults__", (*others, 3))


@pytest.fixture(autouse=True)
def _same_random_numbers():
    """Layers that a test makes have the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
