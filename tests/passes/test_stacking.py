import copy
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field, fields, is_dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from regdrop import rdrop_cross_entropy, repeat_batch
from regdrop.passes import find_batch_size, run_passes, take_items
from regdrop.passes.stacking import find_tensors, first_items

Pair = namedtuple("Pair", ["x", "note"])


@dataclass
class Plain:
    x: Any
    note: Any = "kept"


@dataclass(frozen=True)
class Frozen:
    x: Any
    note: Any = "kept"
    derived: Any = field(init=False, default=7)


@dataclass(frozen=True, slots=True)
class Slotted:
    x: Any
    note: Any = "kept"


class OwnMapping(MutableMapping):
    """A mapping that keeps its items where it likes."""

    def __init__(self, items):
        self.store = dict(items)

    def __getitem__(self, name):
        return self.store[name]

    def __setitem__(self, name, value):
        self.store[name] = value

    def __delitem__(self, name):
        del self.store[name]

    def __iter__(self):
        return iter(self.store)

    def __len__(self):
        return len(self.store)


class NamedDict(dict):
    """A dictionary with an attribute that is none of its items."""

    data = None


def batch_encoding(x):
    from transformers import BatchEncoding

    return BatchEncoding({"input_ids": x, "note": "kept"})


def model_output(x):
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=x, hidden_states=(x, x + 1))


def default_dict(x):
    batch = defaultdict(list)
    batch["x"] = x
    return batch


STRUCTURES = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, "kept"),
    "namedtuple": lambda x: Pair(x, "kept"),
    "list": lambda x: ["kept", x, 3],
    "dict": lambda x: {"x": x, "note": "kept"},
    "UserDict": lambda x: UserDict(x=x, note="kept"),
    "OrderedDict": lambda x: OrderedDict(note="kept", x=x),
    "defaultdict": default_dict,
    "mappingproxy": lambda x: MappingProxyType({"x": x, "note": "kept"}),
    "own mapping": lambda x: OwnMapping({"x": x, "note": "kept"}),
    "BatchEncoding": batch_encoding,
    "ModelOutput": model_output,
    "dataclass": Plain,
    "frozen dataclass": Frozen,
    "frozen dataclass with slots": Slotted,
    "nested": lambda x: {"a": (x, [x + 1, {"b": Frozen(x + 2)}]), "c": Plain(Pair(x, None))},
}


def children(value):
    if isinstance(value, Mapping):
        return list(value.values())
    if is_dataclass(value):
        return [getattr(value, f.name) for f in fields(value)]
    return list(value) if isinstance(value, (tuple, list)) else []


def nodes(value):
    return [value, *(node for child in children(value) for node in nodes(child))]


def tensors(value):
    return [node for node in nodes(value) if isinstance(node, torch.Tensor)]


def assert_same_structure(a, b):
    for x, y in zip(nodes(a), nodes(b), strict=True):
        assert type(x) is type(y)
        if isinstance(x, torch.Tensor):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)
        elif not children(x):
            assert x == y


def make(size=3):
    return torch.arange(size * 2).view(size, 2)


@pytest.fixture(params=STRUCTURES)
def batch(request):
    return STRUCTURES[request.param](make())


@pytest.mark.parametrize("num_passes", [1, 2, 3])
def test_passes_follow_each_other_in_blocks(batch, num_passes):
    stacked = repeat_batch(batch, num_passes)
    for original, repeated in zip(tensors(batch), tensors(stacked), strict=True):
        assert torch.equal(repeated, torch.cat([original] * num_passes))


def test_items_are_taken_in_the_order_of_the_index(batch):
    index = torch.tensor([2, 0, 2, 2])
    taken = take_items(batch, index)
    for original, part in zip(tensors(batch), tensors(taken), strict=True):
        assert torch.equal(part, original[index])


@pytest.mark.parametrize("function", [repeat_batch, lambda b: take_items(b, torch.arange(3))])
def test_types_stay_what_they_are(batch, function):
    changed = function(batch)
    assert [type(node) for node in nodes(changed)] == [type(node) for node in nodes(batch)]


