"""Why the passes of a batch are not stacked: what is said of it is true."""

import re

import pytest
import torch
from torch import nn

from regdrop.heads import Head
from regdrop.integrations.transformers.forward.verify import why_rows_depend
from regdrop.loss import cross_entropy_terms

ROWS = 4


class Net(nn.Module):
    """Scores rows of numbers, which a function has made of the batch."""

    def __init__(self, read=lambda x: x, score=lambda x: x):
        super().__init__()
        self.layer, self.read, self.score = nn.Linear(6, 3), read, score

    def forward(self, x):
        return self.score(self.layer(self.read(x)))


def fixed(x):
    return x.view(ROWS, 6)


def unequal(x):
    return torch.stack([row.mean(0) for row in x])


ROWS_OF_NUMBERS = torch.randn(ROWS, 6)
UNEQUAL = [torch.randn(5 + i, 6) for i in range(ROWS)]
CASES = {
    "rowwise": (Net(), ROWS_OF_NUMBERS, None),
    "similarities": (Net(score=lambda x: x @ x.T), ROWS_OF_NUMBERS, "depend on the other rows"),
    "normalised": (Net(score=lambda x: x - x.cumsum(0)), ROWS_OF_NUMBERS, "depend on the other"),
    "fixed": (Net(fixed), ROWS_OF_NUMBERS, r"does not take a stacked batch \(RuntimeError: shape"),
    "cut": (Net(score=lambda x: x[:ROWS]), ROWS_OF_NUMBERS, "4 rows for two .*, and 4 for one"),
    "unequal": (Net(unequal), UNEQUAL, r"its batch cannot be stacked \(batch holds a list of 4"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_reason_is_that_of_the_model(name):
    model, x, reason = CASES[name]
    target = torch.zeros(ROWS, dtype=torch.long)
    head = Head({"x": x}, target, cross_entropy_terms, outputs=lambda scores: scores)
    found = why_rows_depend(model, head)
    assert (found is None) == (reason is None)
    assert re.search(reason or "", found or "")


def test_memory_that_runs_out_is_no_reason():
    def score(x):
        return x if len(x) == ROWS else torch.empty(10**16)

    target = torch.zeros(ROWS, dtype=torch.long)
    head = Head({"x": ROWS_OF_NUMBERS}, target, cross_entropy_terms, outputs=lambda scores: scores)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        why_rows_depend(Net(score=score), head)
