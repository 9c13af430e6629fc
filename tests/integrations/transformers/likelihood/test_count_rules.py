"""By which rule terms of one's own count their items."""

import pytest
import torch

from regdrop.integrations.transformers.likelihood.count_rules import COUNT_RULES, find_count_rule
from regdrop.loss import ItemTerms

TARGET = torch.tensor([[0, 1, -100], [2, -100, -100], [1, 1, 2], [0, 0, 0]])
COUNTS = {"labels": 9, "rows": 4, "numbers": 12}


def terms(nll_count, kl_count):
    zero = torch.zeros(())
    return ItemTerms(zero, zero, torch.tensor(nll_count), torch.tensor(kl_count))


@pytest.mark.parametrize("name", COUNTS)
def test_a_rule_is_known_by_its_count(name):
    assert set(COUNTS) == set(COUNT_RULES)
    count = COUNTS[name]
    assert tuple(COUNT_RULES[name](TARGET)) == (count, count)
    assert find_count_rule(TARGET, terms(count, count)) == name
    assert find_count_rule(TARGET, terms(float(count), count)) == name


@pytest.mark.parametrize("counts", [(5, 5), (4, 9), (9.5, 9)])
def test_another_count_has_to_be_told(counts):
    message = rf"count must be given .* count {counts[0]:g} and {counts[1]} items .* \(4, 3\)"
    with pytest.raises(ValueError, match=message):
        find_count_rule(TARGET, terms(*counts))
