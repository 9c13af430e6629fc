"""The trainer of tasks that are scored by what the model generates."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from regdrop.arguments import IGNORE_INDEX
from regdrop.integrations.transformers import RDropSeq2SeqTrainer
from regdrop.tasks.common.full_precision import FullPrecisionEvaluation
from regdrop.tasks.common.seq2seq import EXAMPLE_ID, LENGTH
from regdrop.tasks.common.token_batches import TokenBatchLoader, TokenBatchSampler


class GenerationTrainer(FullPrecisionEvaluation, RDropSeq2SeqTrainer):
    """Trains on batches by tokens and predicts by generation, with the NLL beside it.

    Predictions are the generated tokens and, for each example, the summed NLL
    of its labels; label_ids are the labels and the examples' ids.

    Args:
        max_tokens: Most tokens a micro-batch of all processes, before it is stacked.
        args: Everything else is `RDropSeq2SeqTrainer`'s; `generation_num_beams` is the number of
            beams on the validation split, the model's own generation config that of predictions.
    """

    def __init__(self, *args: Any, max_tokens: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.max_tokens = max_tokens

    def get_train_dataloader(self) -> TokenBatchLoader:
        """Return the batches of this process."""
        dataset: Any = self.train_dataset
        # That column alone: the others may be larger than memory.
        lengths = np.asarray(dataset.select_columns([LENGTH]).with_format("numpy")[:][LENGTH])
        sampler = TokenBatchSampler(
            lengths,
            self.max_tokens // self.args.world_size,
            seed=self.args.seed,
            rank=self.args.process_index,
            num_ranks=self.args.world_size,
        )
        return TokenBatchLoader(
            dataset.remove_columns([EXAMPLE_ID, LENGTH]),
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; of several processes, without the examples that fill up their last batch."""
        # Seq2SeqTrainer gathers these too, and would count some examples twice.
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict with the beams of the model's generation config."""
        model: Any = self.accelerator.unwrap_model(self.model)
        kwargs.setdefault("num_beams", model.generation_config.num_beams)
        return super().predict(test_dataset, *args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> Any:
        """Return the mean loss a token, generated tokens and NLLs, labels and ids."""
        inputs = dict(self._prepare_inputs(inputs))
        example_ids, labels = inputs.pop(EXAMPLE_ID), inputs.pop("labels")
        inputs.pop(LENGTH, None)
        bare: Any = self.accelerator.unwrap_model(self.model)
        with torch.no_grad(), self.compute_loss_context_manager():
            shifted = bare.prepare_decoder_input_ids_from_labels(labels)
            logits = model(**inputs, decoder_input_ids=shifted).logits.float()
            token_nll = F.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
            )
            nll = token_nll.view_as(labels).sum(1)
            if prediction_loss_only:
                tokens = None
            else:
                options = {**self._gen_kwargs, **gen_kwargs}
                options = {name: value for name, value in options.items() if value is not None}
                tokens = bare.generate(**inputs, **options)
        loss = nll.sum() / labels.ne(IGNORE_INDEX).sum().clamp(min=1)
        return loss, None if tokens is None else (tokens, nll), (labels, example_ids)
