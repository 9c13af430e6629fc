"""Records of other libraries, arrays, and objects that hide tensors, in a batch."""

import enum
import functools
import timeit
from collections import UserList, deque
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import attrs
import numpy as np
import pydantic
import pytest
import torch
from torch import nn

from regdrop import RDropConfig, rdrop_cross_entropy, rdrop_step, repeat_batch
from regdrop.passes import (
    concatenate_outputs,
    copy_structure,
    find_batch_size,
    find_tensors,
    run_passes,
    take_items,
)


@attrs.define
class Defined:
    x: Any
    note: Any = "kept"


@attrs.frozen(slots=False)
class Fixed:
    x: Any
    note: Any = "kept"


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True, frozen=True)
    x: Any
    note: Any = "kept"


class OpenModel(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True, extra="allow")
    note: Any = "kept"


class Namespace(SimpleNamespace):
    pass


RECORDS = {
    "attrs": Defined,
    "frozen attrs": Fixed,
    "pydantic": lambda x: Model(x=x),
    "pydantic with other fields": lambda x: OpenModel(x=x),
    "namespace": lambda x: Namespace(x=x, note="kept"),
}


@pytest.fixture(params=RECORDS)
def make_record(request):
    return RECORDS[request.param]


def test_fields_of_records_are_stacked(make_record):
    x = torch.randn(3, 2)
    record = make_record(x)
    repeated = repeat_batch(record)
    assert type(repeated) is type(record)
    assert torch.equal(repeated.x, torch.cat([x, x]))
    assert repeated.note == "kept"
    assert record.x is x
    assert find_batch_size(record) == 3
    assert [*find_tensors((record, 1))] == [x]


def test_records_inside_other_structures_are_stacked_and_taken(make_record):
    x = torch.randn(3, 2)
    batch = {"y": torch.arange(3), "deep": [make_record((x, {"z": x + 1}))]}
    repeated = repeat_batch(batch)["deep"][0].x
    assert torch.equal(repeated[1]["z"], torch.cat([x, x]) + 1)
    taken = take_items(batch, torch.tensor([2, 0]))["deep"][0].x
    assert torch.equal(taken[0], x[[2, 0]])


def test_shared_fields_of_records_pass_through(make_record):
    x = torch.randn(3, 2)
    repeated = repeat_batch((torch.arange(3), make_record(x)), shared=["x"])
    assert repeated[1].x is x
    with pytest.raises(ValueError, match="did you mean 'note'"):
        repeat_batch((torch.arange(3), make_record(x)), shared=["notes"])


def test_an_extra_field_stays_one():
    repeated = repeat_batch(OpenModel(x=torch.zeros(2)))
    assert repeated.model_dump().keys() == {"note", "x"}


@pytest.mark.parametrize("dim", [0, 1])
def test_arrays_of_the_items_are_stacked(dim):
    words = np.array([["a", "b", "c"], ["d", "e", "f"]])
    words = words if dim else words.T
    x = torch.randn(2, 3) if dim else torch.randn(3, 2)
    table, number = np.eye(4), np.float64(3)
    repeated = repeat_batch({"x": x, "w": words, "table": table, "n": number}, dim=dim)
    assert repeated["w"].tolist() == np.concatenate([words, words], axis=dim).tolist()
    assert repeated["table"] is table
    assert repeated["n"] is number
    taken = take_items({"x": torch.zeros(3), "w": np.arange(3)}, torch.tensor([2, 2]))
    assert taken["w"].tolist() == [2, 2]
    assert repeat_batch(np.ma.array([1, 2], mask=[0, 1])).mask.tolist() == [False, True] * 2
    assert find_batch_size({"ids": np.zeros(4), "x": torch.zeros(3)}) == 3


class Hidden:
    """As DETR's code hands images and their masks over."""

    def __init__(self, tensors):
        self.tensors = tensors


class HiddenInSlots:
    __slots__ = ("tensors",)

    def __init__(self, tensors):
        self.tensors = tensors


class HiddenDeeper:
    """As a cache of keys holds its layers."""

    def __init__(self, tensors):
        self.layers = [Hidden({"keys": tensors})]


class HiddenInOneSlot:
    __slots__ = "__tensors"

    def __init__(self, tensors):
        self.__tensors = tensors


class HiddenInADeque:
    def __init__(self, tensors):
        self.last = deque([tensors])


class HiddenArray:
    def __init__(self, tensors):
        self.rows = tensors.numpy()


@dataclass
class HiddenBesideFields:
    note: Any

    def __post_init__(self):
        self.mask, self.note = self.note, 0


