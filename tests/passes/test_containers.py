"""Graphs of PyTorch Geometric, and the classes of tensordict, as batches."""

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict, tensorclass
from torch import nn
from torch_geometric.data import Batch, Data, HeteroData
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GCNConv, global_mean_pool

from regdrop import RDropConfig, rdrop_cross_entropy, rdrop_step, repeat_batch
from regdrop.passes import find_batch_size, find_tensors, run_passes, take_items


def ring(size, label=0):
    """A graph whose nodes each have an edge to the next."""
    first = torch.arange(size)
    edges = torch.stack([first, (first + 1) % size])
    return Data(x=torch.randn(size, 3), edge_index=edges, y=torch.tensor([label]))


@pytest.fixture
def graphs():
    torch.manual_seed(0)
    return Batch.from_data_list([ring(size, size % 2) for size in (3, 5, 4)])


class Network(nn.Module):
    def __init__(self, by_node=False):
        super().__init__()
        self.body, self.head, self.by_node = GCNConv(3, 16), nn.Linear(16, 2), by_node
        self.dropout = nn.Dropout(0.5)

    def forward(self, graph):
        x = self.dropout(self.body(graph.x, graph.edge_index).relu())
        return self.head(x if self.by_node else global_mean_pool(x, graph.batch))


@pytest.mark.parametrize("by_node", [False, True])
@pytest.mark.parametrize("num_passes", [2, 3])
def test_every_pass_is_what_the_graphs_give_by_themselves(graphs, by_node, num_passes):
    network = Network(by_node).eval()
    stacked = network(repeat_batch(graphs, num_passes))
    torch.testing.assert_close(stacked, network(graphs).repeat(num_passes, 1))


def test_a_graph_alone_is_one_item():
    graph = ring(5)
    network = Network(by_node=True).eval()
    assert find_batch_size(graph) == 1
    stacked = network(repeat_batch(graph))
    torch.testing.assert_close(stacked, network(graph).repeat(2, 1))
    assert graph.num_nodes == 5


def test_the_callers_graphs_are_untouched(graphs):
    before = graphs.clone()
    repeated = repeat_batch(graphs)
    assert (repeated.num_graphs, find_batch_size(graphs)) == (6, 3)
    repeated.x += 1
    assert torch.equal(graphs.x, before.x)
    assert torch.equal(graphs.edge_index, before.edge_index)


def test_graphs_are_taken_in_the_order_of_the_index(graphs):
    taken = take_items(graphs, torch.tensor([2, 0]))
    sizes = [graph.num_nodes for graph in taken.to_data_list()]
    assert sizes == [4, 3]
    assert torch.equal(taken[1].x, graphs[0].x)


def test_graphs_beside_tensors_of_the_same_items(graphs):
    texts = torch.randn(3, 7)
    for batch in ((graphs, texts), {"graph": graphs, "text": texts}):
        graph, text = [
            *(repeat_batch(batch).values() if isinstance(batch, dict) else repeat_batch(batch))
        ]
        assert graph.num_graphs == len(text) == 6
    other = repeat_batch({"text": torch.randn(2, 7), "graph": graphs})
    assert other["graph"] is graphs


def test_graphs_of_several_types():
    graph = HeteroData()
    graph["user"].x, graph["film"].x = torch.randn(3, 2), torch.randn(2, 2)
    graph["user", "saw", "film"].edge_index = torch.tensor([[0, 2], [1, 0]])
    repeated = repeat_batch(graph)
    assert torch.equal(repeated["film"].x, graph["film"].x.repeat(2, 1))
    edges = repeated["user", "saw", "film"].edge_index
    assert edges.tolist() == [[0, 2, 3, 5], [1, 0, 3, 2]]
    assert len([*find_tensors(graph)]) == 3


def test_graphs_that_cannot_be_stacked_are_named():
    own = ring(4)
    own.batch = torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match="Data with batch, so that it joins several graphs"):
        repeat_batch(own)
    sampled = ring(4)
    sampled.batch_size = 2
    with pytest.raises(ValueError, match="with batch_size, so that it is a sampled neighbourhood"):
        repeat_batch(sampled)


def without_edges(graphs):
    graphs.edge_index = graphs.edge_index[:, :-2]


def with_edges(graphs):
    graphs.edge_index = torch.cat([graphs.edge_index, graphs.edge_index.flip(0)], 1)


def with_positions(graphs):
    graphs.position = torch.randn(graphs.num_nodes, 2)


