import pytest
import torch

from regdrop.heads import Head
from regdrop.integrations.transformers.forward.attempt import attempt
from regdrop.integrations.transformers.forward.verify import compare_in_training
from regdrop.loss import cross_entropy_terms


def test_what_fails_is_no_answer_and_what_lacks_memory_is_raised():
    assert attempt(lambda: 3, otherwise=None) == 3
    assert attempt(lambda: {}["x"], otherwise="none") == "none"

    def fill():
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        attempt(fill, otherwise=None)
    with pytest.raises(RuntimeError, match="memory"):
        attempt(lambda: torch.empty(10**16), otherwise=None)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, ValueError])
def test_a_comparison_in_training_lacks_memory_or_finds_nothing(error):
    class Model(torch.nn.Linear):
        def forward(self, x, labels):
            raise error("what a model says")

    batch = {"x": torch.randn(2, 3), "labels": torch.zeros(2, dtype=torch.long)}
    head = Head(batch, batch["labels"], cross_entropy_terms, outputs=lambda output: output)
    if error is ValueError:
        assert compare_in_training(Model(3, 2), head, batch).own is None
        return
    with pytest.raises(error):
        compare_in_training(Model(3, 2), head, batch)
