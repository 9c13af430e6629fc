"""The trainer of a task whose text is generated from text, with its data and its model."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import Dataset

from regdrop.tasks.common.base import LazySplits, PreparedTask, TrainingSettings


def prepare_generation(
    dataset: str,
    makers: Mapping[str, Callable[[], Dataset[Any]]],
    tokenizer: Any,
    training: TrainingSettings,
    *,
    build_model: Callable[[], nn.Module],
    example_statistics: Callable[[Any], np.ndarray],
    num_beams: int,
    eval_batch_size: int,
    signatures: dict[str, str] | None = None,
) -> PreparedTask:
    """Return what trains on batches by tokens and scores what is generated.

    Args:
        dataset: Folder or hub id, for errors.
        makers: From the name of a split to the function that makes it.
        tokenizer: That of the model.
        training: Optimisation without R-Drop.
        build_model: Returns a new model.
        example_statistics: As in `PreparedTask`.
        num_beams: Beams of the evaluations during training.
        eval_batch_size: Examples a batch of an evaluation.
        signatures: As in `PreparedTask`.
    """
    from transformers import (
        AutoModelForSeq2SeqLM,
        DataCollatorForSeq2Seq,
        Seq2SeqTrainingArguments,
    )

    from regdrop.tasks.common.generation_trainer import GenerationTrainer

    return PreparedTask(
        splits=LazySplits(makers, dataset),
        build_model=build_model,
        load_model=AutoModelForSeq2SeqLM.from_pretrained,
        example_statistics=example_statistics,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        trainer=partial(GenerationTrainer, max_tokens=training.micro_batch_size),
        arguments=Seq2SeqTrainingArguments,
        options={
            "predict_with_generate": True,
            "generation_num_beams": num_beams,
            "per_device_train_batch_size": 1,  # batches are by tokens
            "per_device_eval_batch_size": eval_batch_size,
            "remove_unused_columns": False,
        },
        signatures=signatures or {},
    )
