"""The trainer of language models: in evaluation it keeps sums of NLLs, never logits."""

from typing import Any

import torch
from torch import nn

from regdrop.arguments import IGNORE_INDEX
from regdrop.integrations.transformers import RDropTrainer
from regdrop.integrations.transformers.heads.registry import find_head
from regdrop.tasks.common.full_precision import FullPrecisionEvaluation


class WordNLLTrainer(FullPrecisionEvaluation, RDropTrainer):
    """Predictions are, for each block, the summed NLL of its words and their number."""

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """Return the mean loss a word; NLL and number of words of each block; labels."""
        inputs = self._prepare_inputs(inputs)
        head = find_head(self._unwrapped(model), inputs)  # without smoothing or weights
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = head.outputs(model(**head.inputs))
            nll = head.terms(outputs, head.target, num_passes=1).nll.sum(1)
        words = head.target.ne(IGNORE_INDEX).sum(1).to(nll.dtype)
        loss = nll.sum() / words.sum().clamp(min=1)
        # The Trainer computes no figures without labels.
        return loss, None if prediction_loss_only else (nll, words), words