class HiddenInPydantic(pydantic.BaseModel):
    note: int = 0
    _mask: Any = None

    def __init__(self, tensors):
        super().__init__()
        self._mask = tensors


HIDING = [
    Hidden,
    HiddenInSlots,
    HiddenDeeper,
    HiddenInOneSlot,
    HiddenInADeque,
    HiddenArray,
    HiddenBesideFields,
    HiddenInPydantic,
]


@pytest.mark.parametrize("kind", HIDING)
@pytest.mark.parametrize("function", [repeat_batch, lambda b: take_items(b, torch.tensor([0]))])
def test_an_object_that_hides_tensors_of_the_items_is_named(kind, function):
    batch = {"x": torch.randn(3, 2), "more": [kind(torch.randn(3, 5))]}
    with pytest.raises(
        TypeError, match=rf"holds a {kind.__name__}.*shape \(3, 5\) for its 3 items"
    ):
        function(batch)


def test_a_few_objects_that_each_hide_all_items_are_fields():
    both = (Hidden(torch.randn(2, 5)), Hidden(torch.randn(2, 5)))
    with pytest.raises(TypeError, match=r"holds a Hidden.*shape \(2, 5\) for its 2 items"):
        repeat_batch({"x": torch.randn(2, 2), "sentences": both})
    instances = (Hidden(torch.randn(2, 5)), Hidden(torch.randn(3, 5)))
    assert repeat_batch((torch.randn(2, 2), instances))[1] == instances * 2


@pytest.mark.parametrize("kind", HIDING)
def test_an_object_without_tensors_of_the_items_passes_through(kind):
    batch = {"x": torch.randn(3, 2), "settings": kind(torch.randn(4, 3)), "net": nn.Linear(2, 3)}
    repeated = repeat_batch(batch)
    assert type(repeated["settings"]) is kind
    assert repeated["net"] is batch["net"]


def test_one_pass_hides_nothing():
    batch = {"x": torch.randn(3, 2), "more": Hidden(torch.randn(3, 5))}
    assert repeat_batch(batch, 1)["more"] is batch["more"]


@attrs.define
class Unset:
    x: Any
    later: Any = attrs.field(init=False)


class Awkward:
    """What a look into an object must not stumble over."""

    __slots__ = ("never_set",)

    def __getattr__(self, name):
        raise RuntimeError(name)


