"""Translation with a Transformer trained from scratch (section 3.1 of arXiv 2106.14448)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field
from torch import nn

from regdrop.config import RDropConfig
from regdrop.tasks.common.accepted import Count, Name, Text
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
    named_model_config,
    refused_if_new,
)
from regdrop.tasks.common.seq2seq import (
    References,
    by_length,
    check_references,
    column_values,
    encode_split,
    fits_memory,
    read_outputs,
)
from regdrop.tasks.common.vocabulary import find_vocabulary, learn_vocabulary
from regdrop.tasks.data_sets.columns import check_texts, require_columns
from regdrop.tasks.data_sets.loading import load_raw_splits
from regdrop.tasks.data_sets.training_split import require_training, split_training
from regdrop.tasks.notices import say_once
from regdrop.tasks.translation.bleu import (
    BLEU_STATISTICS,
    bleu,
    bleu_signature,
    default_tokenizer,
    sentence_statistics,
)

# The column that the hub's translation sets keep their languages in.
_TRANSLATION = "translation"


@dataclass(frozen=True)
class Translation(OldNames):
    """A Transformer (Marian's class: post-norm, sinusoidal positions, shared embeddings).

    Attributes:
        name: Name of the preset.
        description: One line of what is trained on what.
        dataset: Folder or hub id, with a column for each language or one named "translation".
        source: Language that is translated.
        target: Language into which it is translated.
        model_config: Options of `transformers.MarianConfig`; with an `init_std` weights are normal
            ones of that deviation, else those of `regdrop.tasks.common.initialisation`.
        training: Optimisation without R-Drop; `batch_size` counts tokens of the longer side,
            padding included.
        rdrop: R-Drop's options.
        dataset_config: Configuration of the hub's data set.
        vocabulary_size: Tokens of the joint BPE vocabulary.
        lowercase: Whether text is lower-cased before it is encoded.
        max_length: Tokens of a sentence: longer training pairs are left out, others are cut.
        num_beams: Beams of the test.
        validation_num_beams: Beams of the evaluations during training.
        length_penalty: Exponent of the length by which a beam's score is divided.
        train_examples: Size of the part of the training split that is used; None for all of it.
        selection_metric: Metric on the validation split that selects the checkpoint.
    """

    family: ClassVar[str] = "translation"

    name: Name
    description: Text
    dataset: Text
    source: Text
    target: Text
    training: TrainingSettings
    rdrop: RDropConfig
    model_config: Mapping[str, Any] = field(default_factory=dict)
    dataset_config: Text | None = None
    vocabulary_size: Annotated[int, Field(ge=4)] = 10_000
    lowercase: bool = True
    max_length: Annotated[int, Field(ge=2)] = 175
    num_beams: Count = 5
    validation_num_beams: Count = 5
    length_penalty: float = 1.0
    train_examples: Count | None = None
    selection_metric: Text = "bleu_lowercase"

    def __post_init__(self) -> None:
        check_task(self)

    @property
    def metrics(self) -> dict[str, Metric]:
        """Return BLEU, lower-cased BLEU and the NLL of a token."""
        return {
            "bleu": Metric("BLEU", greater_is_better=True, percent=True),
            "bleu_lowercase": Metric("BLEU, lower-cased", greater_is_better=True, percent=True),
            "nll": Metric("NLL", greater_is_better=False),
        }

    def compute_metrics(self, statistics: np.ndarray) -> dict[str, float]:
        """Return the metrics from rows of BLEU's statistics, NLL and tokens."""
        cased, lower = np.split(statistics[:, : 2 * BLEU_STATISTICS], 2, axis=1)
        nll, tokens = statistics[:, 2 * BLEU_STATISTICS :].sum(0)
        return {"bleu": bleu(cased), "bleu_lowercase": bleu(lower), "nll": float(nll / tokens)}

    def prepare(self, folder: Path | None = None, *, begun: bool = False) -> PreparedTask:
        """Load the data; learn the vocabulary of its training split, or read it from the folder.

        Raises:
            ValueError: For data that cannot be found or does not fit, by name.
        """
        from transformers import MarianConfig

        fixed = {**OF_VOCABULARY, "model_type": "'marian'"}
        with refused_if_new(folder, begun=begun):
            check_model_config(self.model_config, MarianConfig, fixed)
        raw = self._load_raw()
        tokenizer = find_vocabulary(partial(self._learn_vocabulary, raw), folder)
        references = References()
        makers = {
            name: partial(self._encode, name, split, tokenizer, references)
            for name, split in raw.items()
        }
        tokenize = default_tokenizer(self.target)
        return prepare_generation(
            self.dataset,
            makers,
            tokenizer,
            self.training,
            build_model=partial(self._build_model, tokenizer),
            example_statistics=partial(
                generation_statistics, tokenizer, references, tokenize=tokenize
            ),
            num_beams=self.validation_num_beams,
            eval_batch_size=max(128, self.training.micro_batch_size // 32),
            signatures={
                name: bleu_signature(tokenize=tokenize, lowercase=lowercase)
                for name, lowercase in (("bleu", False), ("bleu_lowercase", True))
            },
        )

    def _learn_vocabulary(self, raw: Mapping[str, Any]) -> Any:
        return learn_vocabulary(
            _texts(require_training(self.dataset, raw)),
            size=self.vocabulary_size,
            lowercase=self.lowercase,
            max_length=self.max_length,
        )

    def _load_raw(self) -> dict[str, Any]:
        raw = load_raw_splits(self.dataset, self.dataset_config)
        splits = {}
        for name, split in raw.items():
            if _TRANSLATION in split.column_names:
                if others := {self.source, self.target} & set(split.column_names):
                    raise ValueError(
                        f"split {name!r} of data {self.dataset!r} must have its languages in the "
                        f"column {_TRANSLATION!r} or in columns of their own; it has both, "
                        f"{sorted(others)}"
                    )
                split = split.flatten()
                names = {f"{_TRANSLATION}.{x}": x for x in (self.source, self.target)}
                present = {k: v for k, v in names.items() if k in split.column_names}
                split = split.rename_columns(present)
            splits[name] = split
        require_columns(self.dataset, splits, (self.source, self.target))
        check_texts(self.dataset, splits, (self.source, self.target))
        check_references(self.dataset, splits, self.target)
        splits = {
            name: split.select_columns([self.source, self.target]).rename_columns(
                {self.source: "source", self.target: "target"}
            )
            for name, split in splits.items()
        }
        return split_training(splits, self.train_examples)

    def _encode(self, name: str, split: Any, tokenizer: Any, references: References) -> Any:
        """Return token ids; ids of examples are positions in the list of all references."""
        is_train = name == "train"
        split = split if is_train else by_length(split, "source")
        # Training pairs are cut nowhere, so that too long ones can be left out.
        cut: dict[str, Any] = (
            {} if is_train else {"truncation": True, "max_length": self.max_length}
        )

        def encode(rows: Mapping[str, list[Any]]) -> dict[str, Any]:
            target = tokenizer(rows["target"], **cut)
            return {**tokenizer(rows["source"], **cut), "labels": target["input_ids"]}

        encoded = encode_split(split, encode, references, split["target"], with_length=is_train)
        if not is_train:
            return encoded

        def is_kept(sources: list[list[int]], targets: list[list[int]]) -> list[bool]:
            # One token is the end of an empty sentence.
            return [
                all(1 < len(side) <= self.max_length for side in pair)
                for pair in zip(sources, targets, strict=True)
            ]

        kept = encoded.filter(
            is_kept,
            batched=True,
            input_columns=["input_ids", "labels"],
            keep_in_memory=fits_memory(encoded),
        )
        where = f"split 'train' of data {self.dataset!r}"
        if len(kept) == 0:
            raise ValueError(f"{where} has no pair of 1 to {self.max_length - 1} tokens")
        if len(kept) < len(encoded):
            say_once(
                f"{where}: {len(encoded) - len(kept):,} of {len(encoded):,} pairs are left out, "
                f"with a side that is empty or longer than max_length={self.max_length}"
            )
        return kept

    def _build_model(self, tokenizer: Any) -> nn.Module:
        from transformers import GenerationConfig, MarianMTModel

        with named_model_config(self.model_config):
            model = MarianMTModel(self.build_config(tokenizer))
        if "init_std" not in self.model_config:
            initialise(model)
        beams: dict[str, Any] = {"length_penalty": self.length_penalty, "early_stopping": True}
        model.generation_config = GenerationConfig(
            num_beams=self.num_beams,
            **(beams if self.num_beams > 1 else {}),
            max_length=self.max_length,
            decoder_start_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            suppress_tokens=[tokenizer.pad_token_id],
        )
        return model

    def build_config(self, tokenizer: Any) -> Any:
        """Return the model's whole configuration for a vocabulary."""
        from transformers import MarianConfig

        common = {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": max(256, self.max_length + 1),
            "activation_function": "relu",
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            "scale_embedding": True,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
            "forced_eos_token_id": None,
            # As in fairseq, the decoder begins with the end of the sentence before.
            "decoder_start_token_id": tokenizer.eos_token_id,
            "decoder_vocab_size": len(tokenizer),
        }
        return MarianConfig(**{**common, **self.model_config})


def generation_statistics(
    tokenizer: Any, references: References, prediction: Any, *, tokenize: str
) -> np.ndarray:
    """Return BLEU's statistics (cased, lower-cased), NLL and tokens, (sentences, 22)."""
    texts, chosen, nll = read_outputs(tokenizer, references, prediction)
    both = [
        sentence_statistics(texts, chosen, tokenize=tokenize, lowercase=lowercase)
        for lowercase in (False, True)
    ]
    return np.concatenate([*both, nll], axis=1)


def _texts(split: Any) -> Iterator[str]:
    for column in ("source", "target"):
        yield from column_values(split, column)
