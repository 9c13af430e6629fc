"""Does R-Drop compute what the model computes: its own loss, and the logits of its last layer?"""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regdrop.arguments import IGNORE_INDEX
from regdrop.extra_pass import extra_pass
from regdrop.heads import Head, strip_options
from regdrop.integrations.transformers.evaluation import (
    evaluation_mode,
    shaken,
    training_mode,
    with_other_inputs,
    with_other_labels,
    with_shorter_masks,
)
from regdrop.integrations.transformers.forward.attempt import attempt
from regdrop.integrations.transformers.forward.last_layer import find_fused_head, fused_options
from regdrop.integrations.transformers.forward.micro_batch import auxiliary_loss
from regdrop.integrations.transformers.outputs import find_loss
from regdrop.integrations.transformers.tolerances import FORWARD, LAYER, LOSS, Tolerance
from regdrop.kernels import Projection, project
from regdrop.loss import ItemTerms, combine_terms, is_counted
from regdrop.out_of_memory import is_out_of_memory
from regdrop.passes import copy_structure, repeat_batch


class Comparison(NamedTuple):
    """A model's own loss of one batch, and the NLL that R-Drop would minimise.

    Attributes:
        own: The model's; None where it returns none.
        ours: The head's, without label smoothing and class weights.
        dtype: The dtype of the logits.
        terms: The head's terms, with all of its options; None where nothing was compared.
    """

    own: Tensor | None
    ours: Tensor
    dtype: torch.dtype
    terms: ItemTerms | None

    @property
    def agrees(self) -> bool:
        """Whether both are the same up to rounding; True where there is nothing to compare."""
        return self._agrees(FORWARD)

    @property
    def agrees_closely(self) -> bool:
        """Whether no term of a small weight is missing, as somebody's own class may have one."""
        return self._agrees(LOSS)

    def _agrees(self, tolerance: Tolerance) -> bool:
        if self.own is None or not self.own.isfinite():
            return True
        own, rtol = self.own.to(self.ours.dtype), tolerance.of(self.dtype)
        return bool(torch.isclose(self.ours, own, rtol=rtol, atol=1e-5, equal_nan=True))


def agrees_when_shaken(
    model: nn.Module, find: Callable[[Mapping[str, Any]], Head], inputs: Mapping[str, Any]
) -> bool:
    """Return whether a head is the model's own loss also for other logits, labels and masks.

    A new head gives all classes alike: there a weighted, smoothed or focal loss may be the same.

    Args:
        model: An unwrapped model; as it was on return.
        find: From a batch with its labels to its head.
        inputs: The first batch.
    """

    def agrees(batch: Mapping[str, Any]) -> bool:
        return compare_losses(model, find(batch), batch).agrees_closely

    labels = inputs.get("labels")
    labels = labels if isinstance(labels, Tensor) else None
    with shaken(model):
        if labels is not None:
            head = find(inputs)
            with evaluation_mode(model):
                logits = extra_pass(model, lambda batch: head.outputs(model(**batch)), head.inputs)
            ignored = getattr(head.terms, "keywords", {}).get("ignore_index", IGNORE_INDEX)
            inputs = with_other_labels(inputs, "labels", logits.shape[-1], ignored)
        masked = [] if labels is None else with_shorter_masks(inputs, labels.shape)
        others = (inputs, *(batch for _, batch in masked))
        if not all(map(agrees, others)):
            return False
        # A model may refuse another input.
        further = with_other_inputs(inputs, ["labels"])
        return all(attempt(partial(agrees, other), otherwise=True) for other in further)


def compare_in_training(
    model: nn.Module, head: Head, inputs: Mapping[str, Any], has_auxiliary: bool = True
) -> Comparison:
    """Compare, in training mode, a model's own loss and the NLL of the logits beside it.

    What a loss does in training alone, such as a margin, is seen in one forward, whatever dropout
    does there.

    Args:
        model: An unwrapped model.
        head: The head of the batch.
        inputs: The batch with its labels.
        has_auxiliary: Whether a loss of experts in the output is a part of what is minimised.

    Returns:
        As `compare_losses`; without an own loss where nothing can be compared.
    """

    def look(batch: dict[str, Any]) -> Comparison:
        output: Any = model(**batch)
        logits, own = head.outputs(output), find_loss(output)
        return _compare_output(model, head, logits, output, own, has_auxiliary)

    with training_mode(model):
        # Outputs with labels may lack what those without have.
        return attempt(
            lambda: extra_pass(model, look, without_unlabelled(head, inputs)),
            otherwise=Comparison(None, torch.zeros(()), torch.float32, None),
        )