@pytest.mark.parametrize("function", [repeat_batch, lambda b: take_items(b, torch.tensor([0, 1]))])
def test_callers_batch_is_untouched(batch, function):
    before, contents = nodes(batch), copy.deepcopy([*map(children, nodes(batch))])
    function(batch)
    assert all(a is b for a, b in zip(nodes(batch), before, strict=True))
    for now, then in zip(map(children, nodes(batch)), contents, strict=True):
        assert_same_structure(now, then)


@pytest.mark.parametrize("num_passes", [1, 2])
def test_result_shares_no_memory_with_the_callers_batch(batch, num_passes):
    contents = [x.clone() for x in tensors(batch)]
    for tensor in tensors(repeat_batch(batch, num_passes)):
        tensor.fill_(-1)
    for tensor, content in zip(tensors(batch), contents, strict=True):
        assert torch.equal(tensor, content)


@pytest.mark.parametrize(
    "kind", ["dict", "UserDict", "BatchEncoding", "OrderedDict", "own mapping"]
)
def test_items_added_to_the_result_stay_there(kind):
    batch = STRUCTURES[kind](make())
    names = list(batch)
    repeat_batch(batch)["new"] = 1
    assert list(batch) == names


def test_namedtuples_keep_their_names_and_mappings_their_order():
    assert repeat_batch(Pair(make(), 1))._fields == ("x", "note")
    assert list(repeat_batch(OrderedDict(b=make(), a=make()))) == ["b", "a"]


def test_default_of_a_defaultdict_survives():
    assert repeat_batch(default_dict(make()))["absent"] == []


def test_attributes_of_a_mapping_survive():
    batch = NamedDict(x=make())
    batch.data = "digits"
    assert repeat_batch(batch).data == "digits"


def test_batch_encoding_keeps_its_encodings_and_attribute_access():
    from transformers import BatchEncoding

    encoding = BatchEncoding({"input_ids": make()}, n_sequences=1)
    stacked = repeat_batch(encoding)
    assert stacked.input_ids.shape == (6, 2)
    assert stacked.n_sequences == 1
    assert encoding.input_ids.shape == (3, 2)


def test_model_output_keeps_attributes_and_items_alike():
    batch = model_output(make())
    stacked = repeat_batch(batch)
    assert stacked.last_hidden_state is stacked["last_hidden_state"]
    assert stacked.last_hidden_state.shape == (6, 2)
    assert [x.shape for x in stacked.hidden_states] == [(6, 2)] * 2
    assert stacked.attentions is None
    assert batch.last_hidden_state.shape == (3, 2)


def test_dataclass_fields_outside_the_constructor_are_stacked_too():
    @dataclass
    class Counted:
        x: torch.Tensor
        lengths: torch.Tensor = field(init=False)

        def __post_init__(self):
            self.lengths = self.x.sum(-1)

    batch = Counted(make())
    assert torch.equal(repeat_batch(batch).lengths, batch.lengths.repeat(2))


def test_what_has_no_batch_dimension_passes_through_itself():
    others = {
        "scalar": torch.tensor(3.0),
        "table": torch.randn(5, 2),
        "none": None,
        "number": 3,
        "text": "abc",
        "set": {1, 2, 3},
        "short": [1, 2],
    }
    stacked = repeat_batch({"input_ids": make(), **others})
    assert all(stacked[name] is value for name, value in others.items())


@pytest.mark.parametrize("shared", ["mask", ["mask"], ("mask", "y"), {"mask"}])
def test_shared_names_pass_through_at_any_depth(shared):
    mask = torch.eye(3)
    batch = {"input_ids": make(), "mask": mask, "inner": Plain({"mask": mask, "y": make()})}
    stacked = repeat_batch(batch, shared=shared)
    assert stacked["mask"] is mask
    assert stacked["inner"].x["mask"] is mask
    is_shared = "y" in shared
    assert stacked["inner"].x["y"].shape == ((3, 2) if is_shared else (6, 2))
    taken = take_items(batch, torch.tensor([1]), shared=shared)
    assert taken["mask"] is mask
    assert taken["input_ids"].shape == (1, 2)


