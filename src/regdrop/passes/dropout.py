"""Where a model's randomness is: every number in it that is a dropout rate."""

import re
from collections.abc import Iterator
from numbers import Real
from typing import Any, NamedTuple

from torch import nn

from regdrop.passes.keras_layers import named_modules

_DROPOUT_CLASS = re.compile(r"Drop(out|Path|Block|Connect)|StochasticDepth", re.IGNORECASE)
_RATE_ATTRIBUTES = ("p", "drop_prob", "prob", "drop_rate", "rate")
_RATE_NAME = re.compile(r"drop(out|_?prob|_?rate|_?path|_?p$)|p_?drop|layer_?drop", re.IGNORECASE)
# Numbers of something else, or of what is kept.
_NO_RATE_NAME = re.compile(r"keep|^num_|^n_|_(num|count|seed|mode|type|layers)$", re.IGNORECASE)


class DropoutSource(NamedTuple):
    """A source of randomness between two passes.

    Attributes:
        name: Where it is in the model.
        kind: "dropout", "attention", "stochastic depth", "lora", "layerdrop" or "neftune".
        rate: Probability of dropping; for NEFTune the strength of the noise.
        active: Whether it makes passes differ now: the rate is above 0, in training mode.
    """

    name: str
    kind: str
    rate: float
    active: bool


class RateAttribute(NamedTuple):
    """A rate and the object that holds it."""

    source: DropoutSource
    owner: Any
    attribute: str


def find_dropout(model: nn.Module) -> list[DropoutSource]:
    """List the sources of randomness of a model, rates of 0 included.

    Found are dropout modules, rates that modules keep as numbers (attention and other functional
    dropout, recurrent layers), stochastic depth, LoRA dropout, LayerDrop and NEFTune; and rates
    that only the model's `config` knows. Layers of Keras drop only in calls with `training=True`,
    which their `active` cannot tell.

    Raises:
        TypeError: If `model` is no module.
    """
    return [found.source for found in rate_attributes(model)]


def rate_attributes(model: nn.Module) -> list[RateAttribute]:
    """List the sources of a model with the objects that hold their rates."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found: list[RateAttribute] = []
    for name, module in named_modules(model):
        for attribute in _module_rates(module):
            rate = float(getattr(module, attribute))
            full_name = name if attribute in _RATE_ATTRIBUTES else f"{name}.{attribute}".strip(".")
            kind = _kind(full_name, type(module).__name__)
            source = DropoutSource(full_name, kind, rate, rate > 0 and module.training)
            found.append(RateAttribute(source, module, attribute))
    return found + list(_config_rates(model, {found_.source.rate for found_ in found}))


def _module_rates(module: nn.Module) -> list[str]:
    if _DROPOUT_CLASS.search(type(module).__name__):
        own = [a for a in _RATE_ATTRIBUTES if _is_rate(getattr(module, a, None))]
        if own:
            return own[:1]
    if isinstance(module, nn.RNNBase) and module.num_layers == 1:
        return []  # dropout acts between layers
    names = [n for n, value in vars(module).items() if _is_rate_name(n) and _is_rate(value)]
    if (getattr(module, "neftune_noise_alpha", None) or 0) > 0:
        names.append("neftune_noise_alpha")
    return names


def _config_rates(model: nn.Module, known: set[float]) -> Iterator[RateAttribute]:
    """Yield rates that the config holds and that no module keeps: functional dropout reads them."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "__dict__"):
        return
    for key, value in vars(config).items():
        if _is_rate_name(key) and _is_rate(value) and value > 0 and value not in known:
            source = DropoutSource(f"config.{key}", _kind(key, ""), value, model.training)
            yield RateAttribute(source, config, key)


def _is_rate_name(name: str) -> bool:
    return bool(_RATE_NAME.search(name)) and not _NO_RATE_NAME.search(name)


def _is_rate(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) <= 1


def _kind(name: str, class_name: str) -> str:
    last = name.lower()
    if last.endswith("neftune_noise_alpha"):
        return "neftune"
    if "lora_dropout" in last:
        return "lora"
    if re.search(r"layer_?drop", last):
        return "layerdrop"
    if re.search(r"path|depth|connect", class_name.lower()) or "drop_path" in last:
        return "stochastic depth"
    if re.search(r"att(n|ention)", last) or class_name == "MultiheadAttention":
        return "attention"
    return "dropout"
