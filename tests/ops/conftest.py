import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` returns NaN, so that reading what was never written shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
