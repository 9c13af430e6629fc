"""Language modelling by words, trained from scratch (section 3.4 of arXiv 2106.14448)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset

from regdrop.arguments import IGNORE_INDEX
from regdrop.config import RDropConfig
from regdrop.tasks.common.accepted import Count, Name, Text, WholeNumber
from regdrop.tasks.common.base import (
    LazySplits,
    Metric,
    OldNames,
    PreparedTask,
    TrainingSettings,
    check_task,
)
from regdrop.tasks.common.model_config import (
    OF_VOCABULARY,
    check_model_config,
    find_config_class,
    named_model_config,
    refused_if_new,
)
from regdrop.tasks.common.positions import check_positions
from regdrop.tasks.common.vocabulary import find_vocabulary, learn_words
from regdrop.tasks.data_sets.columns import check_texts, require_columns
from regdrop.tasks.data_sets.loading import load_raw_splits
from regdrop.tasks.data_sets.training_split import require_training
from regdrop.tasks.notices import say_once

# Lines that are encoded at a time: their numbers as Python has them take much memory.
_LINES = 10_000
# Share of unknown words above which a split's is said.
_MOST_UNKNOWN = 0.2


@dataclass(frozen=True)
class LanguageModelling(OldNames):
    """A Transformer decoder on running text, a word a token.

    The lines of a split, each with the end-of-sentence word, are one stream, which is cut into
    blocks. Perplexity is that of every word of a split, the ends of sentences included.

    Attributes:
        name: Name of the preset.
        description: One line of what is trained on what.
        dataset: Folder or hub id with a column "text".
        model_config: Hugging Face configuration of a causal language model, `model_type` included.
        training: Optimisation without R-Drop; `batch_size` counts blocks.
        rdrop: R-Drop's options.
        dataset_config: Configuration of the hub's data set.
        vocabulary_size: Most frequent words that are kept; None for all of the training split.
        block_size: Words that a model sees at once.
        context_window: Of the words at once in a test, those before the ones that it counts: every
            word but the first ones of a split is predicted from at least as many. Training and
            validation have none.
        test_block_size: Words that a model sees at once in a test; None for `block_size`.
        train_words: Words of the training split that are used, its first ones; None for all.
        selection_metric: Metric on the validation split that selects the checkpoint.
    """

    family: ClassVar[str] = "language-modelling"

    name: Name
    description: Text
    dataset: Text
    model_config: Mapping[str, Any]
    training: TrainingSettings
    rdrop: RDropConfig
    dataset_config: Text | None = None
    vocabulary_size: Annotated[int, Field(ge=2)] | None = None
    block_size: Count = 512
    context_window: WholeNumber = 400
    test_block_size: Count | None = None
    train_words: Count | None = None
    selection_metric: Text = "perplexity"

    def __post_init__(self) -> None:
        check_task(self)

    @property
    def metrics(self) -> dict[str, Metric]:
        """Return the perplexity of a word and its NLL."""
        return {
            "perplexity": Metric("perplexity", greater_is_better=False),
            "nll": Metric("NLL", greater_is_better=False),
        }

    def compute_metrics(self, statistics: np.ndarray) -> dict[str, float]:
        """Return the metrics from rows of NLL and number of words."""
        nll, words = statistics.sum(0)
        mean = float(nll / words)
        return {"perplexity": float(np.exp(mean)), "nll": mean}

    def prepare(self, folder: Path | None = None, *, begun: bool = False) -> PreparedTask:
        """Load the text; count the words of its training split, or read them from the folder.

        Raises:
            ValueError: For data that cannot be found or does not fit, by name, or a context that a
                block does not hold.
        """
        if not 0 <= self.context_window < self._test_block_size():
            raise ValueError(
                f"context_window must be from 0 to below the {self._test_block_size()} words that "
                f"a test sees at once, got {self.context_window}"
            )
        from transformers import DataCollatorForTokenClassification
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        from regdrop.tasks.language_modelling.adaptive_input import register
        from regdrop.tasks.language_modelling.trainer import WordNLLTrainer

        register()
        kind = find_config_class(
            self.model_config, "a causal language model", MODEL_FOR_CAUSAL_LM_MAPPING
        )
        with refused_if_new(folder, begun=begun):
            check_model_config(self.model_config, kind, OF_VOCABULARY)
        raw = load_raw_splits(self.dataset, self.dataset_config)
        require_columns(self.dataset, raw, ["text"])
        check_texts(self.dataset, raw, ["text"])
        if "train" in raw and "validation" not in raw:
            raise ValueError(
                f"data {self.dataset!r} must have a split 'validation', got {sorted(raw)}"
            )
        tokenizer = find_vocabulary(partial(self._learn_words, raw), folder)
        streams = {name: partial(self._stream, name, split) for name, split in raw.items()}
        blocks = partial(self._blocks, tokenizer, self._takes_moved_labels(tokenizer))
        return PreparedTask(
            splits=LazySplits(
                {name: partial(blocks, name, s) for name, s in streams.items()}, self.dataset
            ),
            build_model=partial(self._build_model, tokenizer),
            load_model=self._load_model,
            example_statistics=lambda prediction: np.stack(prediction.predictions, axis=1),
            data_collator=DataCollatorForTokenClassification(tokenizer),
            processing_class=tokenizer,
            trainer=WordNLLTrainer,
            eval_batch_factor=1,  # as many logits as in training
        )

    def _test_block_size(self) -> int:
        return self.block_size if self.test_block_size is None else self.test_block_size

    def _learn_words(self, raw: Mapping[str, Any]) -> Any:
        train = require_training(self.dataset, raw)
        return learn_words(self._stream("train", train), size=self.vocabulary_size)

    def _stream(self, name: str, split: Any) -> Iterator[str]:
        """Return the lines of a split, of the training split as many as are used."""
        limit = self.train_words if name == "train" else None
        count = 0
        for text in split["text"]:
            words = text.split()
            if limit is not None and count + len(words) + 1 >= limit:
                # The line's end is a word too.
                yield " ".join(words[: limit - count - 1])
                return
            count += len(words) + 1
            yield text
        if limit is not None and count < limit:
            raise ValueError(
                f"train_words must be at most the {count:,} words of the training split, "
                f"got {limit:,}"
            )

    def _blocks(self, tokenizer: Any, moves_labels: bool, name: str, stream: Any) -> "WordBlocks":
        parts = [np.array([tokenizer.eos_token_id], dtype=np.int32)]
        lines = stream()
        while batch := list(islice(lines, _LINES)):
            encoded = tokenizer(batch, return_attention_mask=False)["input_ids"]
            parts.append(np.fromiter(chain.from_iterable(encoded), dtype=np.int32))
        words = torch.from_numpy(np.concatenate(parts))
        self._say_unknown(name, float((words == tokenizer.unk_token_id).double().mean()))
        if name in ("train", "validation"):
            return WordBlocks(words, self.block_size, moves_labels=moves_labels)
        return WordBlocks(
            words, self._test_block_size(), self.context_window, moves_labels=moves_labels
        )

    def _say_unknown(self, name: str, part: float) -> None:
        if part > _MOST_UNKNOWN:
            say_once(
                f"{part:.1%} of the words of split {name!r} of data {self.dataset!r} are unknown "
                "to the vocabulary: each counts as one and the same word, which makes the "
                "perplexity lower"
            )

    def _takes_moved_labels(self, tokenizer: Any) -> bool:
        """Return whether the model's class leaves it to the caller to move the labels."""
        from transformers import AutoModelForCausalLM

        from regdrop.tasks.language_modelling.next_words import takes_moved_labels

        with named_model_config(self.model_config), torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(self.build_config(tokenizer))
        return takes_moved_labels(model)

    def _check_model(self, model: Any) -> None:
        """Check that a model has positions for the blocks and sees no word that it predicts."""
        from regdrop.tasks.language_modelling.next_words import check_causal

        sizes = {"block_size": self.block_size, "test_block_size": self._test_block_size()}
        name = max(sizes, key=sizes.__getitem__)
        # A block is read with the word before it.
        check_positions(model, sizes[name] + 1, name, sizes[name])
        check_causal(model, sizes[name] + 1)

    def _load_model(self, folder: Path) -> nn.Module:
        from transformers import AutoModelForCausalLM

        model: nn.Module = AutoModelForCausalLM.from_pretrained(folder)
        self._check_model(model)
        return model

    def _build_model(self, tokenizer: Any) -> nn.Module:
        from transformers import AutoModelForCausalLM, GenerationConfig

        with named_model_config(self.model_config):
            model: Any = AutoModelForCausalLM.from_config(self.build_config(tokenizer))
        model.generation_config = GenerationConfig(
            do_sample=True,
            top_k=0,
            max_new_tokens=self.block_size,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            suppress_tokens=[tokenizer.unk_token_id],
        )
        self._check_model(model)
        built: nn.Module = model
        return built

    def build_config(self, tokenizer: Any) -> Any:
        """Return the model's whole configuration for a vocabulary."""
        from transformers import CONFIG_MAPPING, AutoConfig

        from regdrop.tasks.language_modelling.adaptive_input import register

        register()
        standard = CONFIG_MAPPING[self.model_config["model_type"]]()
        # Otherwise an encoder's class reads the words to come too.
        is_encoder = hasattr(standard, "is_decoder") and not standard.is_encoder_decoder
        common = {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": max(self.block_size, self._test_block_size()) + 1,
            # Blocks are padded by the end of a sentence, whose embedding learns like any other.
            "pad_token_id": None,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            **({"is_decoder": True} if is_encoder else {}),
        }
        # A class may have another name for one of them, which counts for both.
        names = standard.attribute_map
        given = {names.get(name, name) for name in self.model_config}
        common = {name: x for name, x in common.items() if names.get(name, name) not in given}
        return AutoConfig.for_model(**common, **self.model_config)


class WordBlocks(Dataset[dict[str, Tensor]]):
    """Blocks of a stream of words; together they count every word but the first once.

    Args:
        words: (n,) word numbers, the first of which is only read.
        block_size: Words that a model reads at once.
        context: Words before those that a block counts.
        moves_labels: Whether the label of a word is the next one, for models that do not move them.
    """

    def __init__(
        self, words: Tensor, block_size: int, context: int = 0, *, moves_labels: bool = False
    ) -> None:
        self.words, self.block_size, self.context = words, block_size, context
        self.moves_labels = moves_labels
        # Word number `start` is the first that a block counts.
        self.starts = range(1, len(words), block_size - context)
        if not self.starts:
            raise ValueError("a split must hold at least one word")

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, position: int) -> dict[str, Any]:
        start = self.starts[position]
        end = min(start + self.block_size - self.context, len(self.words))
        first = max(0, start - 1 - self.context)
        labels = self.words[first:end].clone()
        labels[: start - first] = IGNORE_INDEX
        if self.moves_labels:
            labels = F.pad(labels[1:], (0, 1), value=IGNORE_INDEX)
        return {"input_ids": self.words[first:end].tolist(), "labels": labels.tolist()}
