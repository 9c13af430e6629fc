"""Which loss a model minimises that no name tells: the one of a few that agrees with its own."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regdrop.arguments import IGNORE_INDEX
from regdrop.extra_pass import extra_pass
from regdrop.integrations.transformers.evaluation import (
    evaluation_mode,
    find_labels,
    shaken,
    training_mode,
    with_other_inputs,
    with_other_labels,
    with_shorter_masks,
)
from regdrop.integrations.transformers.forward.attempt import attempt
from regdrop.integrations.transformers.likelihood.recipe import ELEMENTWISE, SUMMED, Recipe
from regdrop.integrations.transformers.outputs import Key, find_loss, named_tensors
from regdrop.integrations.transformers.tolerances import LOSS
from regdrop.loss import combine_terms
from regdrop.passes import copy_structure

# What words are padded with where labels are padded by a word.
_PADDING = (0, 1)
# Looks at shaken parameters, to tell apart what agrees by chance, as with logits that are all 0.
_SHAKES = 4


def detect_recipe(
    model: nn.Module,
    run: Callable[..., Any],
    inputs: Mapping[str, Any],
    label_names: Sequence[str],
) -> Recipe | None:
    """Compare the model's own loss on a batch, dropout off, with the losses that it may be.

    Args:
        model: The unwrapped model; its modes, buffers and parameters are as before afterwards.
        run: What is called: the model, or what wraps it.
        inputs: A batch with its labels.
        label_names: Names that labels have.

    Returns:
        The one that agrees; None where none does, several do, or the model returns no loss.
    """
    labels = find_labels(inputs, label_names)
    with evaluation_mode(model):
        found = _look_again(model, run, inputs, labels, None)
        for seed in range(_SHAKES):
            if len(found) > 1 or (found and seed == 0):
                with shaken(model, seed):
                    # One candidate has to hold for other labels and logits too.
                    other = inputs if len(found) > 1 else _with_other_labels(inputs, found[0])
                    found = _look_again(model, run, other, labels, found)
        # Labels that none of the items has may be ignored or not.
        readings = {replace(recipe, ignore_index=IGNORE_INDEX) for recipe in found}
        if len(readings) != 1:
            return None
        with shaken(model):
            # A mean of the rows' means is another loss, where rows have other numbers of labels.
            fewer = _with_fewer_labels(inputs, found[0])
            others = [] if fewer is None else [fewer]
            masked = with_shorter_masks(inputs, inputs[found[0].label].shape)
            for other in (*others, *(batch for _, batch in masked)):
                # A model may know no label that is ignored.
                again = partial(_look_again, model, run, other, labels, found[:1])
                if not attempt(again, otherwise=[]):
                    return None
            if _reads_more(model, run, inputs, labels, found[0]):
                return None
    return found[0] if _agrees_in_training(model, run, inputs, found[0]) else None


def _agrees_in_training(
    model: nn.Module, run: Callable[..., Any], inputs: Mapping[str, Any], recipe: Recipe
) -> bool:
    """Return whether a recipe is the model's own loss in training mode too, by one forward."""
    with training_mode(model):
        output = extra_pass(model, lambda batch: run(**batch), dict(inputs))
    look = _Look(find_loss(output), list(named_tensors(output)), recipe.keeps_label)
    if look.loss is None or not look.loss.isfinite():
        return True
    # With labels the logits may stand in another place.
    found = {replace(other, logits=None) for other in _agreeing(look, inputs, [recipe.label])}
    return replace(recipe, logits=None) in found


def _reads_more(
    model: nn.Module,
    run: Callable[..., Any],
    inputs: Mapping[str, Any],
    labels: Sequence[str],
    recipe: Recipe,
) -> bool:
    """Return whether a loss reads another input than the labels, as a weight of each row."""
    for other in with_other_inputs(inputs, labels):
        # One that a model cannot have tells nothing.
        look = attempt(partial(extra_pass, model, partial(_look, run, labels), other), None)
        if look is None or look.loss is None or not look.loss.isfinite():
            continue
        if recipe not in _agreeing(look, other, labels):
            return True
    return False


def _look_again(
    model: nn.Module,
    run: Callable[..., Any],
    inputs: Mapping[str, Any],
    labels: Sequence[str],
    among: Sequence[Recipe] | None,
) -> list[Recipe]:
    """Return the recipes that agree on a batch, of those that agreed before if there are some."""
    look = extra_pass(model, partial(_look, run, labels), dict(inputs))
    found = _agreeing(look, inputs, labels)
    return found if among is None else [recipe for recipe in among if recipe in found]


