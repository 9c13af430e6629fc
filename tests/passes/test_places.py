"""Where tensors have their items whose shape alone does not tell it: masks, states, matrices."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from regdrop import RDropConfig, rdrop_step, repeat_batch
from regdrop.passes import find_batch_size, take_items
from regdrop.passes.stacking import first_items

CAUSAL = nn.Transformer.generate_square_subsequent_mask


# --- masks, where the batch has as many time steps as items --------------------------------------


@pytest.mark.parametrize("name", ["src_key_padding_mask", "padding_mask", "pad_mask"])
@pytest.mark.parametrize("length", [3, 4, 5])
def test_padding_masks_have_the_items_first_whatever_the_length(name, length):
    batch = {"src": torch.randn(length, 4, 8), name: torch.rand(4, length) > 0.5}
    repeated = repeat_batch(batch, dim=1)
    assert torch.equal(repeated[name], torch.cat([batch[name]] * 2))
    assert torch.equal(repeated["src"], torch.cat([batch["src"]] * 2, 1))


def test_a_model_that_takes_the_time_first_masks_what_is_padding():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    mask = torch.arange(4) >= torch.tensor([4, 1, 3, 2])[:, None]
    batch = {"src": torch.randn(4, 4, 8), "src_key_padding_mask": mask}
    single, both = layer(**batch), layer(**repeat_batch(batch, dim=1))
    torch.testing.assert_close(both, torch.cat([single, single], 1))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", ["mask", "src_mask", "attn_mask", "causal_mask"])
@pytest.mark.parametrize(
    "mask", [CAUSAL(4), CAUSAL(2), CAUSAL(4) < 0, ~(CAUSAL(4) < 0), CAUSAL(4).bfloat16()]
)
def test_a_causal_mask_is_that_of_all_items(batch_first, name, mask):
    batch = {"src": torch.randn(len(mask), len(mask), 8), name: mask}
    assert repeat_batch(batch, dim=0 if batch_first else 1)[name] is mask
    assert take_items(batch, torch.tensor([1, 1, 0]))[name] is mask


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("mask", torch.arange(4) >= torch.tensor([2, 4, 1, 3])[:, None]),
        ("attention_mask", torch.ones(4, 4).tril().long()),  # sentences of 1 to 4 words
        ("attn_mask", torch.ones(4, 4)),
        ("mask", torch.ones(3, 3).tril().bool()),
        ("padding_mask", CAUSAL(4) < 0),
        ("causal", CAUSAL(4)),
        ("mask", np.tril(np.ones((4, 4)))),
    ],
)
def test_other_masks_of_as_many_steps_are_those_of_the_items(name, mask):
    repeated = repeat_batch({"x": torch.zeros(len(mask), 2), name: mask})[name]
    assert repeated.tolist() == [*mask.tolist(), *mask.tolist()]


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("mask", torch.rand(4, 4) > 2),
        ("valid", torch.rand(4, 4) > 2),
        ("loss_mask", torch.ones(4, 4)),
        ("src_mask", torch.ones(4, 4)),
        ("keep", np.zeros((4, 4), dtype=bool)),
    ],
)
def test_a_mask_that_may_have_the_time_first_is_named(name, mask):
    batch = {"src": torch.randn(4, 4, 8), name: mask}
    with pytest.raises(ValueError, match=rf"holds {name} .* items may be in either .* dim={{"):
        repeat_batch(batch, dim=1)
    for own, shape in ((0, (8, 4)), (1, (4, 8))):
        repeated = repeat_batch(batch, dim={"src": 1, name: own})
        assert repeated["src"].shape == (4, 8, 8)
        assert repeated[name].shape == shape
    assert repeat_batch(batch, dim={"src": 1})[name].shape == (8, 4)
    assert repeat_batch(batch, dim=1, shared=name)[name] is mask
    assert repeat_batch(batch, 1, dim=1)[name].shape == (4, 4)


def test_words_of_as_many_steps_as_items_have_the_time_first():
    words = torch.arange(16).view(4, 4)
    assert repeat_batch({"words": words, "tags": words}, dim=1)["tags"].shape == (4, 8)
    assert repeat_batch(words > 3, dim=1).shape == (4, 8)
    with pytest.raises(ValueError, match="holds a mask of shape"):
        repeat_batch((words, words > 3), dim=1)


# --- a dimension by name -------------------------------------------------------------------------


def test_tensors_have_the_dimension_that_is_given_by_their_name():
    size, x = 3, torch.randn(5, 3, 2)
    batch = {
        "memory": SimpleNamespace(x=x, note="kept"),
        "pair": (x, [x + 1]),
        "y": torch.arange(size),
    }
    repeated = repeat_batch(batch, dim={"x": 1, "pair": 1})
    assert repeated["memory"].x.shape == (5, 6, 2)
    assert [repeated["pair"][0].shape, repeated["pair"][1][0].shape] == [(5, 6, 2)] * 2
    assert repeated["y"].shape == (6,)
    assert find_batch_size(batch, {"x": 1}) == size
    deeper = repeat_batch({"all": {"x": x, "y": torch.arange(3)}}, dim={"all": 1, "y": 0})
    assert [*map(len, deeper["all"].values())] == [5, 6]


@pytest.mark.parametrize(
    ("dim", "error", "message"),
    [
        ({"scr": 1}, ValueError, "dim names 'scr', .* did you mean 'src'"),
        ({"src": 0}, ValueError, r"dim\['src'\]=0 must be where it has the 4 items, got .*\(3, 4"),
        ({"src": -1}, ValueError, r"dim\['src'\] must be at least 0"),
        ({"src": None}, TypeError, r"dim\['src'\] must be an integer"),
    ],
)
def test_a_dimension_by_a_name_that_cannot_be_is_named(dim, error, message):
    batch = {"y": torch.arange(4), "src": torch.randn(3, 4, 2)}
    with pytest.raises(error, match=message):
        repeat_batch(batch, dim=dim)


# --- states and masks of modules of torch --------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("kind", ["two names", "a tuple", "first"])
def test_states_of_a_recurrent_network_have_the_layers_first(layers, kind):
    torch.manual_seed(0)
    network = nn.LSTM(6, 8, layers, batch_first=True)
    x, h, c = torch.randn(4, 7, 6), torch.randn(layers, 4, 8), torch.randn(layers, 4, 8)
    single, _ = network(x, (h, c))
    batch = {"x": x, "h0": h, "c0": c}
    if kind == "a tuple":
        batch = {"x": x, "hx": (h, c)}
    elif kind == "first":
        batch = {"h0": h, "c0": c, "x": x}

    def run(batch):
        return network(batch["x"], batch.get("hx") or (batch["h0"], batch["c0"]))[0]

    torch.testing.assert_close(run(repeat_batch(batch)), torch.cat([single, single]))
    index = torch.tensor([3, 1, 3])
    torch.testing.assert_close(run(take_items(batch, index)), single[index])
    torch.testing.assert_close(run(first_items(batch, 2)), single[:2])


def test_a_state_with_the_batch_first_is_stacked_there():
    batch = {"x": torch.randn(4, 7, 6), "hidden": torch.randn(4, 2, 8), "h0": torch.randn(4, 8)}
    repeated = repeat_batch(batch)
    assert repeated["hidden"].shape == (8, 2, 8)
    assert repeated["h0"].shape == (8, 8)
    assert repeat_batch({**batch, "hidden": torch.randn(2, 4, 8)})["hidden"].shape == (2, 8, 8)
    table = torch.randn(2, 4, 8)
    assert repeat_batch({"x": batch["x"], "table": table})["table"] is table
    assert repeat_batch({"x": batch["x"], "mask": table})["mask"] is table


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("length", [4, 7])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("name", ["attn_mask", "mask"])
def test_masks_of_every_head_are_those_of_their_items(batch_first, length, heads, name):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, heads, batch_first=batch_first)
    x = torch.randn(4, length, 8) if batch_first else torch.randn(length, 4, 8)
    mask = torch.rand(4 * heads, length, length) > 0.6
    mask[..., 0] = False
    batch, dim = {"x": x, name: mask}, 0 if batch_first else 1

    def run(batch):
        x = batch["x"]
        return attention(x, x, x, attn_mask=batch[name])[0]

    single, both = run(batch), run(repeat_batch(batch, dim=dim))
    torch.testing.assert_close(both, torch.cat([single, single], dim))
    if batch_first:
        index = torch.tensor([2, 0, 2])
        torch.testing.assert_close(run(take_items(batch, index)), single[index])
        torch.testing.assert_close(run(first_items(batch, 3)), single[:3])


# --- matrices between the items ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "matrix"),
    [
        ("adj", torch.eye(6)),
        ("adjacency_matrix", np.eye(6)),
        ("norm_adj", torch.eye(6)),
        ("graph", torch.eye(6).to_sparse()),
        ("laplacian", torch.eye(6).to_sparse_csr()),
    ],
)
def test_a_matrix_between_all_items_is_named(name, matrix):
    batch = {"x": torch.randn(6, 4), name: matrix}
    with pytest.raises(ValueError, match=rf"holds {name} of shape \(6, 6\), a matrix .*sequential"):
        repeat_batch(batch)
    assert repeat_batch(batch, shared=name)[name] is matrix
    repeat_batch(batch, 1)
    padded = {"x": torch.randn(3, 6, 4), "adj": torch.eye(6).expand(3, 6, 6)}
    assert repeat_batch(padded)["adj"].shape == (6, 6, 6)
    assert repeat_batch({"x": torch.randn(3, 6, 4), name: matrix})[name] is matrix


def test_a_graph_network_with_such_a_matrix_runs_one_pass_after_the_other():
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 5))
    batch = {"x": torch.randn(6, 4), "adj": torch.eye(6).to_sparse()}
    config = RDropConfig(passes="sequential")
    labels = torch.tensor([0, 1, 2, 3, 4, 0])

    def forward(batch):
        return torch.sparse.mm(batch["adj"], net(batch["x"]))

    assert rdrop_step(forward, batch, labels, config=config, step=0).kl > 0


# --- positions in time, height and width ---------------------------------------------------------


@pytest.mark.parametrize("axes", [3, 4])
@pytest.mark.parametrize("rows", [2, 3, 4])
def test_positions_of_several_axes_have_the_items_second(axes, rows):
    positions = torch.arange(axes * rows * 5).view(axes, rows, 5)
    batch = {"input_ids": torch.zeros(rows, 5), "position_ids": positions}
    assert torch.equal(repeat_batch(batch)["position_ids"], torch.cat([positions] * 2, 1))
    index = torch.tensor([1, 0, 1])
    assert torch.equal(take_items(batch, index)["position_ids"], positions[:, index])


@pytest.mark.parametrize("axes", [3, 4])
@pytest.mark.parametrize("rows", [2, 3, 4])
def test_positions_of_several_axes_that_all_rows_share_are_shared(axes, rows):
    batch = {"input_ids": torch.zeros(rows, 5), "position_ids": torch.zeros(axes, 1, 5)}
    assert repeat_batch(batch)["position_ids"] is batch["position_ids"]
    taken = take_items(batch, torch.tensor([0, 1]))
    assert taken["position_ids"] is batch["position_ids"]
