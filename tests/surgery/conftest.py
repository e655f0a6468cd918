"""What the tests of surgery share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_random_numbers():
    """Layers that a test makes have the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