@pytest.mark.parametrize("change", [without_edges, with_edges, with_positions])
def test_a_batch_that_was_changed_after_it_was_joined_is_named(graphs, change):
    change(graphs)
    with pytest.raises(ValueError, match="DataBatch that was changed after its graphs were joined"):
        repeat_batch(graphs)


def test_values_may_be_changed_after_the_graphs_were_joined(graphs):
    graphs.x = graphs.x * 3
    graphs.edge_index = graphs.edge_index[:, torch.randperm(graphs.num_edges)]
    repeated = repeat_batch(graphs)
    assert torch.equal(repeated.x, graphs.x.repeat(2, 1))
    expected = torch.cat([graphs.edge_index, graphs.edge_index + graphs.num_nodes], 1)
    assert torch.equal(repeated.edge_index, expected)


class Pair(Data):
    """Two graphs of one item, as PyG's guide has them."""

    def __inc__(self, key, value, *args, **kwargs):
        for side in ("s", "t"):
            if key == f"edge_index_{side}":
                return self[f"x_{side}"].size(0)
        return super().__inc__(key, value, *args, **kwargs)


def test_batches_that_follow_an_attribute_follow_it_on():
    pairs = [
        Pair(
            x_s=torch.randn(size, 2),
            edge_index_s=torch.tensor([[0], [1]]),
            x_t=torch.randn(size + 1, 2),
            edge_index_t=torch.tensor([[1], [2]]),
        )
        for size in (2, 3)
    ]
    (batch,) = DataLoader(pairs, 2, follow_batch=["x_s", "x_t"])
    repeated = repeat_batch(batch)
    assert repeated.x_s_batch.tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert repeated.edge_index_t.tolist() == [[1, 4, 8, 11], [2, 5, 9, 12]]


def test_tensors_of_nodes_beside_a_graph_are_named(graphs):
    features = torch.randn(graphs.num_nodes, 2)
    for batch in ((graphs, features), {"features": features, "graph": graphs}):
        with pytest.raises(ValueError, match=r"tensor of shape .* for its 12 nodes"):
            repeat_batch(batch)


def test_graphs_have_only_a_first_dimension(graphs):
    with pytest.raises(ValueError, match="dim must be 0 for graphs, got 1"):
        repeat_batch(graphs, dim=1)


@pytest.mark.parametrize("backward_passes", [None, 1])
def test_a_forward_that_writes_into_the_graph_changes_no_other_pass(graphs, backward_passes):
    network = Network(by_node=True).eval()

    def forward(graph):
        graph.x = network(graph)
        return graph.x

    before = graphs.x.clone()
    options = {"num_passes": 2, "strategy": "sequential", "backward_passes": backward_passes}
    found = run_passes(forward, graphs, **options)
    torch.testing.assert_close(found, network(graphs).repeat(2, 1))
    assert torch.equal(graphs.x, before)


def test_a_list_of_graphs_is_named():
    with pytest.raises(TypeError, match=r"list of 2 graphs; .* Batch\.from_data_list"):
        repeat_batch([ring(3), ring(4)])


def test_the_loss_of_graphs_is_that_of_twice_the_graphs(graphs):
    network = Network()
    torch.manual_seed(1)
    ours = rdrop_cross_entropy(network(repeat_batch(graphs)), graphs.y, alpha=2.0)
    torch.manual_seed(1)
    logits = network(Batch.from_data_list(graphs.to_data_list() * 2))
    expected = rdrop_cross_entropy(logits, graphs.y, alpha=2.0)
    assert ours.kl > 0
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    "options", [{}, {"passes": "sequential"}, {"fraction": 0.5}, {"backward_passes": 1}]
)
def test_a_graph_network_learns(options):
    """Rings and stars: the numbers of their nodes' neighbours tell them apart."""
    torch.manual_seed(0)
    rows = []
    for size in [4, 5, 6, 7] * 8:
        around = torch.stack([torch.arange(size), (torch.arange(size) + 1) % size])
        star = torch.stack([torch.zeros(size - 1, dtype=torch.long), torch.arange(1, size)])
        for label, edges in enumerate([around, star]):
            edges = torch.cat([edges, edges.flip(0)], 1)
            degree = torch.bincount(edges[0], minlength=size)
            x = F.one_hot(degree.clamp(max=3) - 1, 3).float()
            rows.append(Data(x=x, edge_index=edges, y=torch.tensor([label])))
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    config = RDropConfig(alpha=1.0, **options)
    for step, graphs in enumerate([*DataLoader(rows, 16, shuffle=True)] * 15):
        output = rdrop_step(network, graphs, graphs.y, config=config, step=step)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        assert output.kl > 0
    whole = Batch.from_data_list(rows)
    assert (network.eval()(whole).argmax(1) == whole.y).float().mean() > 0.9