def test_shared_names_of_a_dataclass_pass_through():
    x = make()
    stacked = repeat_batch(Frozen(x, note=make()), shared="x")
    assert stacked.x is x
    assert stacked.note.shape == (6, 2)


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        (["postion_bias"], "names 'postion_bias', .* did you mean 'position_bias'"),
        ("not", r"names 'not', .* did you mean 'note'"),
        (
            ["position_bias", "zzz"],
            r"it has \['inner', 'input_ids', 'note', 'posi",
        ),
    ],
)
def test_a_shared_name_that_is_nowhere_is_named(shared, message):
    batch = {"input_ids": make(), "position_bias": torch.zeros(3, 2), "inner": (Plain(make()), 1)}
    with pytest.raises(ValueError, match=message):
        repeat_batch(batch, shared=shared)


def test_lists_of_batch_length_without_tensors_are_stacked():
    batch = {"input_ids": make(), "text": ["a", "b", "c"], "spans": [(0, 1), (2, 3), (4, 5)]}
    stacked = repeat_batch(batch)
    assert stacked["text"] == ["a", "b", "c"] * 2
    assert stacked["spans"] == batch["spans"] * 2
    assert take_items(batch, torch.tensor([2, 0]))["text"] == ["c", "a"]


def test_lists_with_tensors_are_structures_whatever_their_length():
    x = make()
    stacked = repeat_batch({"input_ids": x, "pyramid": [x, x, x]})
    assert [level.shape for level in stacked["pyramid"]] == [(6, 2)] * 3


@pytest.mark.parametrize("name", ["input_ids", "inputs_embeds", "pixel_values", "input_features"])
@pytest.mark.parametrize("build", [dict, UserDict, lambda **items: OrderedDict(items)])
def test_batch_size_is_that_of_the_models_input_wherever_it_stands(name, build):
    batch = build(bias=torch.ones(5, 2), **{name: make()})
    assert find_batch_size(batch) == 3
    assert repeat_batch(batch)["bias"].shape == (5, 2)
    assert repeat_batch(batch)[name].shape == (6, 2)


def test_batch_size_is_that_of_a_dataclass_field_by_the_same_names():
    @dataclass
    class Inputs:
        bias: torch.Tensor
        input_ids: torch.Tensor

    assert find_batch_size(Inputs(torch.ones(5), make())) == 3


def test_batch_size_is_input_ids_before_pixel_values():
    assert find_batch_size({"pixel_values": torch.ones(5, 3), "input_ids": make()}) == 3
    assert find_batch_size({"pixel_values": torch.ones(5, 3), "input_ids": None}) == 5


def test_batch_size_is_else_that_of_the_first_tensor_with_a_dimension():
    assert find_batch_size((torch.tensor(1.0), "a", [{"x": make()}, torch.ones(5)])) == 3


def test_given_batch_size_decides():
    batch = {"input_ids": make(), "patches": torch.ones(5, 2)}
    stacked = repeat_batch(batch, batch_size=5)
    assert stacked["input_ids"] is batch["input_ids"]
    assert stacked["patches"].shape == (10, 2)
    assert take_items(batch, torch.tensor([4]), batch_size=5)["patches"].shape == (1, 2)
    assert repeat_batch(["a", "b"], batch_size=2) == ["a", "b"] * 2


def test_gradient_flows_back_to_every_copy():
    embeddings = torch.ones(3, 2, requires_grad=True)
    repeat_batch({"inputs_embeds": embeddings}, 3)["inputs_embeds"].sum().backward()
    assert torch.equal(embeddings.grad, torch.full((3, 2), 3.0))


