"""Whether later batches still have the loss that the first one showed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object

from regdrop.integrations.transformers.evaluation import has_label
from regdrop.integrations.transformers.forward.verify import compare_in_training
from regdrop.integrations.transformers.heads.registry import base_model
from regdrop.integrations.transformers.likelihood.probing import is_rowwise_in_training
from regdrop.integrations.transformers.likelihood.selection import HeadSelection
from regdrop.integrations.transformers.likelihood.source import Source, is_of_library

# Every one of the first steps is looked at; after that as many pass as half of those before, so
# that looks cost next to nothing.
_FIRST_STEPS, _GROWTH = 10, 1.5
# With an epoch a loss may change too. So many steps have to lie between two looks.
_STEPS_BETWEEN_EPOCHS = 20


class LaterLooks(HeadSelection):
    """The part of `RDropTrainerMixin` that has a loss follow what later batches show.

    A loss may grow a term in the run, its trainer may be given another one, and its labels may hold
    a mark that the first batch did not. Then it is minimised as it is.
    """

    _found_in_step = 0
    _last_look = 0
    _next_look = 0
    _epoch = 0
    _has_told_of_loss = False

    def _follow_window(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Find where heads come from by a run's first window; later see whether that still holds.

        Args:
            samples: The micro-batches of an accumulation window.
        """
        before, self._epoch = self._epoch, int(self.state.epoch or 0)
        if self._source is None:
            self._examine(samples)
            self._found_in_step = self.state.global_step
            self._plan_look()
        elif self._is_look_due(is_next_epoch=self._epoch > before):
            labelled = (x for x in samples if has_label(x, self.label_names))
            self._look_at(next(labelled, samples[0]))
            self._plan_look()
        for sample in samples:
            source = self._choose_source(sample)
            if self._has_strange_labels(source, sample) and not self._is_settled(source):
                self._take_strange(source, sample)

    def _is_look_due(self, is_next_epoch: bool) -> bool:
        planned = self._next_look - self._last_look
        least = min(planned, _STEPS_BETWEEN_EPOCHS) if is_next_epoch else planned
        return self.state.global_step >= self._last_look + least

    def _plan_look(self) -> None:
        step = self.state.global_step
        passed = step - self._found_in_step
        further = passed + 1 if passed < _FIRST_STEPS else round(passed * _GROWTH)
        self._last_look, self._next_look = step, self._found_in_step + further

    def _is_settled(self, source: Source) -> bool:
        """Return whether nothing that a batch shows could change the source."""
        model = self._unwrapped(self.model)
        if self._splits_parameters() or (source.own is None and self._is_head_given(model)):
            return True
        if self._loss_owner() is not None or source.own is not None or source.recipe is not None:
            return False
        return is_of_library(base_model(model))

    def _has_strange_labels(self, source: Source, sample: Mapping[str, Any]) -> bool:
        if source.recipe is None or not isinstance(sample, Mapping):
            return False
        return source.recipe.is_strange(sample, self.rdrop.unlabelled_index)

    def _look_at(self, sample: Mapping[str, Any]) -> None:
        """Hold the source against a batch; all processes look in the same step, and agree."""
        source = self._choose_source(sample)
        if self._is_settled(source):
            return
        batch = self._on_device(sample)
        reason = self._why_another(source, batch)
        if self.accelerator.num_processes > 1:
            is_shown = reason is not None
            reason = next((told for told in gather_object([reason]) if told is not None), None)
            if reason is not None:
                batch = self._on_device(self._agree_on_batch(batch, is_shown))
        if reason is not None:
            self._change_source(reason, batch)

    def _take_strange(self, source: Source, sample: Mapping[str, Any]) -> None:
        """Have the own loss minimised that knows labels which the recipe does not."""
        if source.recipe is not None and self._reads_ignored(source, sample):
            # Learned once: it is an ordinary number.
            recipe = replace(source.recipe, reads_ignored=True)
            self._set_source(replace(source, recipe=recipe), sample)
            return
        reason = f"its labels are none that {source.recipe} has"
        if self.accelerator.num_processes > 1:
            raise ValueError(
                f"in step {self.state.global_step} {reason}, and no other were so before, so that "
                "processes would minimise different losses: RDropConfig(likelihood='model') "
                "minimises the model's own loss from the start"
            )
        self._change_source(reason, self._on_device(sample))

    def _reads_ignored(self, source: Source, sample: Mapping[str, Any]) -> bool:
        """Return whether strange labels are numbers that the model's own loss reads as they are."""
        assert source.recipe is not None
        alike = replace(source.recipe, reads_ignored=True)
        if alike.is_strange(sample):
            return False
        batch, model = self._on_device(sample), self._unwrapped(self.model)
        return compare_in_training(model, self._head_of(source, batch), batch, False).agrees

    def _why_another(self, source: Source, batch: dict[str, Any]) -> str | None:
        """Return what a batch shows that the source does not have; None if it holds."""
        if source.own is not None:
            is_apart = self.rdrop.passes == "sequential" or self.rdrop.num_passes == 1
            if is_apart or source.obstacle is not None or not source.own.is_rowwise:
                return None
            compute = partial(self._own_loss, self._runnable())
            model, names = self._unwrapped(self.model), self.label_names
            counts = source.own.counts_items
            # Twice, where chance may have told it once.
            for _ in range(2):
                if is_rowwise_in_training(model, compute, batch, counts, names):
                    return None
            return "its rows depend on each other by now"
        owner = self._loss_owner()
        if owner is not None:
            return f"the loss is that of {owner} by now"
        if self._has_strange_labels(source, batch):
            return None  # each process sees to its own
        model = self._unwrapped(self.model)
        head, has_auxiliary = self._head_of(source, batch), source.recipe is None
        found = compare_in_training(model, head, batch, has_auxiliary)
        if found.agrees:
            return None
        assert found.own is not None
        return (
            f"the loss of {type(base_model(model)).__name__} is {found.own.item():.6g}, where what "
            f"the first batch showed is {found.ours.item():.6g}"
        )

    def _change_source(self, reason: str, batch: dict[str, Any]) -> None:
        """Minimise the model's or the trainer's own loss from this step on."""
        assert self._source is not None
        reason = f"in step {self.state.global_step} {reason}"
        own = self._source.own
        if own is not None:
            alone = replace(self._source, own=replace(own, is_rowwise=False))
            self._set_source(alone, batch)
            self._tell(f"{reason}: passes run one after the other from here on")
            return
        if options := ", ".join(self._options_of_terms()):
            if not self._has_told_of_loss:
                self._has_told_of_loss = True
                self._tell(f"{reason}; the latter is kept, since {options} needs it")
            return
        source = self._own_source_for(reason, batch, is_first=False)
        if self.accelerator.num_processes > 1:
            source = broadcast_object_list([source])[0]
        self._set_source(self._with_obstacle(source, batch), batch)
        self._is_checked = False
        self._tell_own(f"{reason}, and from here on its own loss counts", source)
