"""Where a model's randomness is: every number in it that is a dropout rate."""

import re
from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any, NamedTuple

from torch import nn

from regdrop.passes.keras_layers import named_modules

_DROPOUT_CLASS = re.compile(r"(?i:Drop(out|Path|Block|Connect)|StochasticDepth)|Drop(?=[A-Z0-9]|$)")
_RATE_ATTRIBUTES = ("p", "drop_prob", "prob", "drop_rate", "rate")
_RATE_NAME = re.compile(r"drop(out|_?prob|_?rate|_?path|_?p$)|p_?drop|layer_?drop", re.IGNORECASE)
# Names that mean a rate less surely: they must hold a fraction, where counts and switches would be
# whole. A fall of something, as a learning rate's, is none.
_WORD_OF_DROPPING = re.compile(
    r"(^|_)[eihow]?drop([eiho]|\d)?$|drop_?(ratio|frac)"
    r"|drop_?(connect|edge|node|token|word|head|block)(_?(rate|prob|ratio|p))?$",
    re.IGNORECASE,
)
_FALL = re.compile(r"(^|_)(lr|loss|price|max|min|last|no)_?drop", re.IGNORECASE)
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
    names = [n for n, value in vars(module).items() if _is_named_rate(n, value)]
    if (getattr(module, "neftune_noise_alpha", None) or 0) > 0:
        names.append("neftune_noise_alpha")
    return names


def _config_rates(model: nn.Module, known: set[float]) -> Iterator[RateAttribute]:
    """Yield rates that the config holds and that no module keeps: functional dropout reads them."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "__dict__"):
        return
    for key, value in vars(config).items():
        if _is_named_rate(key, value) and value > 0 and value not in known:
            source = DropoutSource(f"config.{key}", _kind(key, ""), value, model.training)
            yield RateAttribute(source, config, key)


def _is_named_rate(name: str, value: Any) -> bool:
    if not _is_rate(value) or _NO_RATE_NAME.search(name):
        return False
    if _RATE_NAME.search(name):
        return True
    is_fraction = not isinstance(value, Integral)
    return is_fraction and bool(_WORD_OF_DROPPING.search(name)) and not _FALL.search(name)


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
    is_of_path = re.search(r"drop_?(path|connect)|path_?drop", last)
    if is_of_path or re.search(r"path|depth|connect", class_name.lower()):
        return "stochastic depth"
    if re.search(r"att(n|ention)", last) or class_name == "MultiheadAttention":
        return "attention"
    return "dropout"
