"""What a model returns is joined and cut part by part, and keeps its types."""

from collections import OrderedDict, deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import attrs
import pytest
import torch
from tensordict import TensorDict, tensorclass
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from transformers.modeling_outputs import SequenceClassifierOutput

from regdrop.passes import concatenate_outputs, count_rows, map_rows, run_passes

SIZE = 3


class Named(NamedTuple):
    logits: object


@dataclass(frozen=True)
class Record:
    logits: object


@attrs.frozen
class Slotted:
    logits: object


@tensorclass
class Rows:
    logits: torch.Tensor


KINDS = [
    dict,
    OrderedDict,
    Named,
    Record,
    Slotted,
    SimpleNamespace,
    SequenceClassifierOutput,
    lambda logits: TensorDict({"logits": logits}, [len(logits)]),
    lambda logits: TensorDict({"logits": logits}, []),
    lambda logits: Rows(logits=logits, batch_size=[len(logits)]),
    lambda logits: Rows(logits=logits, batch_size=[]),
]


def read(output):
    return output["logits"] if isinstance(output, (dict, TensorDict)) else output.logits


def sequences(*lengths):
    return [torch.randn(length, 2, dtype=torch.float64) for length in lengths]


def unpack(packed):
    padded, lengths = pad_packed_sequence(packed, batch_first=True)
    return [rows[:length] for rows, length in zip(padded, lengths, strict=True)]


@pytest.mark.parametrize("make", KINDS)
def test_a_structure_keeps_its_type(make):
    first, second = (make(logits=torch.randn(SIZE, 2)) for _ in range(2))
    joined = concatenate_outputs([first, second])
    assert type(joined) is type(first)
    assert torch.equal(read(joined), torch.cat([read(first), read(second)]))
    cut = map_rows(lambda rows: rows[:2], first)
    assert type(cut) is type(first)
    assert torch.equal(read(cut), read(first)[:2])
    assert len(read(first)) == SIZE


@pytest.mark.parametrize("lengths", [((4, 2, 1), (4, 2, 1)), ((1, 3), (2, 5, 1))])
def test_packed_sequences_are_joined_as_sequences(lengths):
    parts = [sequences(*some) for some in lengths]
    packed = [pack_sequence(part, enforce_sorted=False) for part in parts]
    joined = unpack(concatenate_outputs(packed))
    torch.testing.assert_close(joined, [*parts[0], *parts[1]])
    assert count_rows(concatenate_outputs(packed)) == {"output": sum(map(len, lengths))}


def test_some_of_packed_sequences_are_those_sequences():
    items = sequences(1, 4, 2)
    packed = pack_sequence(items, enforce_sorted=False)
    found = map_rows(lambda rows: torch.cat([rows[:2][torch.tensor([1])], rows[2:]]), packed)
    torch.testing.assert_close(unpack(found), items[1:])


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_a_number_becomes_its_mean_over_the_passes(kind):
    found = concatenate_outputs([kind(1.0), kind(4.0)], passes=[2, 1], backward_passes=2)
    assert type(found) is type(kind(2.0))
    assert float(found) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("passes", "graded"),
    [([1, 1], 2), ([1, 1], 1), ([2, 1], 3), ([2, 1], 2), ([1, 2], 1), ([1, 1, 1], 2)],
)
def test_the_gradient_of_a_number_is_that_of_the_passes_that_have_one(passes, graded):
    numbers = [torch.tensor(float(i), requires_grad=True) for i in range(len(passes))]
    found = concatenate_outputs(numbers, passes=passes, backward_passes=graded)
    found.backward()
    expected, before = [], 0
    for times in passes:
        expected.append(times / graded if before < graded else 0.0)
        before += times
    assert [float(n.grad) for n in numbers] == pytest.approx(expected)


@pytest.mark.parametrize("value", [3, True, "text", None, torch.tensor(3), torch.tensor(False)])
def test_what_is_the_same_in_every_pass_stays_so(value):
    assert concatenate_outputs([{"e": value}, {"e": value}])["e"] is value


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (3, 4, r"output\['e'\] with one value \(or as a float.* got 3 in one and 4"),
        (torch.tensor(3), torch.tensor(4), r"output\['e'\] with one value .* got 3 in one and 4"),
        ("a", "b", r"output\['e'\] with one value"),
        (torch.ones(2, 3), torch.ones(2, 4), r"output\['e'\] with rows of one shape .*\(3,\)"),
        ((1, 2), (1,), r"output\['e'\] of one length in every pass, got 2 in one and 1"),
        ({"a": 1}, {"b": 1}, r"output\['e'\] with the same names"),
        (SimpleNamespace(a=1), SimpleNamespace(), r"output\['e'\] with the same fields"),
    ],
)
def test_outputs_that_differ_are_named(first, second, message):
    with pytest.raises(ValueError, match=message):
        concatenate_outputs([{"e": first}, {"e": second}])