@pytest.mark.parametrize(
    "other",
    [
        Unset(3),
        Awkward(),
        Hidden(nn.LazyLinear(3).weight),
        Hidden(Unset(3)),
        functools.partial(print, torch.zeros(4)),
        torch.Generator(),
        torch.float32,
        Path(),
        enum.Enum("Colour", "red"),
        iter([1]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_objects_of_all_kinds_pass_through(other):
    repeated = repeat_batch({"x": torch.zeros(3, 2), "other": other})
    assert type(repeated["other"]) is type(other)
    assert repeated["x"].shape == (6, 2)


def test_fields_that_are_not_set_stay_so():
    repeated = repeat_batch(Unset(torch.zeros(3)))
    assert len(repeated.x) == 6
    assert not hasattr(repeated, "later")


def test_a_large_object_is_not_read_through():
    data = Hidden([(i, str(i)) for i in range(200_000)])
    batch = {"x": torch.zeros(3, 2), "data": data}
    assert min(timeit.repeat(lambda: repeat_batch(batch), number=1, repeat=5)) < 0.05


def test_a_hidden_object_may_be_shared_by_name():
    batch = {"x": torch.randn(3, 2), "prompt": Hidden(torch.randn(3, 2))}
    assert repeat_batch(batch, shared=["prompt"])["prompt"] is batch["prompt"]
    with pytest.raises(TypeError, match="Hidden"):
        repeat_batch(batch, shared=["x"], batch_size=3)


def test_an_object_alone_is_named():
    with pytest.raises(ValueError, match="got Hidden without one; tensors are seen in tuples"):
        repeat_batch(Hidden(torch.randn(3, 2)))


@pytest.mark.parametrize("backward_passes", [None, 1])
def test_one_pass_after_the_other_takes_any_batch(backward_passes):
    """Nothing has to be stacked there, so that nothing has to be known of the batch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    x, y = torch.randn(3, 2), torch.tensor([0, 3, 1])
    config = RDropConfig(passes="sequential", backward_passes=backward_passes)

    def read(batch):
        return net(batch.tensors)

    torch.manual_seed(1)
    output = rdrop_step(read, Hidden(x), y, config=config, step=0)
    output.loss.backward()
    gradient = net[0].weight.grad.clone()
    net.zero_grad()
    torch.manual_seed(1)
    if backward_passes == 1:  # what carries no gradient runs first
        with torch.no_grad():
            second = net(x)
        passes = [net(x), second]
    else:
        passes = [net(x), net(x)]
    expected = rdrop_cross_entropy(torch.cat(passes), y, alpha=1.0, backward_passes=backward_passes)
    expected.loss.backward()
    assert output.kl > 0
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(gradient, net[0].weight.grad)


def test_a_forward_that_changes_its_batch_changes_no_other_pass():
    net = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5)).eval()

    def forward(batch):
        x = batch.pop("x")
        batch["rows"].append(x)
        return net(x)

    batch = {"x": torch.randn(3, 2), "rows": [1]}
    found = run_passes(forward, batch, num_passes=3, strategy="sequential")
    torch.testing.assert_close(found, net(batch["x"]).repeat(3, 1))
    assert batch["rows"] == [1]


def test_edges_by_the_numbers_of_their_nodes_are_named():
    nodes, edges = torch.randn(5, 2), torch.randint(0, 5, (2, 9))
    batch = {"x": nodes, "edge_index": edges}
    with pytest.raises(ValueError, match="edge_index, which numbers the nodes of a graph"):
        repeat_batch(batch)
    with pytest.raises(ValueError, match="edge_index"):
        repeat_batch(SimpleNamespace(**batch))
    assert repeat_batch(batch, shared=["edge_index"])["edge_index"] is edges
    assert repeat_batch(batch, 1)["edge_index"] is not None
    padded = {"x": torch.randn(3, 5, 2), "edge_index": torch.randint(0, 5, (3, 2, 7))}
    assert repeat_batch(padded)["edge_index"].shape == (6, 2, 7)


def test_a_list_of_items_of_different_sizes_is_named():
    sequences = [torch.zeros(5), torch.zeros(7), torch.zeros(3)]
    for batch in (sequences, {"sequences": sequences}, {"x": torch.zeros(3), "s": sequences}):
        with pytest.raises(TypeError, match=r"list of 3 tensors.* differ, \[5, 7, 3\]"):
            repeat_batch(batch)
    samples = [{"x": torch.zeros(5), "n": torch.ones(5)}, {"x": torch.zeros(7), "n": torch.ones(7)}]
    with pytest.raises(TypeError, match=r"mappings\), whose sizes differ, \[\(5, 5\), \(7, 7\)\]"):
        repeat_batch(samples)


def test_a_list_of_arrays_of_different_sizes_is_named():
    arrays = [np.zeros((3, 2)), np.zeros((5, 2))]
    with pytest.raises(TypeError, match=r"list of 2 tensors \(or arrays.* differ, \[3, 5\]"):
        repeat_batch(arrays)
    assert len(repeat_batch({"x": torch.zeros(2), "one_an_item": arrays})["one_an_item"]) == 4
    tables = {"x": torch.zeros(4), "tables": arrays}
    assert repeat_batch(tables)["tables"][0] is arrays[0]


class Column:
    """As a column of pandas is."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __array__(self):
        return np.array(self.values)


@pytest.mark.parametrize(
    "make_column",
    [lambda: Column([1, 2, 3]), lambda: UserList("abc"), lambda: deque("abc"), lambda: range(3)],
)
def test_a_sequence_of_another_kind_is_named(make_column):
    column = make_column()
    batch = {"x": torch.zeros(3, 2), "more": column}
    with pytest.raises(TypeError, match=f"holds a {type(column).__name__} with an entry for each"):
        repeat_batch(batch)
    assert repeat_batch(batch, shared="more")["more"] is column
    assert repeat_batch({"x": torch.zeros(4, 2), "more": column})["more"] is column


def test_what_a_property_has_kept_is_computed_again():
    for kind in (Cached, CachedInAttrs, CachedInPydantic):
        batch = kind(x=torch.randn(3, 2))
        assert batch.mask.shape == (3, 2)
        assert repeat_batch(batch).mask.shape == (6, 2)
        assert take_items(batch, torch.tensor([1])).mask.shape == (1, 2)
        assert "mask" in vars(batch)


def test_lists_that_are_structures_are_stacked():
    crops = [torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 4, 4)]
    assert [len(crop) for crop in repeat_batch(crops)] == [4, 4]
    table = torch.zeros(7)
    assert repeat_batch((torch.zeros(5), table))[1] is table
    assert repeat_batch([torch.zeros(5), torch.zeros(7, 2)])[0].shape == (10,)
    anchors = {"x": torch.zeros(8, 3), "anchors": [torch.zeros(100, 4), torch.zeros(25, 4)]}
    assert [len(rows) for rows in repeat_batch(anchors)["anchors"]] == [100, 25]
    names = {"x": torch.zeros(2), "tables": [torch.zeros(5), torch.zeros(7)]}
    assert repeat_batch(names, shared=["tables"])["tables"] is names["tables"]


def test_a_list_of_objects_of_the_items_is_repeated():
    """As detectron2 hands instances over, of which one may have as many rows as there are items."""
    instances = [Hidden(torch.zeros(rows, 4)) for rows in (5, 3, 7)]
    repeated = repeat_batch({"x": torch.zeros(3, 2), "instances": instances})
    assert repeated["instances"] == instances * 2


@dataclass
class Plain:
    x: Any
    note: Any = "kept"


@dataclass(frozen=True)
class Cached:
    x: Any

    @functools.cached_property
    def mask(self):
        return self.x > 0


@attrs.define(slots=False)
class CachedInAttrs:
    x: Any

    @functools.cached_property
    def mask(self):
        return self.x > 0


class CachedInPydantic(pydantic.BaseModel):
    x: Any

    @functools.cached_property
    def mask(self):
        return self.x > 0


class Rows(list):
    """A list that is made of something else than its items, and holds more than them."""

    def __init__(self, size, note):
        super().__init__(range(size))
        self.note = note


def rows(*items):
    made = Rows(0, "kept")
    made.extend(items)
    return made


@pytest.mark.parametrize(
    "function",
    [
        copy_structure,
        lambda b: copy_structure(b, clones=True),
        lambda b: concatenate_outputs([b, b]),
        repeat_batch,
        lambda b: take_items(b, torch.arange(3)),
    ],
)
def test_a_list_of_a_class_of_its_own_keeps_it(function):
    x = torch.randn(3, 2)
    changed = function(rows(x, x + 1))
    assert type(changed) is Rows
    assert changed.note == "kept"
    assert torch.equal(changed[1][:3], x + 1)
    texts = repeat_batch({"x": x, "texts": rows("a", "b", "c")})["texts"]
    assert type(texts) is Rows
    assert texts == ["a", "b", "c"] * 2


@pytest.mark.parametrize(
    "function", [repeat_batch, lambda b: copy_structure(b, clones=True), find_batch_size]
)
def test_long_lists_of_tokens_cost_little(function):
    batch = {"tokens": [[1] * 512 for _ in range(256)], "x": torch.zeros(256, 4)}
    assert min(timeit.repeat(lambda: function(batch), number=1, repeat=5)) < 0.04


def test_fields_of_a_namedtuple_are_told_by_their_names():
    class Inputs(NamedTuple):
        bias: torch.Tensor
        input_ids: torch.Tensor
        cu_seq_lens_q: Any = None

    batch = Inputs(torch.ones(5), torch.randn(3, 2))
    assert find_batch_size(batch) == 3
    assert repeat_batch(batch, shared=["input_ids"], batch_size=5).input_ids is batch.input_ids
    packed = Inputs(torch.ones(1), torch.arange(9)[None], torch.tensor([0, 4, 9]))
    assert repeat_batch(packed).cu_seq_lens_q.tolist() == [0, 4, 9, 13, 18]
    assert repeat_batch(SimpleNamespace(**packed._asdict())).cu_seq_lens_q.tolist()[-1] == 18


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [lambda x: (x, None), lambda x: {"x": [x, 3], "note": "kept"}, lambda x: [x, x], Plain]
)
def test_structures_are_stacked_in_one_compiled_graph(make):
    batch = make(torch.randn(3, 2))
    compiled = torch.compile(repeat_batch, fullgraph=True, backend="eager")
    found, expected = compiled(batch), repeat_batch(batch)
    assert type(found) is type(expected)
    for ours, theirs in zip(find_tensors(found), find_tensors(expected), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("is_strict", [True, False])
def test_an_exported_batch_may_have_any_size(is_strict):
    class Stack(nn.Module):
        def forward(self, x, y):
            return repeat_batch({"x": x, "y": (y, "kept")})["y"][0]

    example = (torch.randn(4, 6), torch.randn(4))
    rows = torch.export.Dim("rows", min=3)  # a tuple of two may be of two items
    shapes = {"x": {0: rows}, "y": {0: rows}}
    exported = torch.export.export(Stack(), example, dynamic_shapes=shapes, strict=is_strict)
    assert len(exported.module()(torch.randn(7, 6), torch.randn(7))) == 14
