"""Offsets, edges and graph numbers: what numbers the rows of other tensors is refused."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from regdrop import RDropConfig, rdrop_step, repeat_batch
from regdrop.passes import take_items

DENSE = torch.rand(4, 3)
LABELS = torch.tensor([1, 0, 3, 2])
WORDS = torch.tensor([5, 3, 9, 9, 1, 0, 2, 7, 7, 3, 8, 4])
OFFSETS = torch.tensor([0, 2, 5, 7])
WITH_END = torch.tensor([0, 2, 5, 7, 12])


class Bags(NamedTuple):
    label: torch.Tensor
    words: torch.Tensor
    offsets: torch.Tensor


@pytest.mark.parametrize(
    "batch",
    [
        {"dense": DENSE, "offsets": OFFSETS, "words": WORDS},
        {"words": WORDS, "offsets": OFFSETS},
        {"dense": DENSE, "offsets": WITH_END, "words": WORDS},
        {"dense": DENSE, "offsets": torch.arange(4), "indices": LABELS},
        {"dense": DENSE, "offsets": [OFFSETS] * 3, "words": [WORDS] * 3},
        {"dense": DENSE, "user_offsets": OFFSETS, "user_words": WORDS},
        {"coord": torch.rand(12, 3), "offset": torch.tensor([5, 12])},
        {"dense": DENSE, "offsets": OFFSETS, "words": [WORDS, WORDS]},
        {"dense": DENSE, "offsets": OFFSETS, "words": WORDS[:, None]},
        {"dense": DENSE, "offsets": OFFSETS, "words": WORDS, "per_sample_weights": WORDS / 2},
        {"category": LABELS, "coord": torch.rand(12, 3), "offset": OFFSETS + 5},
        {"x": torch.rand(12, 3), "offsets": WITH_END},
        {"x": torch.rand(12, 3), "ptr": WITH_END},
        {"inner": [{"x": torch.rand(12, 3), "ptr": WITH_END}]},
        SimpleNamespace(dense=DENSE, offsets=OFFSETS, words=WORDS),
        Bags(LABELS, WORDS, OFFSETS),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_named_places_where_items_begin_are_refused(batch, device):
    """On a device that has no values to read the name is enough."""
    batch = move(batch, device)
    with pytest.raises(ValueError, match=r"(offsets?|ptr),? .* tells where .* passes=.sequential."):
        repeat_batch(batch)
    with pytest.raises(ValueError, match=r"tells where the rows|is the size of nothing"):
        repeat_batch(batch, batch_size=4)


def move(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: move(item, device) for name, item in value.items()}
    if isinstance(value, list):
        return [move(item, device) for item in value]
    if isinstance(value, SimpleNamespace):
        return SimpleNamespace(**move(vars(value), device))
    return type(value)(**move(value._asdict(), device))


@pytest.mark.parametrize(
    "batch",
    [
        (LABELS, WORDS, OFFSETS),
        (LABELS, WORDS, WITH_END),
        (DENSE, OFFSETS, WORDS),
        [DENSE, (WORDS, OFFSETS)],
        {"dense": DENSE, "lS_o": OFFSETS, "lS_i": WORDS},
        (DENSE, [OFFSETS] * 3, [WORDS] * 3),
        (DENSE, [torch.tensor([0, 0, 5, 5])] * 3, [WORDS] * 3),  # some have no words
        (DENSE, torch.stack([OFFSETS] * 3), [WORDS] * 3),
        (DENSE, [torch.arange(4)] * 26, [LABELS] * 26),  # one word each
        (torch.rand(12, 3), WITH_END),
        (torch.rand(1, 12, 3), WITH_END.int()),
    ],
)
def test_places_where_items_begin_are_seen_by_their_values(batch):
    with pytest.raises(ValueError, match=r"\[0, .* tells where the rows of every item begin"):
        repeat_batch(batch)
    with pytest.raises(ValueError, match="tells where the rows of every item begin"):
        take_items(batch, torch.tensor([0, 0]))


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("batch", {"pos": torch.rand(9, 3), "batch": torch.tensor([0] * 4 + [1] * 5)}),
        ("batch", {"y": LABELS, "pos": torch.rand(9, 3), "batch": torch.zeros(9).long()}),
        ("batch_idx", {"img": torch.rand(2, 3, 8, 8), "batch_idx": torch.tensor([0.0, 1, 1])}),
    ],
)
def test_the_numbers_of_graphs_are_refused(name, batch):
    with pytest.raises(ValueError, match=rf"holds {name}, which numbers the graph, cloud or image"):
        repeat_batch(batch)
    assert repeat_batch(batch, shared=[name])[name] is batch[name]
    assert torch.equal(repeat_batch(batch, 1)[name], batch[name])


def test_ends_of_edges_are_refused():
    ends = {"senders": torch.tensor([0, 1]), "receivers": torch.tensor([1, 2])}
    with pytest.raises(ValueError, match="senders, which numbers the nodes of a graph"):
        repeat_batch({"nodes": torch.rand(5, 2), **ends})
    with pytest.raises(ValueError, match="edge_index_s, which numbers the nodes of a graph"):
        repeat_batch({"x_s": torch.rand(5, 2), "edge_index_s": torch.zeros(2, 7).long()})


@pytest.mark.parametrize(
    "batch",
    [
        (DENSE, torch.tensor([0, 0, 1, 1])),  # labels
        (DENSE, torch.tensor([0, 2, 5, 7]), torch.arange(12)),  # and positions
        (DENSE, torch.tensor([0, 0, 1, 1]), WORDS),
        (DENSE[:2], torch.tensor([0, 7]), WORDS),
        (DENSE, torch.arange(4), LABELS),  # numbers of the items
        (DENSE, torch.arange(4), WORDS),
        (DENSE, LABELS, torch.tensor([0, 0, 1, 1, 2])),  # groups of the features
        (DENSE, [LABELS, LABELS.sort().values], [LABELS, LABELS]),
        (torch.ones(4, 6).long(), torch.tensor([[0, 0, 0, 1, 1, 1]]), torch.arange(6)[None]),
        {"x": DENSE, "offsets": torch.tensor([0, 4, 2, 9]), "y": LABELS},  # of clips
        {"x": DENSE, "offsets": torch.rand(7)},
        {"x": torch.ones(8, 6), "offset": torch.arange(8), "position_ids": torch.arange(6)[None]},
        {"audio": DENSE, "start_offset": OFFSETS, "window": torch.rand(400)},
        {"video": torch.rand(12, 2), "frame_idx": OFFSETS, "label": WORDS},
        (DENSE, torch.tensor([0, 2, 5, 12]), WORDS),
        {"x": DENSE, "batch": torch.rand(4)},  # a covariate
        {"x": DENSE, "batch": 3, "batch_idx": torch.tensor(5), "edge_index": None},
        {"x": DENSE, "senders": LABELS},
    ],
)
def test_other_integers_are_stacked_or_pass_through(batch):
    repeated = repeat_batch(batch)
    first = next(iter(batch.values() if isinstance(batch, dict) else batch))
    found = next(iter(repeated.values() if isinstance(repeated, dict) else repeated))
    assert torch.equal(found, torch.cat([first, first]))


def test_values_are_compared_on_their_own_device():
    batch = (DENSE, torch.arange(7))
    with torch.device("meta"):
        first, numbers = repeat_batch(batch)
    assert torch.equal(first, torch.cat([DENSE, DENSE]))
    assert numbers is batch[1]


@pytest.mark.parametrize("name", ["batch", "offset"])
def test_a_covariate_of_each_item_is_stacked_under_another_name(name):
    batch = {"x": DENSE, name: LABELS, "words": WORDS}
    advice = "give it another name; name it in shared only if it is the same for all passes"
    with pytest.raises(ValueError, match=f"fraction=1.0; if it is something else, {advice}"):
        repeat_batch(batch)
    assert len(repeat_batch({"x": DENSE, "site": LABELS, "words": WORDS})["site"]) == 8


def test_what_only_looks_like_places_is_stacked_with_a_second_dimension():
    with pytest.raises(ValueError, match=r"else, give it a second dimension \(numbers\[:, None"):
        repeat_batch((DENSE, OFFSETS, WORDS))
    assert len(repeat_batch((DENSE, OFFSETS[:, None], WORDS))[1]) == 8


def test_bags_of_words_run_one_pass_after_the_other():
    bag = torch.nn.EmbeddingBag(10, 4)
    head = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(4, 5))
    config = RDropConfig(passes="sequential")

    def forward(batch):
        return head(bag(batch[0], batch[1]))

    output = rdrop_step(forward, (WORDS, OFFSETS), LABELS, config=config, step=0)
    assert output.kl > 0
