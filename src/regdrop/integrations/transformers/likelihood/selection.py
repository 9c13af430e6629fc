"""Which head a batch has: the first of its kind decides, alike in all processes."""

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from torch import Tensor

from regdrop.heads import Head
from regdrop.integrations.transformers.evaluation import find_labels, has_label
from regdrop.integrations.transformers.forward.batches import why_not_stacked
from regdrop.integrations.transformers.forward.verify import why_rows_depend
from regdrop.integrations.transformers.heads.registry import base_model
from regdrop.integrations.transformers.likelihood.count_rules import COUNT_RULES
from regdrop.integrations.transformers.likelihood.source import (
    Source,
    SourceSearch,
    is_of_library,
)
from regdrop.passes import find_batch_size

# Of each of a batch's labels its name, whether it holds no whole numbers, and its dimensions.
Kind = tuple[tuple[str, bool, int], ...]


class HeadSelection(SourceSearch):
    """The part of `RDropTrainerMixin` that gives every batch its head."""

    # That of the batch at hand, and those of all kinds of batches so far.
    _source: Source | None = None
    _sources: dict[Kind, Source]
    # Whether it has been chosen how the last layer of such a batch is computed.
    _is_checked = False

    def _head(self, inputs: Mapping[str, Any]) -> Head:
        """Return the head of a batch; the first batch of its kind decides where it comes from."""
        return self._head_of(self._choose_source(inputs), inputs)

    def _choose_source(self, inputs: Mapping[str, Any]) -> Source:
        """Return where the head of a batch comes from; a new kind of batch is examined.

        Raises:
            ValueError: For a kind that is new, on several processes, which have to examine alike.
        """
        source = self._examine([inputs]) if self._source is None else self._source
        kind = kind_of(inputs, self.label_names)
        if kind in self._sources:
            self._source = self._sources[kind]
            return self._source
        # What is known by name or by its author has all kinds that it can have.
        is_given = self._is_head_given(self._unwrapped(self.model))
        if is_given or (source.recipe is None and source.own is None):
            return source
        if self.accelerator.num_processes > 1:
            raise ValueError(
                f"labels must be of one kind on several processes, got {_say_kind(kind)} in step "
                f"{self.state.global_step}, and {_say_kind(next(iter(self._sources)))} in the "
                "first batch: override rdrop_head of the trainer to say how each enters the loss"
            )
        self._is_checked = False
        return self._examine([inputs])

    def _set_source(self, source: Source, inputs: Mapping[str, Any]) -> None:
        """Keep where heads of a kind of batch come from; the first of a run drops all others."""
        if self._source is None:
            self._sources = {}
        self._source = self._sources[kind_of(inputs, self.label_names)] = source

    def _examine(self, window: Sequence[Mapping[str, Any]]) -> Source:
        """Find where heads come from, by the first micro-batch of a window that has a label."""
        labelled = [inputs for inputs in window if has_label(inputs, self.label_names)]
        first = labelled[0] if labelled else window[0]
        is_spread = self.accelerator.num_processes > 1
        if is_spread:
            first = self._agree_on_batch(first, bool(labelled))
        # A window is counted before the Trainer brings its batches to the model's device, to
        # which a loader of one's own may leave it.
        first = self._on_device(first)
        source = self._with_obstacle(self._find_source(first), first)
        # Chance may have told each of them something else.
        source = broadcast_object_list([source])[0] if is_spread else source
        self._set_source(source, first)
        return source

    def _with_obstacle(self, source: Source, inputs: Mapping[str, Any]) -> Source:
        """Return a source with the reason why the passes of a batch cannot be stacked."""
        head = self._head_of(source, inputs)
        obstacle = why_not_stacked(head.inputs, head.rows)
        if obstacle is None:
            obstacle = self._why_rows_depend(source, head)
        return replace(source, obstacle=obstacle)

    def _agree_on_batch(self, first: Mapping[str, Any], is_labelled: bool) -> Mapping[str, Any]:
        """Return one batch in all processes, that of the first of them that has a label.

        What they run and refuse must be the same. Where a batch cannot be sent, each looks at its
        own.
        """
        told = gather_object([(is_labelled, _can_be_sent(first))])
        if not all(can_be_sent for _, can_be_sent in told):
            return first
        have_labels = [has_label for has_label, _ in told]
        origin = have_labels.index(any(have_labels))
        held = [send_to_device(first, "cpu")]
        sent: Mapping[str, Any] = broadcast_object_list(held, from_process=origin)[0]
        return sent

    def _why_rows_depend(self, source: Source, head: Head) -> str | None:
        """Return why a model that is not the library's cannot be stacked; None if it can."""
        model = self._unwrapped(self.model)
        is_known = source.recipe is None and is_of_library(base_model(model))
        if source.own is not None or is_known or self._splits_parameters():
            return None
        return why_rows_depend(model, head)

    def _head_of(self, source: Source, inputs: Mapping[str, Any]) -> Head:
        if source.own is not None and source.own.divergence is not None:
            return source.own.divergence.head(inputs, find_batch_size(inputs))
        if source.recipe is not None:
            head = source.recipe.head(
                inputs,
                label_smoothing=self.args.label_smoothing_factor,
                class_weight=self.rdrop.class_weight,
                unlabelled_index=self.rdrop.unlabelled_index,
            )
        elif source.own is not None:
            return replace(self._compared_head(inputs), inputs=dict(inputs))
        else:
            head = self.rdrop_head(self._unwrapped(self.model), inputs)
        return head if source.count is None else replace(head, count=COUNT_RULES[source.count])


def _can_be_sent(batch: Any) -> bool:
    """Return whether a batch can be pickled: the function of an attention mask cannot."""
    if not isinstance(batch, Mapping):
        return False
    try:
        pickle.dumps([value for value in batch.values() if not isinstance(value, Tensor)])
    except Exception:  # whatever an object raises that cannot be
        return False
    return True


def kind_of(inputs: Any, label_names: Sequence[str]) -> Kind:
    """Return what tells batches of several tasks apart."""
    if not isinstance(inputs, Mapping):
        return ()
    found = [(name, inputs[name]) for name in find_labels(inputs, label_names)]
    return tuple((name, x.is_floating_point(), x.dim()) for name, x in found)


def _say_kind(kind: Kind) -> str:
    named = [
        f"{name!r} of {dim} dimensions and {'numbers' if is_float else 'whole numbers'}"
        for name, is_float, dim in kind
    ]
    return " and ".join(named) or "no labels"