def test_sequential_passes_take_what_a_sampler_gives():
    network = Network(by_node=True)

    def seeds(sampled):
        return network(sampled)[: sampled.batch_size]

    sampled = ring(6)
    sampled.batch_size, labels = 4, torch.tensor([0, 1, 0, 1])
    config = RDropConfig(passes="sequential")
    output = rdrop_step(seeds, sampled, labels, config=config, step=0)
    assert output.kl > 0


def tensors(size):
    return {"x": torch.randn(size, 2), "deep": {"y": torch.arange(size)}}


@pytest.mark.parametrize("num_passes", [1, 2, 3])
def test_a_tensordict_is_stacked(num_passes):
    batch = TensorDict(tensors(3), batch_size=[3])
    repeated = repeat_batch({"more": batch, "z": torch.zeros(3)}, num_passes)["more"]
    assert isinstance(repeated, TensorDict)
    assert repeated.batch_size == (3 * num_passes,)
    assert torch.equal(repeated["x"], batch["x"].repeat(num_passes, 1))
    assert torch.equal(repeated["deep", "y"], torch.arange(3).repeat(num_passes))
    assert batch.batch_size == (3,)


@tensorclass
class Rows:
    x: torch.Tensor
    y: torch.Tensor


def test_a_tensorclass_is_stacked_and_taken():
    rows = Rows(x=torch.randn(3, 2), y=torch.arange(3), batch_size=[3])
    repeated = repeat_batch(rows)
    assert isinstance(repeated, Rows)
    assert torch.equal(repeated.y, torch.arange(3).repeat(2))
    assert take_items(rows, torch.tensor([2])).y.tolist() == [2]
    later = Rows(x=torch.zeros(5, 3), y=torch.ones(5, 3), batch_size=[5, 3])
    assert repeat_batch(later, dim=1).x.shape == (5, 6)


def test_tensordicts_of_other_sizes_pass_through():
    table = TensorDict(tensors(4), batch_size=[4])
    assert repeat_batch({"x": torch.zeros(3), "table": table})["table"] is table


def test_a_tensordict_without_a_batch_size_is_a_mapping():
    batch = TensorDict(tensors(3), batch_size=[])
    assert repeat_batch(batch)["deep", "y"].shape == (6,)


def test_a_tensorclass_without_the_dimension_of_the_items_is_named():
    rows = Rows(x=torch.randn(3, 2), y=torch.arange(3), batch_size=[])
    with pytest.raises(ValueError, match=r"a Rows whose batch_size, \[\], has no dimension 0"):
        repeat_batch((torch.zeros(3), rows))
    assert repeat_batch({"z": torch.zeros(3), "rows": rows}, shared=["rows"])["rows"] is rows


def test_a_name_inside_a_tensordict_cannot_be_shared():
    batch = {"x": torch.zeros(3), "more": TensorDict(tensors(3), [3])}
    with pytest.raises(ValueError, match="shared names 'deep', which is nowhere in the batch"):
        repeat_batch(batch, shared=["deep"])


@pytest.mark.parametrize("size", [[3], []])
def test_outputs_may_be_tensordicts(size):
    layer = nn.Linear(2, 4)

    def forward(x):
        return TensorDict({"logits": layer(x)}, size)

    found = run_passes(forward, torch.randn(3, 2), num_passes=2, strategy="sequential")
    assert found["logits"].shape == (6, 4)


def test_the_gradient_flows_back_into_a_tensordict():
    x = torch.randn(3, 2, requires_grad=True)
    F.mse_loss(repeat_batch(TensorDict({"x": x}, [3]))["x"], torch.zeros(6, 2)).backward()
    torch.testing.assert_close(x.grad, x.detach() / 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: TensorDict({"x": x}, [3]),
        lambda x: TensorDict({"x": x}, []),
        lambda x: Rows(x=x, y=torch.arange(3), batch_size=[3]),
    ],
)
def test_a_forward_that_writes_into_a_tensordict_changes_no_other_pass(make):
    layer, x = nn.Linear(2, 2), torch.randn(3, 2)

    def forward(batch):
        if isinstance(batch, Rows):
            batch.x = layer(batch.x)
            return batch.x
        batch["x"] = layer(batch["x"])
        return batch["x"]

    batch = make(x)
    found = run_passes(forward, batch, num_passes=2, strategy="sequential")
    torch.testing.assert_close(found, layer(x).repeat(2, 1))
    assert torch.equal(batch.x if isinstance(batch, Rows) else batch["x"], x)
