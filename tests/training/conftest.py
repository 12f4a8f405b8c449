import pytest
import torch


@pytest.fixture
def one_thread():
    """As scripts have that tests start: sums of several threads differ in their last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
