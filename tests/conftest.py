"""One hypothesis profile for all property tests, and one thread.

A tiny model spends more time on starting threads than on computing.
"""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from minimas import Qwen3

from .models import tiny_model

settings.register_profile(
    "minimas", deadline=None, derandomize=True, max_examples=30, print_blob=False
)
settings.load_profile("minimas")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model() -> Iterator[Qwen3]:
    """Return the untied Qwen3 in float64 that most tests use. No test may change it."""
    shared = tiny_model()
    before = shared.fingerprint()
    yield shared
    assert shared.fingerprint() == before, "a test changed the shared model"