def test_empty_batch_stays_empty():
    assert repeat_batch(torch.ones(0, 4)).shape == (0, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((make(), 0), ValueError, "num_passes must be at least 1, got 0"),
        ((make(), 2.0), TypeError, "num_passes must be an integer, got float"),
        ((make(), True), TypeError, "num_passes must be an integer, got bool"),
        (({"a": 1},), ValueError, "batch must hold a tensor .* batch_size .* got dict"),
        ((torch.tensor(1.0),), ValueError, "batch must hold a tensor"),
        (([],), ValueError, "got list without one"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        repeat_batch(*arguments)


# --- another dimension than the first --------------------------------------------------------


def test_sequences_with_the_time_first():
    length, size = 4, 3
    words = torch.arange(length * size).view(length, size)
    batch = {
        "input_ids": words,
        "states": torch.rand(2, size, 5),
        "mask": torch.ones(length, length),
        "numbers": torch.arange(size),
        "names": ["a", "b", "c"],
    }
    stacked = repeat_batch(batch, dim=1)
    assert torch.equal(stacked["input_ids"], torch.cat([words, words], 1))
    assert torch.equal(stacked["states"], torch.cat([batch["states"]] * 2, 1))
    assert stacked["mask"] is batch["mask"]
    assert stacked["numbers"].tolist() == [0, 1, 2] * 2  # it has no other dimension
    assert stacked["names"] == ["a", "b", "c"] * 2
    assert find_batch_size((torch.ones(7), words), dim=1) == size


def test_a_model_that_takes_the_time_first_sees_every_sequence_by_itself():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    x, mask = torch.randn(6, 3, 8), nn.Transformer.generate_square_subsequent_mask(6)
    single, stacked = layer(x, src_mask=mask), layer(repeat_batch(x, dim=1), src_mask=mask)
    torch.testing.assert_close(stacked, torch.cat([single, single], 1))
    logits, target = stacked.transpose(0, 1), torch.randint(0, 8, (6, 3)).transpose(0, 1)
    output = rdrop_cross_entropy(logits, target, alpha=1.0)
    assert output.kl.item() == pytest.approx(0, abs=1e-6)
    expected = F.cross_entropy(single.transpose(0, 1).flatten(0, 1), target.flatten())
    torch.testing.assert_close(output.nll, expected.detach())


def test_lengths_and_padding_masks_have_the_items_first_where_the_rest_has_the_time():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    lengths = torch.tensor([6, 2, 4])
    mask = torch.arange(6) >= lengths[:, None]
    batch = {"src": torch.randn(6, 3, 8), "lengths": lengths, "src_key_padding_mask": mask}
    stacked = repeat_batch({**batch, "texts": np.array(["a", "b", "c"])}, dim=1)
    assert torch.equal(stacked.pop("lengths"), lengths.repeat(2))
    assert stacked.pop("texts").tolist() == ["a", "b", "c"] * 2
    single = layer(batch["src"], src_key_padding_mask=mask)
    torch.testing.assert_close(layer(**stacked), torch.cat([single, single], 1))


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((3, 2, 4, 4), torch.channels_last), ((3, 2, 4, 4, 4), torch.channels_last_3d)],
)
def test_channels_stay_last(shape, layout):
    x = torch.randn(shape).to(memory_format=layout)
    for changed, expected in (
        (repeat_batch(x), torch.cat([x, x])),
        (repeat_batch(x, 1), x),
        (take_items(x, torch.tensor([2, 0])), x[[2, 0]]),
    ):
        assert torch.equal(changed, expected)
        assert changed.is_contiguous(memory_format=layout)
    row = torch.randn(1, 4).expand(3, 4)
    assert torch.equal(repeat_batch(row), row.repeat(2, 1))


@pytest.mark.parametrize(("dim", "error"), [(-1, ValueError), (1.0, TypeError), (True, TypeError)])
def test_a_dimension_that_is_none_is_named(dim, error):
    with pytest.raises(error, match="dim must be"):
        repeat_batch(make(), dim=dim)


