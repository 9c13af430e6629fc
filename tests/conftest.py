import gc
import os
import sys
from pathlib import Path

import pytest
import torch

# The slow reference beside the tests is imported by name.
sys.path.insert(0, str(Path(__file__).parent))


# Without a GPU, Triton interprets its kernels: to be set before anything imports it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """Keep what was imported out of later collections.

    Every training ends by one, which took longer than the training: libraries hold millions of
    objects.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let the interpreter end as without it."""
    gc.unfreeze()
