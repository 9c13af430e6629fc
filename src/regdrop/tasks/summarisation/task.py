"""Summarisation with an encoder-decoder (section 3.3 of arXiv 2106.14448)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field
from torch import nn

from regdrop.config import RDropConfig
from regdrop.tasks.common.accepted import Count, Name, Text, WholeNumber
from regdrop.tasks.common.base import (
    Metric,
    OldNames,
    PreparedTask,
    TrainingSettings,
    check_task,
)
from regdrop.tasks.common.generation import prepare_generation
from regdrop.tasks.common.initialisation import initialise
from regdrop.tasks.common.model_config import (
    OF_VOCABULARY,
    check_model_config,
    find_config_class,
    named_model_config,
    refused_if_new,
)
from regdrop.tasks.common.pretrained import find_checkpoint, load_config, load_tokenizer
from regdrop.tasks.common.seq2seq import (
    References,
    by_length,
    check_references,
    column_values,
    encode_split,
    read_outputs,
)
from regdrop.tasks.common.vocabulary import find_vocabulary, learn_vocabulary
from regdrop.tasks.data_sets.columns import check_texts, require_columns
from regdrop.tasks.data_sets.loading import load_raw_splits
from regdrop.tasks.data_sets.training_split import require_training, split_training
from regdrop.tasks.summarisation.rouge import ROUGE, rouge_statistics


@dataclass(frozen=True)
class Summarisation(OldNames):
    """An encoder-decoder that is fine-tuned, or trained from scratch.

    Attributes:
        name: Name of the preset.
        description: One line of what is trained on what.
        dataset: Folder or hub id.
        source: Column of what is summarised.
        target: Column of the summary, or of lists of them: training takes the first, ROUGE the
            best.
        training: Optimisation without R-Drop; `batch_size` counts tokens of the longer side,
            padding included.
        rdrop: R-Drop's options.
        model: Checkpoint of any encoder-decoder: folder or hub id; None to train `model_config`.
        model_config: Changed settings of the checkpoint's configuration, or the whole one of a new
            model, `model_type` included; a BART with an `init_std` has normal weights of that
            deviation, else those of `regdrop.tasks.common.initialisation`.
        dataset_config: Configuration of the hub's data set.
        vocabulary_size: Tokens of the joint BPE vocabulary of a new model.
        max_source_length: Tokens to which sources are cut.
        max_target_length: Tokens to which references are cut in training.
        num_beams: Beams of the test.
        validation_num_beams: Beams of the evaluations during training.
        length_penalty: Exponent of the length by which a beam's score is divided.
        min_length: Least tokens of a summary.
        max_length: Most tokens of a summary.
        no_repeat_ngram_size: Length of n-grams that may not come twice; 0 for none.
        train_examples: Size of the part of the training split that is used; None for all of it.
        selection_metric: Metric on the validation split that selects the checkpoint.
    """

    family: ClassVar[str] = "summarisation"

    name: Name
    description: Text
    dataset: Text
    source: Text
    target: Text
    training: TrainingSettings
    rdrop: RDropConfig
    model: Text | None = None
    model_config: Mapping[str, Any] = field(default_factory=dict)
    dataset_config: Text | None = None
    vocabulary_size: Annotated[int, Field(ge=4)] = 10_000
    max_source_length: Annotated[int, Field(ge=2)] = 1024
    max_target_length: Annotated[int, Field(ge=2)] = 142
    num_beams: Count = 4
    validation_num_beams: Count = 4
    length_penalty: float = 2.0
    min_length: WholeNumber = 0
    max_length: Annotated[int, Field(ge=2)] = 142
    no_repeat_ngram_size: WholeNumber = 3
    train_examples: Count | None = None
    selection_metric: Text = "rouge2"

    def __post_init__(self) -> None:
        check_task(self)
        if self.min_length > self.max_length:
            raise ValueError(
                f"min_length must be at most max_length={self.max_length}, got {self.min_length}"
            )

    @property
    def metrics(self) -> dict[str, Metric]:
        """Return ROUGE-1, -2 and -L and the NLL of a token."""
        titles = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeLsum": "ROUGE-L"}
        return {
            **{name: Metric(titles[name], greater_is_better=True, percent=True) for name in ROUGE},
            "nll": Metric("NLL", greater_is_better=False),
        }

    def compute_metrics(self, statistics: np.ndarray) -> dict[str, float]:
        """Return the metrics from rows of ROUGE's F1, NLL and tokens."""
        means = statistics[:, : len(ROUGE)].mean(0)
        nll, tokens = statistics[:, len(ROUGE) :].sum(0)
        rouge = {name: float(mean) for name, mean in zip(ROUGE, means, strict=True)}
        return {**rouge, "nll": float(nll / tokens)}

    def prepare(self, folder: Path | None = None, *, begun: bool = False) -> PreparedTask:
        """Load the data and the tokenizer; a new model's is learned, or read from the folder.

        Raises:
            ValueError: For data or a checkpoint that cannot be found or does not fit, by name.
        """
        with refused_if_new(folder, begun=begun):
            self._check_model_config()
        raw = self._load_raw()
        if self.model is None:
            tokenizer = find_vocabulary(partial(self._learn_vocabulary, raw), folder)
        else:
            tokenizer = load_tokenizer(find_checkpoint(self.model))
        config = self.build_config(tokenizer)
        references = References()
        makers = {
            name: partial(self._encode, name, split, tokenizer, references)
            for name, split in raw.items()
        }
        # Beams keep keys and values of whole sources.
        sources = 8 * self.training.micro_batch_size // self.max_source_length
        return prepare_generation(
            self.dataset,
            makers,
            tokenizer,
            self.training,
            build_model=partial(self._build_model, tokenizer, config),
            example_statistics=partial(summary_statistics, tokenizer, references),
            num_beams=self.validation_num_beams,
            eval_batch_size=max(8, sources),
        )

    def _check_model_config(self) -> None:
        """Check the settings of a new model, or those that are changed of a checkpoint's."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING

        if (self.model is None) != ("model_type" in self.model_config):
            raise ValueError(
                "model_config must have a model_type where there is no model, and none where there "
                f"is one, got model {self.model!r} and {dict(self.model_config)}"
            )
        fit = "an encoder-decoder", MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
        if self.model is None:
            kind = find_config_class(self.model_config, *fit)
            check_model_config(self.model_config, kind, OF_VOCABULARY)
        else:
            config = load_config(find_checkpoint(self.model), *fit)
            check_model_config(self.model_config, config)

    def _load_raw(self) -> dict[str, Any]:
        splits = load_raw_splits(self.dataset, self.dataset_config)
        require_columns(self.dataset, splits, (self.source, self.target))
        check_texts(self.dataset, splits, [self.source])
        check_references(self.dataset, splits, self.target)
        return split_training(splits, self.train_examples)

    def _learn_vocabulary(self, raw: Mapping[str, Any]) -> Any:
        return learn_vocabulary(
            self._training_texts(require_training(self.dataset, raw)),
            size=self.vocabulary_size,
            lowercase=False,
            max_length=self.max_source_length,
        )

    def _training_texts(self, split: Any) -> Iterator[str]:
        yield from column_values(split, self.source)
        yield from (references[0] for references in self._references(split))

    def _references(self, split: Any) -> list[list[str]]:
        """Return the references of each example, at least one."""
        return [[x] if isinstance(x, str) else x for x in split[self.target][:]]

    def _encode(self, name: str, split: Any, tokenizer: Any, references: References) -> Any:
        if name != "train":
            split = by_length(split, self.source)

        def encode(rows: Mapping[str, list[Any]]) -> dict[str, Any]:
            first = [x if isinstance(x, str) else x[0] for x in rows[self.target]]
            source = tokenizer(
                rows[self.source], truncation=True, max_length=self.max_source_length
            )
            target = tokenizer(
                text_target=first, truncation=True, max_length=self.max_target_length
            )
            names = ("input_ids", "attention_mask")
            return {**{x: source[x] for x in names}, "labels": target["input_ids"]}

        own = self._references(split)
        return encode_split(split, encode, references, own, with_length=name == "train")

    def build_config(self, tokenizer: Any) -> Any:
        """Return the model's whole configuration: the checkpoint's, or a new one.

        Raises:
            ValueError: For a checkpoint that has too few positions, or settings of no model.
        """
        from transformers import AutoConfig

        longest = max(self.max_source_length, self.max_target_length, self.max_length)
        if self.model is not None:
            with named_model_config(self.model_config):
                config = AutoConfig.from_pretrained(
                    find_checkpoint(self.model), **self.model_config
                )
            positions = getattr(config, "max_position_embeddings", None)
            if positions is not None and positions < longest:
                raise ValueError(
                    f"max_source_length, max_target_length and max_length must be at most the "
                    f"{positions} positions of model {self.model!r}, got {longest}"
                )
            return config
        common = {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": longest + 1,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.eos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "decoder_start_token_id": tokenizer.eos_token_id,
            "forced_eos_token_id": None,
        }
        with named_model_config(self.model_config):
            return AutoConfig.for_model(**{**common, **self.model_config})

    def _build_model(self, tokenizer: Any, config: Any) -> nn.Module:
        from transformers import AutoModelForSeq2SeqLM

        if self.model is None:
            with named_model_config(self.model_config):
                model: Any = AutoModelForSeq2SeqLM.from_config(config)
            # Other classes, such as T5's, scale their products otherwise.
            if config.model_type == "bart" and "init_std" not in self.model_config:
                initialise(model)
        else:
            model = AutoModelForSeq2SeqLM.from_pretrained(
                find_checkpoint(self.model), config=config
            )
        model.generation_config.update(
            num_beams=self.num_beams,
            length_penalty=self.length_penalty if self.num_beams > 1 else None,
            early_stopping=True if self.num_beams > 1 else None,
            min_length=self.min_length,
            max_length=self.max_length,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
        )
        if self.model is None:
            model.generation_config.suppress_tokens = [tokenizer.pad_token_id]
        built: nn.Module = model
        return built


def summary_statistics(tokenizer: Any, references: References, prediction: Any) -> np.ndarray:
    """Return ROUGE's F1, NLL and tokens of each example, (examples, 5)."""
    outputs = read_outputs(tokenizer, references, prediction)
    return np.concatenate(
        [rouge_statistics(outputs.texts, outputs.references), outputs.nll], axis=1
    )