# --- packed sequences ------------------------------------------------------------------------


SEQUENCES = [torch.arange(2.0), torch.arange(10.0, 15.0), torch.arange(20.0, 23.0)]
PACKED = {
    "sorted": pack_sequence([SEQUENCES[1], SEQUENCES[2], SEQUENCES[0]]),
    "unsorted": pack_sequence(SEQUENCES, enforce_sorted=False),
    "of vectors": pack_sequence(
        [x[:, None].expand(-1, 2) for x in SEQUENCES], enforce_sorted=False
    ),
    "of integers": pack_sequence([x.long() for x in SEQUENCES], enforce_sorted=False),
}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("num_passes", [1, 2, 3])
def test_a_packed_sequence_holds_the_sequences_of_every_pass(name, num_passes):
    packed = PACKED[name]
    stacked = repeat_batch({"x": packed, "y": torch.arange(3)}, num_passes)
    assert stacked["y"].shape == (3 * num_passes,)
    assert type(stacked["x"]) is PackedSequence
    assert stacked["x"].data.dtype == packed.data.dtype
    expected = unpack_sequence(packed) * num_passes
    for ours, theirs in zip(unpack_sequence(stacked["x"]), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert find_batch_size([packed]) == 3


def test_sequences_are_taken_from_a_packed_one():
    taken = take_items((PACKED["unsorted"], make()), torch.tensor([2, 0, 2]))
    expected = [SEQUENCES[2], SEQUENCES[0], SEQUENCES[2]]
    for ours, theirs in zip(unpack_sequence(taken[0]), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_recurrent_network_gives_every_pass_the_same():
    torch.manual_seed(0)
    network = nn.GRU(2, 4)
    _, single = network(PACKED["of vectors"])
    _, both = network(repeat_batch(PACKED["of vectors"]))
    torch.testing.assert_close(both, torch.cat([single, single], 1))


# --- sparse and nested tensors ----------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_sparse_tensors_are_stacked_and_taken(layout):
    dense = torch.tensor([[0.0, 1, 0], [2, 0, 0], [0, 0, 0], [0, 3, 4]])
    batch = {"words": dense.to_sparse(layout=layout), "length": torch.arange(4)}
    stacked = repeat_batch(batch)
    assert stacked["words"].layout == layout
    assert torch.equal(stacked["words"].to_dense(), torch.cat([dense, dense]))
    taken = take_items(batch, torch.tensor([3, 3, 0]))
    assert torch.equal(taken["words"].to_dense(), dense[[3, 3, 0]])
    assert torch.equal(first_items(batch, 2)["words"].to_dense(), dense[:2])


@pytest.mark.parametrize(
    "make_one",
    [
        lambda: torch.ones(4, 6).to_sparse_bsr((2, 2)),
        lambda: torch.eye(4).expand(3, 4, 4).to_sparse_csr(),
        lambda: torch.ones(4, 6).to_sparse().requires_grad_(),
    ],
)
def test_a_sparse_tensor_that_cannot_be_stacked_is_named(make_one):
    with pytest.raises(TypeError, match="a sparse tensor that cannot be stacked: it must be COO"):
        repeat_batch([make_one()])


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("name", ["words", "input_ids"])
def test_a_nested_tensor_is_not_stacked(layout, name):
    """A stacked one would not fit another of the same lengths, which was stacked by itself."""
    batch = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(5, 3)], layout=layout)
    with pytest.raises(TypeError, match=r"a nested tensor, .* passes=.sequential."):
        repeat_batch({name: batch, "position_ids": batch})
    assert repeat_batch({name: batch, "x": torch.ones(2)}, shared=name)["x"].shape == (4,)

    def forward(words):
        return torch.stack([row.sum() for row in words.unbind()])

    outputs = run_passes(forward, batch, num_passes=2, strategy="sequential")
    assert outputs.tolist() == [6, 15, 6, 15]


