import sys
from pathlib import Path

import pytest
import torch

# The slow reference beside the tests is imported by name.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
