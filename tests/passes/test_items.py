"""Lists and tuples with an entry for each item, and those that are structures."""

import pytest
import torch

from regdrop import repeat_batch
from regdrop.passes import take_items


def targets(*counts):
    """What torchvision's detectors take: a mapping for each image, of as many rows as boxes."""
    return [
        {"boxes": torch.rand(count, 4), "labels": torch.ones(count), "image_id": torch.tensor(7)}
        for count in counts
    ]


@pytest.mark.parametrize("counts", [(1, 2, 5), (5, 5, 5), (3, 1, 2), (3, 3, 3), (0, 0, 0)])
@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("named", [True, False])
def test_the_targets_of_images_are_items_whatever_they_hold(counts, kind, named):
    images, boxes = torch.rand(3, 3, 8, 8), kind(targets(*counts))
    batch = {"images": images, "boxes": boxes} if named else (images, boxes)
    repeated = repeat_batch(batch)
    found = repeated["boxes"] if named else repeated[1]
    assert type(found) is kind
    assert [*map(id, found)] == [*map(id, boxes * 2)]
    taken = take_items(batch, torch.tensor([2, 0]))
    assert [*map(id, taken["boxes"] if named else taken[1])] == [id(boxes[2]), id(boxes[0])]


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_images_beside_their_targets_is_named(kind):
    images = kind([torch.rand(3, 8, 8), torch.rand(3, 9, 6)])
    for batch in ((images, kind(targets(2, 4))), {"x": images, "y": targets(4, 4)}):
        with pytest.raises(TypeError, match=r"list of 2 images beside .* passes=.sequential"):
            repeat_batch(batch)
        with pytest.raises(TypeError, match="list of 2 images"):
            repeat_batch(batch, batch_size=2)


def test_targets_that_told_the_size_are_named_beside_numbers():
    numbered = [{"boxes": torch.rand(n, 4), "id": torch.tensor(n), "n": n} for n in (5, 3)]
    with pytest.raises(TypeError, match=r"mappings\), whose sizes differ, \[\(5,\), \(3,\)\]"):
        repeat_batch(numbered)


def test_an_item_does_not_tell_how_many_there_are():
    """The labelled and the unlabelled half of a batch may be as many as the labelled rows."""
    for batch in (tuple(targets(2, 14)), targets(2, 14), (targets(2, 14), torch.rand(2, 3, 8, 8))):
        with pytest.raises(TypeError, match="list of 2 mappings"):
            repeat_batch(batch)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_sentences_of_pairs_are_a_structure_also_where_two_are_left(size):
    one, two = (
        {"input_ids": torch.ones(size, length), "attention_mask": torch.ones(size, length)}
        for length in (4, 4)
    )
    for batch in ([one, two], ([one, two], torch.zeros(size)), ((one, two),)):
        repeated = repeat_batch(batch)
        features = repeated if isinstance(batch, list) else repeated[0]
        assert [len(part["input_ids"]) for part in features] == [2 * size] * 2


@pytest.mark.parametrize(
    "items",
    [
        (3, 1, 4, 1, 5),  # lengths
        (0.5, 1, 2, None, 3),
        ("a", "b", None, "d", "e"),
        ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9)),
        ([1], [2, 3], [], [4], [5]),
        tuple(torch.tensor(i) for i in range(5)),
    ],
)
def test_what_zip_makes_of_the_items_is_repeated(items):
    x = torch.randn(5, 2)
    assert repeat_batch((x, items))[1] == items * 2
    assert repeat_batch({"x": x, "more": items})["more"] == items * 2
    assert take_items((x, items), torch.tensor([3, 0]))[1] == (items[3], items[0])


def test_short_tuples_of_texts_and_lists_are_repeated_too():
    x = torch.randn(3, 2)
    for items in (("a", "b", "c"), ([1], [2, 3], [4]), ({"id": 1}, {"id": 2}, {"id": 3})):
        assert repeat_batch((x, items))[1] == items * 2


class Picture:
    """An image of some library."""


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
@pytest.mark.parametrize(
    "make_one",
    [
        lambda i: (i, i + 2),  # a span
        lambda i: ("a", "b") * 5,
        lambda i: torch.tensor(i),
        lambda i: Picture(),
    ],
)
def test_what_is_of_one_item_is_repeated_however_few_there_are(size, make_one):
    items = tuple(make_one(i) for i in range(size))
    repeated = repeat_batch({"x": torch.randn(size, 2), "more": items})["more"]
    assert [*map(id, repeated)] == [*map(id, items * 2)]


@pytest.mark.parametrize(
    ("size", "other"),
    [
        (2, (224, 224)),
        (3, (3, 224, 224)),
        (2, ("bilinear", 224)),
        (3, ("bilinear", torch.float32, None)),
        (2, (torch.device("cpu"), Picture())),
        (2, (torch.nn.GELU(), torch.nn.ReLU())),
        (5, (None,) * 5),
        (3, torch.Size([3, 8, 8])),
        (5, torch.Size([5, 3, 8, 8, 8])),
    ],
)
def test_sizes_and_settings_pass_through(size, other):
    assert repeat_batch((torch.randn(size, 2), other))[1] == other


def test_fields_of_the_items_are_a_structure():
    halves = ({"x": torch.rand(2, 5)}, {"anchors": torch.rand(9, 4)})
    assert [*map(len, repeat_batch(halves)[0].values())] == [4]
    assert len(repeat_batch(halves)) == 2
    assert repeat_batch((["a", "b"], [1, 2]), batch_size=2) == (["a", "b"] * 2, [1, 2] * 2)
    collated = [("a", "b", "c"), ("d", "e", "f")]
    assert repeat_batch(collated, batch_size=3) == [(*"abcabc",), (*"defdef",)]


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("prototypes", torch.randn(4, 8)),
        ("class_weight", torch.ones(4)),
        ("class_names", ["cat", "dog", "cow", "owl"]),
        ("memory_bank", torch.randn(4, 8)),
    ],
)
def test_a_table_of_as_many_rows_as_items_by_chance_is_warned_about(name, table):
    batch = {"x": torch.randn(4, 2), name: table}
    with pytest.warns(UserWarning, match=f"holds {name}, .* as there are items, 4, .* in shared"):
        assert len(repeat_batch(batch)[name]) == 8
    assert repeat_batch(batch, shared=name)[name] is table
    fewer = {"x": torch.randn(3, 2), name: table}
    assert repeat_batch(fewer)[name] is table
    assert repeat_batch({"x": torch.randn(4, 2), "prototypes": torch.randn(4, 5, 8)})