def test_nested_logits_are_refused_and_their_values_are_taken():
    rows = [torch.randn(2, 3), torch.randn(5, 3)]
    logits = torch.nested.nested_tensor([*rows, *rows], layout=torch.jagged)
    target = torch.nested.nested_tensor(
        [torch.tensor([0, 2]), torch.tensor([1, 1, 0, 2, 0])], layout=torch.jagged
    )
    with pytest.raises(TypeError, match=r"logits must not be a nested tensor; .* logits.values"):
        rdrop_cross_entropy(logits, target, alpha=1.0)
    loss = rdrop_cross_entropy(logits.values(), target.values(), alpha=1.0)
    expected = F.cross_entropy(torch.cat(rows), target.values())
    torch.testing.assert_close(loss.nll, expected)


# --- several documents in one row ------------------------------------------------------------


def packed_row(**others):
    """Return documents of 3, 2 and 4 tokens in one row."""
    lengths = [3, 2, 4]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    starts = torch.tensor([0, 3, 5, 9], dtype=torch.int32)
    return {
        "input_ids": torch.arange(9)[None],
        "position_ids": positions,
        "cu_seq_lens_q": starts,
        "cu_seqlens_k": starts,
        "max_length_q": 4,
        "max_seqlen_k": torch.tensor([4]),
        "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2]], dtype=torch.int32),
        **others,
    }


@pytest.mark.parametrize("num_passes", [1, 2, 3])
def test_documents_of_all_passes_follow_each_other(num_passes):
    batch = packed_row()
    stacked = repeat_batch(batch, num_passes)
    assert stacked["input_ids"].shape == (num_passes, 9)
    for name in ("cu_seq_lens_q", "cu_seqlens_k"):
        starts = stacked[name]
        assert starts.dtype == torch.int32
        assert starts.tolist() == [0] + [s + 9 * i for i in range(num_passes) for s in (3, 5, 9)]
    assert stacked["max_length_q"] == 4
    assert stacked["max_seqlen_k"] is batch["max_seqlen_k"]
    assert stacked["seq_idx"].dtype == torch.int32
    rows = [[n + 3 * i for n in (0, 0, 0, 1, 1, 2, 2, 2, 2)] for i in range(num_passes)]
    assert stacked["seq_idx"].tolist() == rows
    assert_same_structure(take_items(batch, torch.zeros(num_passes, dtype=torch.long)), stacked)


def test_documents_of_a_decoder_are_told_by_its_names():
    batch = packed_row(decoder_cu_seq_lens=torch.tensor([0, 4, 6]), decoder_max_length_q=4)
    assert repeat_batch(batch)["decoder_cu_seq_lens"].tolist() == [0, 4, 6, 10, 12]
    longest = torch.tensor([4])
    alone = {"x": make(1), "decoder_cu_seqlens": torch.tensor([0, 4]), "max_seqlen_q": longest}
    assert repeat_batch(alone)["max_seqlen_q"] is longest


def test_stacked_rows_are_stacked_again():
    twice = repeat_batch(repeat_batch(packed_row(seq_idx=None)))
    assert_same_structure(twice, repeat_batch(packed_row(seq_idx=None), 4))
    assert_same_structure(take_items(twice, torch.arange(4)), twice)


def test_a_part_of_packed_rows_cannot_be_taken():
    batch = repeat_batch(packed_row(seq_idx=None))
    for index in ([1], [1, 0], [0, 1, 0]):
        with pytest.raises(ValueError, match=r"cu_seq_lens_q tells where .* cannot be taken"):
            take_items(batch, torch.tensor(index))


@pytest.mark.parametrize("attention", [{}, {"attention_mask": None}])
def test_documents_that_positions_alone_tell_apart_are_refused(attention):
    row = packed_row()
    hidden = {name: row[name] for name in ("input_ids", "position_ids")} | attention
    with pytest.raises(ValueError, match=r'passes="sequential", or a collator that .* cu_seq_lens'):
        repeat_batch(hidden)
    with pytest.raises(ValueError, match="attend to each other"):
        repeat_batch(({"inner": hidden},), batch_size=1)
    with pytest.raises(ValueError, match="attend to each other"):
        take_items(hidden, torch.tensor([0, 0]))
    assert_same_structure(repeat_batch(hidden, 1), hidden)
    assert_same_structure(take_items(hidden, torch.tensor([0])), hidden)


