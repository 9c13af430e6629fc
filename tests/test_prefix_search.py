import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from models import image_rows, tiny_bert, tiny_vit
from regdrop import share_prefix
from regdrop.prefix_search import PrefixSuggestion, suggest_prefix


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


class Model(nn.Module):
    """A body and a head; without bias a row costs two operations a weight."""

    def __init__(self, body, head):
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x):
        return self.head(self.body(x))


def trunk_and_head(body=None, dropout=0.1):
    body = body or nn.Sequential(linear(4, 10), nn.Tanh(), linear(10, 20))
    return Model(body, nn.Sequential(nn.Dropout(dropout), linear(20, 12))).train()


X = torch.randn(3, 4)


def test_the_largest_part_before_the_first_dropout_and_its_share():
    found = suggest_prefix(trunk_and_head(), [X, X[:2]])
    assert found == PrefixSuggestion("body", pytest.approx(240 / (240 + 240)))


def test_a_part_with_dropout_gives_way_to_the_largest_before_it():
    body = nn.Sequential(linear(4, 10), linear(10, 20), nn.Dropout(0.1), linear(20, 20))
    assert suggest_prefix(trunk_and_head(body), [X]).until == "body.1"


def test_of_a_part_and_its_wrapper_the_wrapper():
    assert suggest_prefix(trunk_and_head(nn.Sequential(linear(4, 20))), [X]).until == "body"


def test_batches_may_be_mappings_and_tuples():
    for batch in ({"x": X}, (X,)):
        assert suggest_prefix(trunk_and_head(), [batch]).until == "body"


def test_batches_of_a_loader_may_have_a_target_behind():
    data = TensorDataset(torch.randn(4, 4), torch.arange(4))
    model = trunk_and_head()
    assert suggest_prefix(model, DataLoader(data, batch_size=2)).until == "body"
    for batch in ((X, torch.arange(3)), ((X,), torch.arange(3)), [{"x": X}, torch.arange(3)]):
        assert suggest_prefix(model, [batch]).until == "body"


def test_a_tuple_that_the_model_takes_has_no_target():
    class Summed(Model):
        def forward(self, x, y):
            return super().forward(x + y)

    body = nn.Sequential(linear(4, 10), linear(10, 20))
    model = Summed(body, nn.Sequential(nn.Dropout(0.1), linear(20, 12))).train()
    assert suggest_prefix(model, [(X, X)]).until == "body"


def test_dropout_that_is_off_is_no_end():
    body = nn.Sequential(linear(4, 10), nn.Dropout(0.0), linear(10, 20))
    assert suggest_prefix(trunk_and_head(body), [X]).until == "body"


@pytest.mark.parametrize(
    "model",
    [
        trunk_and_head(dropout=0.0),
        trunk_and_head().eval(),
        trunk_and_head(nn.Sequential(nn.Dropout(0.1), linear(4, 20))),
        Model(nn.Identity(), nn.Sequential(nn.Dropout(0.1), linear(4, 4))).train(),
    ],
    ids=["no dropout", "evaluation", "dropout first", "no operations"],
)
def test_nothing_to_share(model):
    assert suggest_prefix(model, [X]) is None


def test_batch_norm_decides_by_its_mode():
    model = trunk_and_head(nn.Sequential(linear(4, 8), nn.BatchNorm1d(8), linear(8, 20)))
    assert suggest_prefix(model, [X]).until == "body.2"
    model.body[1].eval()
    assert suggest_prefix(model, [X]).until == "body"


class Functional(nn.Module):
    """Dropout that nothing tells of."""

    def __init__(self):
        super().__init__()
        self.layer = linear(4, 20)

    def forward(self, x):
        return F.dropout(self.layer(x), 0.3, self.training)


def test_hidden_randomness_is_found_by_trying():
    assert suggest_prefix(trunk_and_head(Functional()), [X]).until == "body.layer"


class OnlyOnce(nn.Module):
    """A layer that runs again behind the dropout when a batch is long."""

    def __init__(self):
        super().__init__()
        self.first, self.layer, self.dropout = linear(4, 4), linear(4, 4), nn.Dropout(0.1)
        self.second = linear(4, 16)

    def forward(self, x):
        x = self.dropout(self.layer(self.first(x)))
        return self.second(self.layer(x) if len(x) % 3 == 0 else x)


def test_a_module_that_some_batch_runs_behind_the_dropout_is_left_out():
    model = OnlyOnce().train()
    model.layer.weight = nn.Parameter(torch.eye(4))
    assert suggest_prefix(model, [X[:2], X]).until == "first"


def test_the_run_is_left_as_it_was():
    model = trunk_and_head(nn.Sequential(linear(4, 20), nn.BatchNorm1d(20)))
    before = torch.get_rng_state(), model.body[1].running_mean.clone()
    suggest_prefix(model, [X])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(model.body[1].running_mean, before[1])
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hugging_face_models():
    model = tiny_bert(dropout=0.0, classifier_dropout=0.3).train()
    found = suggest_prefix(model, [model.dummy_inputs])
    assert found.until == "bert"
    assert 0.9 < found.share < 1
    share_prefix(model, found.until).remove()
    images = {"pixel_values": image_rows(4).columns["pixel_values"]}
    found = suggest_prefix(tiny_vit(dropout=0.1).train(), [images])
    assert found.until.startswith("vit.embeddings.patch_embeddings")


def test_no_batch():
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        suggest_prefix(trunk_and_head(), [])
