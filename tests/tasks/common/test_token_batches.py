import numpy as np
import pytest

from regdrop.tasks.common.token_batches import TokenBatchSampler

LENGTHS = np.random.default_rng(0).integers(2, 40, 500).tolist()


def batches(epoch=0, **options):
    sampler = TokenBatchSampler(LENGTHS, 200, **options)
    sampler.set_epoch(epoch)
    found = list(sampler)
    assert len(found) == len(sampler)
    return found


def test_every_sentence_once_and_no_batch_above_the_limit():
    found = batches()
    assert sorted(i for batch in found for i in batch) == list(range(500))
    sizes = [len(batch) * max(LENGTHS[i] for i in batch) for batch in found]
    assert max(sizes) <= 200
    assert np.mean(sizes) > 180


def test_epochs_differ_and_come_again():
    assert batches(0) == batches(0)
    assert batches(0) != batches(1)
    assert {tuple(b) for b in batches(0)} != {tuple(b) for b in batches(1)}
    assert len(batches(0)) == len(batches(1))
    assert batches(seed=1) != batches(seed=2)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_share_nothing_and_take_equal_steps(num_ranks):
    parts = [batches(rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    assert len({len(part) for part in parts}) == 1
    seen = [i for part in parts for batch in part for i in batch]
    assert len(seen) == len(set(seen))
    left_out = len(batches()) - sum(len(part) for part in parts)
    assert 0 <= left_out < num_ranks


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"training\.batch_size .* at least the 9 tokens"):
        TokenBatchSampler([3, 9], 8)
    with pytest.raises(ValueError, match="a batch for each of 3 processes, got 1"):
        TokenBatchSampler([3, 4], 8, num_ranks=3)