def why_rows_depend(model: nn.Module, head: Head) -> str | None:
    """Return why the outputs of a stacked batch are not those of its passes; None if they are.

    They are not where each row is scored against the others of its batch, and where something of
    the batch is not stacked with the rest.
    """

    def look(batch: dict[str, Any]) -> Tensor:
        return head.outputs(model(**batch))

    with evaluation_mode(model):
        once = extra_pass(model, look, head.inputs)
        try:
            with warnings.catch_warnings():
                # What should not have been stacked shows in the outputs.
                warnings.simplefilter("ignore")
                stacked = repeat_batch(head.inputs, 2, batch_size=head.rows)
        except (TypeError, ValueError) as error:
            # What follows tells what else could be given to `repeat_batch`.
            what = str(error).split(":")[0].split(";")[0]
            return f"its batch cannot be stacked ({what})"
        try:
            twice = extra_pass(model, look, stacked)
        except Exception as error:  # whatever a model raises for rows that do not fit together
            if is_out_of_memory(error):
                raise
            line = next(iter(str(error).strip().splitlines()), "")
            return f"it does not take a stacked batch ({type(error).__name__}: {line})"
    expected = torch.cat([once, once])
    if len(twice) != len(expected):
        return f"it returns {len(twice)} rows for two stacked passes, and {len(once)} for one"
    reason = "the outputs of its rows depend on the other rows of the batch"
    if twice.shape != expected.shape:
        return reason
    distance = (twice.float() - expected.float()).nan_to_num(0.0, 0.0, 0.0).norm()
    size = expected.float().nan_to_num(0.0, 0.0, 0.0).norm()
    return None if bool(distance <= FORWARD.of(once.dtype) * size + 1e-5) else reason


def compare_losses(model: nn.Module, head: Head, inputs: Mapping[str, Any]) -> Comparison:
    """Evaluate one batch with its labels and without, and leave the run as it was.

    A model may have a loss of its own behind a familiar name: this tells it from those that
    R-Drop knows.

    Args:
        model: An unwrapped model.
        head: The head of the batch.
        inputs: The batch with its labels.
    """
    with evaluation_mode(model):
        return extra_pass(model, partial(_compare, model, head), dict(inputs))


def without_unlabelled(head: Head, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch whose unlabelled items are ignored ones, as the model's own loss knows them.

    A GPU would not forgive a class that there is not.
    """
    options: dict[str, Any] = getattr(head.terms, "keywords", {})
    unlabelled, labels = options.get("unlabelled_index"), inputs.get("labels")
    if unlabelled is None or not isinstance(labels, Tensor):
        return dict(inputs)
    ignored = options.get("ignore_index", IGNORE_INDEX)
    return {**inputs, "labels": labels.masked_fill(labels == unlabelled, ignored)}


def check_fused_head(model: nn.Module, head: Head) -> None:
    """Compare the logits that the fused loss stands for with those that the model returns.

    One forward in training mode, which leaves the run as it was, shows by its first position
    whether a model does more to its logits than its last layer and its config tell. What it does
    may be nothing yet, as a bias that begins at 0: then the graph shows on what logits depend.

    Args:
        model: An unwrapped Hugging Face model.
        head: The head of a batch.

    Raises:
        ValueError: If they differ or the head is of another kind; says why.
    """
    fused_options(head)
    fused = find_fused_head(model)

    def look(batch: dict[str, Any]) -> tuple[Any, Tensor, Projection]:
        with torch.enable_grad():
            return fused.run(model, batch)

    with training_mode(model):
        try:
            output, hidden, projection = extra_pass(model, look, head.inputs)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(f"its forward needs the logits of every position ({error})") from error
    if hidden.shape[:-1] != head.target.shape:
        raise ValueError(
            f"its last layer must read one state for each label, {tuple(head.target.shape)}, "
            f"got {tuple(hidden.shape[:-1])}"
        )
    own = head.outputs(output)
    ours = project(hidden[:, :1], projection)
    tolerance = max(LAYER.of(projection.dtype), 4 * torch.finfo(own.dtype).eps)
    is_same = own.shape == ours.shape and bool(
        (own.detach().to(ours.dtype) - ours).norm() <= tolerance * ours.norm()
    )
    if not is_same:
        raise ValueError("its logits are not those of its last layer, its bias, scale and soft cap")
    layer = [x for x in (projection.weight, projection.bias) if x is not None]
    names: dict[Tensor, str] = {x: name for name, x in model.named_parameters()}
    further = _trained_behind(hidden, [own]) - _trained_behind(hidden, layer)
    if further:
        name = min(names.get(x, "another tensor") for x in further)
        raise ValueError(f"its logits depend on {name} too, behind its last layer")


def _trained_behind(states: Tensor, tensors: list[Tensor]) -> set[Tensor]:
    """Return the trained leaves on which tensors depend otherwise than by these states."""
    found = {x for x in tensors if x.is_leaf and x.requires_grad}
    seen, nodes = {states.grad_fn}, [x.grad_fn for x in tensors]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        nodes.extend(following for following, _ in node.next_functions)
    return found


def _compare(model: nn.Module, head: Head, inputs: dict[str, Any]) -> Comparison:
    output: Any = model(**copy_structure(head.inputs, clones=True))
    # Labels may be those of a head of one's own, which the model cannot take.
    own = attempt(lambda: find_loss(model(**without_unlabelled(head, inputs))), otherwise=None)
    return _compare_output(model, head, head.outputs(output), output, own)


def _compare_output(
    model: nn.Module,
    head: Head,
    logits: Tensor,
    output: Any,
    own: Tensor | None,
    has_auxiliary: bool = True,
) -> Comparison:
    # Terms of one's own may need two passes to compare: here both are the same.
    passes = 1 if is_counted(head.terms) else 2
    both = torch.cat([logits] * passes) if passes > 1 else logits
    terms = head.terms(both, head.target, num_passes=passes)
    plain = strip_options(head.terms)(both, head.target, num_passes=passes)
    ours: Tensor = combine_terms(plain, alpha=0.0, num_passes=passes, scale="mean").loss
    auxiliary = auxiliary_loss(model, output) if has_auxiliary else None
    ours = ours if auxiliary is None else ours + auxiliary
    return Comparison(own, ours, logits.dtype, terms)
