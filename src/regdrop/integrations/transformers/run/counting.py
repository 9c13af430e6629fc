"""What the loss of a micro-batch is divided by: the items of its accumulation window."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from regdrop.heads import Head
from regdrop.integrations.transformers.evaluation import find_labels
from regdrop.integrations.transformers.forward.micro_batch import Window
from regdrop.integrations.transformers.likelihood.later_looks import LaterLooks
from regdrop.integrations.transformers.likelihood.own_loss import OwnLoss
from regdrop.loss import ItemCounts


class WindowCounting(LaterLooks):
    """The part of `RDropTrainerMixin` that counts the items of a window, over all ranks.

    Attributes:
        _num_weight: The weight of the window's items; None where they are not counted.
        _own_num_items: Their number as the Trainer counts it.
        _first_counts: The counts of the run's first micro-batch, until it is computed.
    """

    _num_weight: Tensor | None = None
    _own_num_items: Tensor | int | None = None
    _first_counts: ItemCounts | None = None
    _is_in_step = False

    def _count_window(
        self, samples: list[Any], num_items: Tensor | int | None, device: torch.device
    ) -> Tensor | int | None:
        """Count the items of a window and their weight as R-Drop's terms do, over all ranks."""
        self._own_num_items = num_items
        if not samples:
            return num_items
        samples = self._prepared(samples)
        try:
            self._follow_window(samples)
            counts = [self._head(sample).counts() for sample in samples]
        except (KeyError, TypeError) as error:
            names = self.label_names
            if any(not isinstance(x, Mapping) or find_labels(x, names) for x in samples):
                raise
            raise ValueError(
                "labels are counted before training_step and compute_loss, and the batches have "
                f"none of {names} ({type(error).__name__}: {error}): make them in the "
                "data collator or in _prepare_inputs, or name theirs in label_names of the "
                "Trainer's arguments"
            ) from error
        if not self.state.global_step:
            self._first_counts = counts[0]
        pairs = [torch.stack([nll.float(), kl.float()]) for nll, kl in counts]
        totals = torch.stack(pairs).sum(0).to(device)
        if self.args.average_tokens_across_devices:
            totals = self.accelerator.reduce(totals, reduction="sum") / self.get_tp_size()
        self._num_weight, total = totals.unbind()
        return total

    def _check_counts(self, head: Head) -> None:
        """Raise where the first micro-batch has other labels than those that were counted."""
        if self._first_counts is None or not self._is_in_step:
            return
        counted, self._first_counts = self._first_counts, None
        found = head.counts()
        if not all(a.item() == b.item() for a, b in zip(counted, found, strict=True)):
            raise ValueError(
                f"a micro-batch must have the labels with which its window was counted, "
                f"{counted.kl.item():g} items, got {found.kl.item():g} in compute_loss: change "
                "labels in the data collator, or in _prepare_inputs without chance"
            )

    def _window(
        self, own: OwnLoss | None, num_items: Tensor | int | None, is_divided_here: bool
    ) -> Window:
        """Return what the loss of a micro-batch is divided by."""
        is_mean = num_items is None and not is_divided_here
        counts = own is not None and own.counts_items and not is_mean
        return Window(
            num_items,
            own_items=self._own_num_items if counts else None,
            num_batches=1 if is_mean else self._num_micro_batches(),
            num_shares=self._gradient_shares(num_items),
        )

    def _gradient_shares(self, num_items: Tensor | int | None) -> int:
        """Return over how many processes gradients are averaged that were counted together."""
        if num_items is None or not self.args.average_tokens_across_devices:
            return 1
        return int(self.accelerator.num_processes // self.get_tp_size())
