import os

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers at every run; FASTRLHF_TEST_SEED takes others, to see whether a test hangs on them."""
    torch.manual_seed(int(os.environ.get("FASTRLHF_TEST_SEED", "0")))