def _with_other_labels(inputs: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    # Whole labels of an element-wise loss are a yes or no each.
    num_classes = recipe.num_classes if recipe.family == "cross entropy" else 2
    return with_other_labels(inputs, recipe.label, num_classes, recipe.ignore_index)


def _with_fewer_labels(inputs: Mapping[str, Any], recipe: Recipe) -> dict[str, Any] | None:
    """Return a batch whose first row has half of its labels; None where a row has but one."""
    labels: Tensor = inputs[recipe.label]
    if recipe.family != "cross entropy" or labels.is_floating_point() or labels.dim() < 2:
        return None
    if labels[0].numel() < 4 or len(labels) < 2:
        return None
    fewer = labels.clone()
    fewer[0].view(-1)[: fewer[0].numel() // 2] = recipe.ignore_index
    return {**inputs, recipe.label: fewer}


@dataclass(frozen=True)
class _Look:
    """What a model returned for a batch: its loss, and the tensors beside it."""

    loss: Tensor | None
    tensors: list[tuple[Key, Tensor]]
    keeps_label: bool


def _look(run: Callable[..., Any], labels: Sequence[str], inputs: dict[str, Any]) -> _Look:
    whole = run(**copy_structure(inputs, clones=True))
    rest = {name: value for name, value in inputs.items() if name not in labels}
    # A model may not run without its labels.
    output = attempt(partial(run, **rest), otherwise=None)
    keeps_label = output is None
    tensors = named_tensors(whole if keeps_label else output)
    return _Look(find_loss(whole), list(tensors), keeps_label)


def _agreeing(look: _Look, inputs: Mapping[str, Any], labels: Sequence[str]) -> list[Recipe]:
    """Return the recipes whose NLL is the model's own loss; one for each reading."""
    if look.loss is None or not look.loss.isfinite():
        return []
    found: list[Recipe] = []
    readings: set[Recipe] = set()
    for recipe, logits in _candidates(look, inputs, labels):
        # Two tensors of an output may hold the same numbers: the first is taken.
        reading = replace(recipe, logits=None)
        if reading not in readings and _agrees(recipe, logits, inputs, look.loss):
            readings.add(reading)
            found.append(recipe)
    return found


def _candidates(
    look: _Look, inputs: Mapping[str, Any], labels: Sequence[str]
) -> Iterator[tuple[Recipe, Tensor]]:
    for label in labels:
        target: Tensor = inputs[label]
        for key, logits in look.tensors:
            if not logits.is_floating_point() or logits.dim() == 0 or target.dim() == 0:
                continue
            for recipe in _recipes(key, logits, label, target, look.keeps_label):
                yield recipe, logits


def _recipes(
    key: Key, logits: Tensor, label: str, target: Tensor, keeps_label: bool
) -> Iterator[Recipe]:
    """Yield the ways in which logits and labels of these shapes may belong together."""
    make = partial(Recipe, label=label, logits=key, keeps_label=keeps_label)
    is_whole = not target.is_floating_point()
    column = target[..., 0] if target.dim() > 1 and target.shape[-1] == 1 else target
    if is_whole and target.dtype != torch.bool and logits.dim() > 1 and logits.shape[-1] > 1:
        for ignore_index in _ignored(target, logits.shape[-1]):
            entropy = partial(
                make,
                "cross entropy",
                ignore_index=ignore_index,
                num_classes=logits.shape[-1],
            )
            if logits.shape[:-1] == column.shape:
                yield entropy()
                if column.dim() > 1:
                    yield entropy(is_shifted=True)
            elif logits.dim() == 2 and target.dim() > 1 and len(logits) == target.numel():
                yield entropy(is_flat=True)
    is_second = logits.dim() > 2 and (logits.shape[0], *logits.shape[2:]) == target.shape
    if is_whole and is_second and logits.shape[1] > 1:
        for ignore_index in _ignored(target, logits.shape[1]):
            yield make(
                "cross entropy",
                class_dim=1,
                ignore_index=ignore_index,
                num_classes=logits.shape[1],
            )
    if not is_whole and logits.shape == target.shape and logits.dim() > 1:
        yield make("cross entropy")
    if logits.numel() == target.numel() and len(logits) == len(target):
        yield from (make(family) for family in ELEMENTWISE)
        if target[0].numel() > 1:
            yield from (make(family) for family in SUMMED)


def _ignored(target: Tensor, num_classes: int) -> list[int]:
    """Return the labels that may not count: those that name no class, torch's, or a padding."""
    strange: list[int] = target[(target < 0) | (target >= num_classes)].unique().tolist()
    if len(strange) == 1:
        return strange
    return [IGNORE_INDEX, *(word for word in _PADDING if bool((target == word).any()))]


def _agrees(recipe: Recipe, logits: Tensor, inputs: Mapping[str, Any], own: Tensor) -> bool:
    head = recipe.head(inputs)
    stacked = (
        logits.reshape(-1, *head.target.shape[1:]) if recipe.family != "cross entropy" else logits
    )
    # Labels may be no classes of these logits.
    terms = attempt(lambda: head.terms(stacked, head.target, num_passes=1), otherwise=None)
    if terms is None:
        return False
    ours = combine_terms(terms, alpha=0.0, num_passes=1).loss
    return bool(torch.isclose(ours, own.to(ours), rtol=LOSS.of(logits.dtype), atol=1e-7))
