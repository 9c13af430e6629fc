"""Transformers of torch's own layers, to which the presets' models are compared."""

import math

import torch
from torch import nn

from regdrop.tasks.language_modelling.adaptive_input import AdaptiveEmbedding


def layer_options(width, activation, norm_first):
    return {
        "d_model": width,
        "nhead": 4,
        "dim_feedforward": 2 * width,
        "dropout": 0.0,
        "activation": activation,
        "norm_first": norm_first,
        "batch_first": True,
    }


def encoder(width, layers, activation, *, norm_first, norm=False):
    layer = nn.TransformerEncoderLayer(**layer_options(width, activation, norm_first))
    last = nn.LayerNorm(width) if norm else None
    return nn.TransformerEncoder(layer, layers, norm=last, enable_nested_tensor=False)


def sinusoids(length, width):
    rates = 10_000.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def causal_mask(length):
    return torch.ones(length, length, dtype=torch.bool).triu(1)


class Text(nn.Module):
    """Embeddings: scaled and with sinusoids, or with learned positions and normalised."""

    def __init__(self, vocabulary, width, *, learned):
        super().__init__()
        self.words = nn.Embedding(vocabulary, width, padding_idx=0)
        self.positions = nn.Embedding(64, width) if learned else None
        self.norm = nn.LayerNorm(width) if learned else nn.Identity()
        self.register_buffer("sinusoids", sinusoids(64, width))

    def forward(self, ids):
        length, width = ids.shape[1], self.words.embedding_dim
        if self.positions is None:
            return self.words(ids) * math.sqrt(width) + self.sinusoids[:length]
        return self.norm(self.words(ids) + self.positions.weight[:length])


class EncoderDecoder(nn.Module):
    """Normalised last, output tied; Marian's class, or BART's with learned positions."""

    def __init__(self, vocabulary, width, encoder_layers, decoder_layers, activation, *, learned):
        super().__init__()
        self.source = Text(vocabulary, width, learned=learned)
        self.target = Text(vocabulary, width, learned=learned)
        self.target.words = self.source.words
        self.encoder = encoder(width, encoder_layers, activation, norm_first=False)
        layer = nn.TransformerDecoderLayer(**layer_options(width, activation, False))
        self.decoder = nn.TransformerDecoder(layer, decoder_layers)

    def forward(self, source, target):
        memory = self.encoder(self.source(source))
        mask = causal_mask(target.shape[1])
        return self.decoder(self.target(target), memory, mask) @ self.source.words.weight.T


class LanguageModel(nn.Module):
    """Normalised first, scaled embeddings with sinusoids, output tied."""

    def __init__(self, vocabulary, width, layers, activation):
        super().__init__()
        self.text = Text(vocabulary, width, learned=False)
        self.layers = encoder(width, layers, activation, norm_first=True, norm=True)

    def forward(self, ids):
        hidden = self.layers(self.text(ids), causal_mask(ids.shape[1]))
        return hidden @ self.text.words.weight.T


class AdaptiveLanguageModel(nn.Module):
    """The same between adaptive embeddings and their softmax, without a last norm."""

    def __init__(self, config):
        super().__init__()
        self.embeddings = AdaptiveEmbedding(config)
        self.layers = encoder(
            config.d_model, config.num_layers, config.activation_function, norm_first=True
        )
        self.tails = nn.Linear(config.d_model, len(config.cutoffs), bias=False)
        self.register_buffer("sinusoids", sinusoids(64, config.d_model))

    def forward(self, ids):
        length = ids.shape[1]
        states = self.embeddings(ids) + self.sinusoids[:length]
        hidden = self.layers(states, causal_mask(length))
        head = torch.cat([self.embeddings.scores(hidden, 0), self.tails(hidden)], dim=-1)
        head = head.log_softmax(-1)
        first = self.embeddings.bounds[1]
        parts = [head[..., :first]]
        for band in range(1, len(self.embeddings.bands)):
            tail = self.embeddings.scores(hidden, band).log_softmax(-1)
            parts.append(tail + head[..., first + band - 1, None])
        return torch.cat(parts, dim=-1)


class TextClassifier(nn.Module):
    """BERT's class: normalised last, a pooled first token."""

    def __init__(self, vocabulary, width, layers, classes):
        super().__init__()
        self.text = Text(vocabulary, width, learned=True)
        self.layers = encoder(width, layers, "gelu", norm_first=False)
        self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, classes))

    def forward(self, ids):
        return self.head(self.layers(self.text(ids))[:, 0])


class ImageClassifier(nn.Module):
    """ViT's class: normalised first, a token of its own."""

    def __init__(self, channels, patch_size, patches, width, layers, classes):
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch_size, patch_size)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, patches + 1, width))
        self.layers = encoder(width, layers, "gelu", norm_first=True, norm=True)
        self.head = nn.Linear(width, classes)

    def forward(self, images):
        patches = self.patches(images).flatten(2).transpose(1, 2)
        states = torch.cat([self.token.expand(len(images), -1, -1), patches], dim=1)
        return self.head(self.layers(states + self.positions)[:, 0])


@torch.no_grad()
def draw_xavier(model):
    """Draw weights as fairseq does; torch's attention has queries, keys and values in one."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.zero_()
        if isinstance(module, nn.Embedding):
            module.weight.normal_(std=module.embedding_dim**-0.5)
            if module.padding_idx is not None:
                module.weight[module.padding_idx] = 0
    return model


@torch.no_grad()
def draw_normal(model, std=0.02):
    """Draw weights as BERT, BART and ViT were pretrained from."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=std)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.zero_()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx] = 0
    return model
