"""Numbers of other items, of groups in order, and lengths of flat rows are refused by name."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from regdrop import RDropConfig, rdrop_step, repeat_batch
from regdrop.passes import take_items

X = torch.randn(6, 4)
NEIGHBOURS = torch.tensor([[1, 2], [0, 5], [3, 4], [2, 4], [5, 0], [4, 1]])


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("neighbours", NEIGHBOURS),
        ("knn_idx", NEIGHBOURS),
        ("neighbor_index", NEIGHBOURS.int()),
        ("neg_idx", NEIGHBOURS[:, 0]),
        ("anchor_index", NEIGHBOURS[:, 1]),
        ("parent_idx", torch.tensor([-1, 0, 0, 1, 1, 2])),
        ("pair_indices", torch.tensor([[0, 1], [4, 5]])),
    ],
)
def test_numbers_of_other_items_are_named(name, numbers):
    batch = {"x": X, name: numbers}
    with pytest.raises(ValueError, match=rf"holds {name}, which numbers other items .*sequential"):
        repeat_batch(batch)
    with pytest.raises(ValueError, match=name):
        take_items({"inner": batch}, torch.tensor([0, 0]))
    assert repeat_batch(batch, shared=name)[name] is numbers
    assert torch.equal(repeat_batch(batch, 1)[name], numbers)
    other = repeat_batch({"x": X, "more": numbers})["more"]
    assert len(other) == (2 if len(numbers) == 6 else 1) * len(numbers)


@pytest.mark.parametrize(
    "batch",
    [
        {"x": X, "neighbours": NEIGHBOURS * 90},  # of a table of many entities
        {"x": X, "neg_idx": NEIGHBOURS - 3},
        {"x": X, "neighbours": NEIGHBOURS / 2},
        {"x": torch.randn(6, 9, 4), "anchor_idx": NEIGHBOURS[:, 0]},  # steps of each sequence
        {"x": torch.randn(6, 9, 4), "parent_idx": torch.zeros(6, 9).long() + 3},
        {"words": torch.ones(6, 9).long(), "parent_idx": torch.zeros(6, 9).long() + 3},
        {"x": X, "anchor_idx": torch.ones(6).long()},  # yes or no
        {"x": X[:3], "neg_idx": torch.tensor([1, 2, 0])},  # too few to tell
        {"x": X, "idx": NEIGHBOURS[:, 0], "label": NEIGHBOURS[:, 1]},  # of GLUE
        {"x": X, "pos_idx": NEIGHBOURS[:, 0], "neg_ids": NEIGHBOURS[:, 0]},
        {"x": X, "segment_ids": torch.tensor([0, 2, 1, 1, 0, 2])},  # of customers
        {"x": X, "segment_ids": torch.zeros(6).long(), "graph_id": torch.arange(6)},
        {"words": torch.ones(6, 9).long(), "segment_ids": torch.ones(6, 9).long()},  # of BERT
        {"x": X, "src": NEIGHBOURS[:, 0], "dst": NEIGHBOURS[:, 1]},  # of a flight
        {"src": torch.ones(6, 9).long(), "tgt": torch.ones(6, 9).long(), "lengths": torch.ones(6)},
        {"x": X, "lengths": torch.tensor([3, 2, 1, 3, 2, 1]), "table": torch.randn(11, 3)},
        {"x": X, "target_lengths": torch.tensor([2] * 6), "targets": torch.ones(12).long()},
        {"x": X, "lengths": torch.tensor([1] * 6), "words": torch.ones(6).long()},
    ],
)
def test_others_are_stacked(batch):
    repeated = repeat_batch(batch)
    for name, value in batch.items():
        size = len(next(iter(batch.values())))
        assert len(repeated[name]) == (2 * size if len(value) == size else len(value))


@pytest.mark.parametrize("name", ["segment_ids", "graph_idx", "cloud_id"])
def test_numbers_of_groups_in_order_are_named(name):
    with pytest.raises(ValueError, match=f"holds {name}, which numbers the group of every row"):
        repeat_batch({"x": X, name: torch.tensor([0, 0, 0, 1, 1, 2])})


@pytest.mark.parametrize(
    "batch",
    [
        {"x": X, "receivers": torch.arange(9)},
        {"x": X, "src": torch.arange(9), "dst": torch.arange(9)},
    ],
)
def test_ends_of_edges_are_named_alone_too(batch):
    with pytest.raises(ValueError, match="numbers the nodes of a graph"):
        repeat_batch(batch)


@pytest.mark.parametrize("is_first", [True, False])
def test_lengths_of_rows_that_are_not_padded_are_named(is_first):
    lengths, words = torch.tensor([3, 4, 4]), torch.arange(11)
    batch = {"lengths": lengths, "words": words}
    if not is_first:
        batch = dict(reversed(batch.items()))
    with pytest.raises(ValueError, match=r"holds lengths, which tells how many rows .* in words"):
        repeat_batch(batch)
    torch.manual_seed(0)
    embed, head = nn.Embedding(11, 5), nn.Dropout(0.5)

    def forward(batch):
        parts = embed(batch["words"]).split(batch["lengths"].tolist())
        return head(torch.stack([part.mean(0) for part in parts]))

    config = RDropConfig(passes="sequential")
    assert rdrop_step(forward, batch, torch.tensor([0, 4, 2]), config=config, step=0).kl > 0


def test_lengths_where_the_time_comes_first():
    batch = {"src": torch.randn(6, 3, 8), "lengths": torch.tensor([1, 2, 3])}
    assert repeat_batch(batch, dim=1)["lengths"].tolist() == [1, 2, 3, 1, 2, 3]


def test_values_that_cannot_be_read_tell_nothing():
    batch = {"x": X.to("meta"), "neighbours": NEIGHBOURS.to("meta")}
    assert repeat_batch(batch)["neighbours"].shape == (12, 2)
    compiled = torch.compile(repeat_batch, fullgraph=True, backend="eager")
    assert compiled({"x": X, "neighbours": NEIGHBOURS})["neighbours"].shape == (12, 2)


def test_numbers_counted_on_are_right():
    """As the message has it."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 5)

    def scores(x, numbers):
        return layer(torch.cat([x, x[numbers].mean(1)], -1))

    both = scores(repeat_batch(X), torch.cat([NEIGHBOURS, NEIGHBOURS + len(X)]))
    single = scores(X, NEIGHBOURS)
    torch.testing.assert_close(both, torch.cat([single, single]))
    assert F.mse_loss(both[:6], both[6:]) < 1e-12
