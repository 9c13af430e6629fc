"""Language understanding: the paper's eight tasks of GLUE (section 3.2 of arXiv 2106.14448)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import nn

from regdrop.config import RDropConfig
from regdrop.tasks.common.accepted import BelowOne, Count, Name, Text, check_choice
from regdrop.tasks.common.base import (
    LazySplits,
    Metric,
    OldNames,
    PreparedTask,
    TrainingSettings,
    check_task,
)
from regdrop.tasks.common.classification import classification_statistics, set_dropout
from regdrop.tasks.common.positions import check_positions
from regdrop.tasks.common.pretrained import find_checkpoint, load_config, load_tokenizer
from regdrop.tasks.data_sets.columns import check_texts, require_columns
from regdrop.tasks.data_sets.loading import load_raw_splits
from regdrop.tasks.data_sets.training_split import split_training
from regdrop.tasks.understanding.glue import GLUE, METRICS, GlueTask
from regdrop.tasks.understanding.labels import (
    check_labels,
    check_variety,
    class_names,
    has_labels,
    match_labels,
    saved_class_names,
    say_converted_labels,
)


@dataclass(frozen=True)
class LanguageUnderstanding(OldNames):
    """An encoder fine-tuned on one task of GLUE.

    GLUE keeps the labels of its test splits. So a tenth of the training split, drawn by a fixed
    seed, is the validation split here, on which checkpoints and settings are selected, and the
    data set's validation split is the test split.

    Attributes:
        name: Name of the preset.
        description: One line of what is trained on what.
        glue_task: One of "cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb".
        model: Checkpoint of any encoder with a sequence classifier: folder, hub id, or
            "package:NAME/FOLDER".
        dataset: Folder or hub id with the columns of the hub's GLUE.
        dropout: Dropout rate, set wherever the model's configuration has one.
        max_length: Tokens to which an example is cut.
        train_examples: Size of the part of the training split that is used; None for all of it.
        group_by_length: Whether a batch's examples are of about one length, which saves padding.
        training: Optimisation without R-Drop.
        rdrop: R-Drop's options.
    """

    family: ClassVar[str] = "understanding"

    name: Name
    description: Text
    glue_task: Text
    model: Text
    training: TrainingSettings
    rdrop: RDropConfig
    dataset: Text = "nyu-mll/glue"
    dropout: BelowOne = 0.1
    max_length: Annotated[int, Field(ge=3)] = 128
    train_examples: Count | None = None
    group_by_length: bool = False

    def __post_init__(self) -> None:
        check_choice("glue_task", self.glue_task, GLUE)
        check_task(self)

    @property
    def glue(self) -> GlueTask:
        """The task's columns, labels and metrics."""
        return GLUE[self.glue_task]

    @property
    def metrics(self) -> dict[str, Metric]:
        """Return the task's own metrics and its loss."""
        return {name: METRICS[name] for name in self.glue.metrics}

    @property
    def selection_metric(self) -> str:
        """Return the first of the task's own metrics."""
        return next(iter(self.glue.metrics))

    def compute_metrics(self, statistics: np.ndarray) -> dict[str, float]:
        """Return the metrics from rows of label, prediction and loss."""
        return {name: metric(statistics) for name, metric in self.glue.metrics.items()}

    def prepare(self, folder: Path | None = None, *, begun: bool = False) -> PreparedTask:
        """Load the data and the tokenizer; nothing is kept in the folder.

        Raises:
            ValueError: For data or a checkpoint that cannot be found or does not fit, by name.
        """
        from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

        checkpoint = find_checkpoint(self.model)
        saved = saved_class_names(folder, self.glue)
        raw = self._load_raw(saved)
        config = self._config(checkpoint, class_names(raw, self.glue, saved))
        tokenizer = load_tokenizer(checkpoint)
        makers = {name: partial(self._tokenize, split, tokenizer) for name, split in raw.items()}
        return PreparedTask(
            splits=LazySplits(makers, self.dataset),
            build_model=partial(_build_model, checkpoint, config),
            load_model=AutoModelForSequenceClassification.from_pretrained,
            example_statistics=(
                regression_statistics if self.glue.is_regression else classification_statistics
            ),
            further_tests=tuple(name for name in self.glue.tests if name != "test"),
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            training_options=(
                {"train_sampling_strategy": "group_by_length"} if self.group_by_length else {}
            ),
        )

    def _load_raw(self, saved: list[str] | None = None) -> dict[str, Any]:
        """Return the splits by what they are used for.

        A set whose test split shows its labels is tested on that, as anybody's own set is. GLUE's
        hide them: they are tested on their validation splits, and validated on a part of training.
        """
        raw = load_raw_splits(self.dataset, self.glue_task)
        shows_test = "test" in raw and has_labels(raw["test"])
        tests = {"test": "test"} if shows_test else self.glue.tests
        roles = {role: name for role, name in tests.items() if name in raw}
        used = {name: raw[name] for name in ("train", *roles.values()) if name in raw}
        if "validation" in raw and (shows_test or not roles):
            roles["validation"], used["validation"] = "validation", raw["validation"]
        if not used:
            raise ValueError(
                f"data {self.dataset!r} must have a split named train, validation or test (or as "
                f"GLUE's {list(self.glue.tests.values())}) with labels, got {sorted(raw)}"
            )
        columns = (*self.glue.sentences, "label")
        require_columns(self.dataset, used, columns)
        check_texts(self.dataset, used, self.glue.sentences)
        for name, split in used.items():
            where = f"split {name!r} of data {self.dataset!r}"
            check_labels(where, split, self.glue)
            say_converted_labels(where, split, self.glue)
        used = match_labels(self.dataset, used, self.glue, saved)
        if "train" in used:
            check_variety(f"split 'train' of data {self.dataset!r}", used["train"], self.glue)
        splits = {role: used[name] for role, name in roles.items()}
        if "train" in used:
            splits["train"] = used["train"]
        return split_training(splits, self.train_examples)

    def _tokenize(self, split: Any, tokenizer: Any) -> Any:
        columns = self.glue.sentences

        def encode(rows: Mapping[str, list[Any]]) -> dict[str, Any]:
            texts = [rows[column] for column in columns]
            encoded = tokenizer(*texts, truncation=True, max_length=self.max_length)
            # Whole numbers may be written as text, as decimals or as true and false.
            kind = float if self.glue.is_regression else int
            return {**encoded, "labels": [kind(float(label)) for label in rows["label"]]}

        return split.map(
            encode, batched=True, remove_columns=split.column_names, keep_in_memory=True
        )

    def _config(self, checkpoint: str, labels: list[str]) -> Any:
        from transformers import AutoModelForSequenceClassification
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        )

        problem = "regression" if self.glue.is_regression else "single_label_classification"
        names = {
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
        }
        config = load_config(
            checkpoint,
            "an encoder with a sequence classifier",
            MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
            num_labels=self.glue.num_labels,
            problem_type=problem,
            **(names if labels else {}),
        )
        set_dropout(config, self.dropout)
        with torch.device("meta"):  # for its shapes alone
            model: Any = AutoModelForSequenceClassification.from_config(config)
        check_positions(model, self.max_length, "max_length", self.max_length)
        return config


def _build_model(checkpoint: str, config: Any) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    model, report = AutoModelForSequenceClassification.from_pretrained(
        checkpoint, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    # A new head is what fine-tuning begins with, and many checkpoints have no pooler.
    body = f"{model.base_model_prefix}."
    missing = sorted(
        name for name in report["missing_keys"] if name.startswith(body) and "pooler" not in name
    )
    if missing:
        raise ValueError(
            f"model {checkpoint!r} must hold the weights of a {type(model).__name__}; it lacks "
            f"{len(missing)} of its encoder's, {missing[0]!r} among them"
        )
    built: nn.Module = model
    return built


def regression_statistics(prediction: Any) -> np.ndarray:
    """Return score, predicted score and squared difference of each example, (N, 3)."""
    predicted = prediction.predictions
    predicted = predicted[0] if isinstance(predicted, tuple) else predicted
    predicted = np.asarray(predicted, dtype=np.float64).reshape(-1)
    labels = np.asarray(prediction.label_ids, dtype=np.float64).reshape(-1)
    return np.stack([labels, predicted, (predicted - labels) ** 2], axis=1)