def test_outputs_of_different_types_are_named():
    with pytest.raises(TypeError, match=r"output\[1\]\.logits of one type .* Tensor .* NoneType"):
        concatenate_outputs([(None, Named(torch.ones(2))), (None, Named(None))])


class DynamicCache:
    """As a model of transformers returns it."""


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (deque([1]), r"got output\[0\]\['e'\]: deque; leave it out of what forward returns$"),
        (DynamicCache(), r"got output\[0\]\['e'\]: DynamicCache; .* by use_cache=False"),
        (torch.ones(2).numpy(), r"got output\[0\]\['e'\]: ndarray"),
        (torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged), "NestedTensor"),
        (torch.distributions.Normal(0, 1), "Normal"),
    ],
)
def test_an_object_is_refused_by_its_name(value, message):
    for function in (
        lambda output: concatenate_outputs([output, output]),
        lambda output: map_rows(torch.neg, output),
        count_rows,
    ):
        with pytest.raises(TypeError, match=message):
            function([{"e": value}])


def test_sparse_rows_are_joined_and_not_cut():
    rows = torch.eye(2).to_sparse()
    joined = concatenate_outputs([rows, rows])
    assert torch.equal(joined.to_dense(), torch.eye(2).repeat(2, 1))
    with pytest.raises(TypeError, match=r"output as a dense tensor, got torch\.sparse_coo"):
        map_rows(lambda x: x[:1], rows)


def test_what_has_no_rows_is_left_as_it_is():
    output = {"number": torch.tensor(2.0), "float": 0.5, "text": "a", "none": None, "int": 3}
    assert map_rows(lambda rows: rows[:1], output) == output
    assert count_rows({**output, "rows": [torch.ones(4, 2)]}) == {"output['rows'][0]": 4}


# --- rows that are not those of the items ---------------------------------------------------------


def outputs_of(load, **options):
    def forward(x):
        return {"logits": x * 1, "load": load(x)}

    return run_passes(forward, torch.randn(SIZE, 2), **options)


SEVERAL = [
    {"num_passes": 2, "strategy": "sequential"},
    {"num_passes": 2, "backward_passes": 1},
    {"num_passes": 3, "backward_passes": 2},
    {"num_passes": 3, "backward_passes": 1},
    {"num_passes": 2, "strategy": "sequential", "items": torch.tensor([2, 0])},
]


@pytest.mark.parametrize("options", SEVERAL)
@pytest.mark.parametrize("count", [1, 4, 5, 7])
def test_rows_that_fit_no_item_are_refused_where_outputs_are_joined(options, count):
    with pytest.raises(ValueError, match=r"return output\['load'\] with one row an item"):
        outputs_of(lambda x: torch.arange(count), **options)


@pytest.mark.parametrize("options", SEVERAL[2:])
def test_rows_that_do_not_follow_the_items_are_refused(options):
    """They are as many as the items of one of the forwards, by chance."""
    for count in (SIZE, 2 * SIZE):
        with pytest.raises(ValueError, match=r"return output\['load'\] with one row an item"):
            outputs_of(lambda x, count=count: torch.arange(count), **options)


@pytest.mark.parametrize("options", SEVERAL)
@pytest.mark.parametrize("times", [1, 2])
def test_rows_of_the_items_are_joined(options, times):
    found = outputs_of(lambda x: x.repeat_interleave(times, 0), **options)
    torch.testing.assert_close(found["load"], found["logits"].repeat_interleave(times, 0))


@pytest.mark.parametrize("options", SEVERAL[:4])
def test_rows_may_be_those_of_something_else(options):
    """Words that are masked, as many in every pass."""

    def masked_words(x):
        return torch.zeros(len(x) // SIZE * 5, 2)

    num_passes = options["num_passes"]
    assert len(outputs_of(masked_words, rows=[5], **options)["load"]) == 5 * num_passes
    with pytest.raises(ValueError, match="with one row an item"):
        outputs_of(masked_words, rows=[4], **options)


def test_one_forward_gives_what_it_returned():
    load = torch.arange(5)
    assert outputs_of(lambda x: load, num_passes=2)["load"] is load


def test_where_nobody_knows_the_items_only_passes_are_compared():
    options = {"num_passes": 2, "strategy": "sequential"}
    found = run_passes(lambda batch: torch.ones(5), object(), **options)
    assert len(found) == 10
    calls = iter([5, 4])
    with pytest.raises(ValueError, match=r"got \[5, 4\] rows for \[1, 1\] passes"):
        run_passes(lambda batch: torch.ones(next(calls)), object(), **options)