def test_documents_of_one_token_are_seen_too():
    batch = {"input_ids": torch.arange(4)[None], "position_ids": torch.tensor([[0, 0, 1, 2]])}
    with pytest.raises(ValueError, match="attend to each other"):
        repeat_batch(batch)


@pytest.mark.parametrize(
    "change",
    [
        {"position_ids": torch.arange(9)[None]},  # one document
        {"attention_mask": torch.ones(1, 9)},
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1, 2]] * 3)[:, None]},  # of images
        {"input_ids": torch.arange(18).view(2, 9), "position_ids": torch.zeros(2, 9).long()},
    ],
)
def test_other_positions_are_stacked(change):
    row = packed_row()
    batch = {name: row[name] for name in ("input_ids", "position_ids")} | change
    assert len(repeat_batch(batch)["input_ids"]) == 2 * len(batch["input_ids"])


def test_names_of_packed_rows_mean_nothing_without_them():
    stacked = repeat_batch({"input_ids": make(), "max_length_q": torch.arange(3)})
    assert stacked["max_length_q"].tolist() == [0, 1, 2] * 2


def test_items_of_a_batch_without_tensors_cannot_be_taken():
    with pytest.raises(ValueError, match="batch must hold a tensor"):
        take_items({"a": "text"}, torch.tensor([0]))


@st.composite
def batches(draw):
    size = draw(st.integers(1, 4))
    shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
    leaves = st.one_of(
        shapes.map(lambda shape: torch.rand(size, *shape)),
        shapes.map(lambda shape: torch.rand(shape)),
        st.lists(st.text(max_size=2), min_size=size, max_size=size),
        st.integers(),
        st.none(),
        st.text(max_size=3),
    )
    names = st.sampled_from(["a", "b", "c"])

    def containers(items):
        several = st.lists(items, max_size=3)
        named = st.dictionaries(names, items, max_size=3)
        return st.one_of(
            several,
            several.map(tuple),
            named,
            named.map(UserDict),
            named.map(OrderedDict),
            items.map(Frozen),
            items.map(lambda item: Pair(item, None)),
        )

    rest = draw(st.recursive(leaves, containers, max_leaves=8))
    return {"input_ids": torch.rand(size, 2), "rest": rest, "c": 0}, size


@settings(max_examples=100, deadline=None)
@given(batches(), st.integers(1, 4), st.booleans())
def test_repeating_is_taking_every_item_again_and_again(drawn, num_passes, is_size_given):
    batch, size = drawn
    options = {"batch_size": size if is_size_given else None, "shared": ["c"]}
    index = torch.arange(size).repeat(num_passes)
    repeated = repeat_batch(batch, num_passes, **options)
    assert repeated["input_ids"].shape == (num_passes * size, 2)
    assert_same_structure(take_items(batch, index, **options), repeated)


def test_first_items_are_views_and_the_rest_passes_through():
    batch = {"x": torch.arange(6.0), "names": list("abcdef"), "table": torch.ones(2)}
    first = first_items(batch, 2, batch_size=6)
    assert first["x"].tolist() == [0, 1]
    assert first["x"].data_ptr() == batch["x"].data_ptr()
    assert first["names"] == ["a", "b"]
    assert first["table"] is batch["table"]
    assert len(first_items(batch, 2, shared=["x"])["x"]) == 6


def test_tensors_of_a_structure_come_in_order():
    a, b, c = torch.ones(1), torch.ones(()), torch.ones(2)
    assert [*map(id, find_tensors({"x": [a, None, (b, "text")], "y": c}))] == [id(a), id(b), id(c)]
