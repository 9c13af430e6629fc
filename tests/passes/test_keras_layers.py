"""Models of Keras on torch, by classes of the same shape: their layers and their `training`."""

import pytest
import torch
from torch import nn

from regdrop import RDropConfig, dropout_rates, find_dropout, rdrop_step

X, Y = torch.randn(6, 5), torch.arange(6) % 3


class Layer(nn.Module):
    """Stands for `keras.layers.Layer`."""

    __module__ = "keras.src.layers.layer"
    name = "layer"


class Dropout(Layer):
    def __init__(self, rate, name):
        super().__init__()
        self.rate, self.name = rate, name

    def forward(self, x, training=False):
        return nn.functional.dropout(x, self.rate, bool(training))


class Model(Layer):
    """Keeps its layers in a list, which torch does not look into."""

    def __init__(self, *layers):
        super().__init__()
        self.head, self.layers = nn.Linear(5, 3), list(layers)

    def _flatten_layers(self, include_self=True):
        return [self, *self.layers] if include_self else self.layers

    def forward(self, x, training=False):
        for layer in self.layers:
            x = layer(x, training=training)
        return self.head(x)


class Around(Layer):
    """A layer of Keras around a module of torch."""

    def __init__(self, module):
        super().__init__()
        self.name, self.module = "around", module

    def forward(self, x, training=False):
        return self.module(x)


def test_layers_that_torch_does_not_list_are_found():
    model = nn.Sequential(Model(Dropout(0.4, "dropout_1"), Around(nn.Dropout(0.2))))
    found = [(source.name, source.rate) for source in find_dropout(model)]
    assert found == [("0.dropout_1", 0.4), ("0.around.module", 0.2)]
    with dropout_rates(model, 0.6):
        assert [source.rate for source in find_dropout(model)] == [0.6, 0.6]


def test_a_layer_that_torch_lists_is_found_once():
    dropout = Dropout(0.4, "dropout_1")
    model = Model(dropout)
    model.dropout = dropout
    assert [source.name for source in find_dropout(model)] == ["dropout"]


def test_a_model_that_is_not_told_to_train_is_advised_to_be():
    model = Model(Dropout(0.4, "dropout_1"))
    rdrop_step(model, X, Y, config=RDropConfig(), step=0)
    with pytest.warns(UserWarning, match=r"exactly 0.*lambda b: model\(b, training=True\)"):
        rdrop_step(model, X, Y, config=RDropConfig(), step=1)
    model = Model(Dropout(0.4, "dropout_1"))
    output = rdrop_step(lambda b: model(b, training=True), X, Y, config=RDropConfig(), step=0)
    assert output.kl > 0


def test_a_model_in_evaluation_mode_or_without_dropout_is_advised_in_its_own_words():
    for model, advice in (
        (Model(Dropout(0.4, "dropout_1")).eval(), r"training=True"),
        (Model(Dropout(0.0, "dropout_1")), r"Raise a dropout rate"),
        (Model(), r"keras\.layers\.Dropout\(0\.1\)"),
    ):
        if not model.training:
            for layer in model.layers:
                layer.eval()
        with pytest.warns(UserWarning, match=advice):
            rdrop_step(model, X, Y, config=RDropConfig(), step=0)
