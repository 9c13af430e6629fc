"""Fraternal dropout: the squared difference of the logits, a mean over the classes of an item."""

import pytest
import torch

from regdrop.loss import combine_terms, fraternal_terms


@pytest.mark.parametrize("class_dim", [-1, 1])
@pytest.mark.parametrize("num_passes", [2, 3])
def test_items_of_a_sequence_have_a_difference_each(num_passes, class_dim):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_passes, 2, 4, 5, generator=generator)  # (passes, batch, length, C)
    target = torch.randint(5, (2, 4), generator=generator)
    target[0, 1] = -100
    stacked = logits.flatten(0, 1).movedim(-1, class_dim)
    terms = fraternal_terms(stacked, target, num_passes=num_passes, class_dim=class_dim)
    pairs = [(i, j) for i in range(num_passes) for j in range(i)]
    expected = sum(((logits[i] - logits[j]) ** 2).sum(-1) / 5 for i, j in pairs) / len(pairs)
    torch.testing.assert_close(terms.kl, expected.masked_fill(target == -100, 0))


def test_an_empty_batch_has_a_loss_of_zero():
    """One process of several may have it, and the others wait for that one."""
    terms = fraternal_terms(torch.zeros(0, 7), torch.zeros(0, dtype=torch.long), num_passes=2)
    output = combine_terms(terms, alpha=1.0, num_passes=2)
    assert [x.item() for x in output] == [0, 0, 0]
