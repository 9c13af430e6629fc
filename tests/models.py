"""Small Hugging Face models and data for the tests, and dropout whose masks are keyed by sample."""

from collections import Counter

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
VOCABULARY, LENGTH = 80, 7


class Rows(Dataset):
    """Items that are dictionaries, made of one dictionary of columns."""

    def __init__(self, **columns: Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def tiny_bert(num_labels=3, problem_type=None, dropout=0.1, **options) -> PreTrainedModel:
    torch.manual_seed(5)
    config = BertConfig(
        **SIZES,
        vocab_size=VOCABULARY,
        max_position_embeddings=16,
        num_labels=num_labels,
        problem_type=problem_type,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
        **options,
    )
    return BertForSequenceClassification(config)


def tiny_bert_of(head: str):
    """Return a function like `tiny_bert` for another head."""

    def build(num_labels=3, problem_type=None, dropout=0.1) -> PreTrainedModel:
        config = tiny_bert(num_labels, problem_type, dropout).config
        torch.manual_seed(5)
        return getattr(transformers, f"Bert{head}")(config)

    return build


def tiny_gpt2(num_labels=None, problem_type=None, dropout=0.1) -> PreTrainedModel:
    torch.manual_seed(5)
    config = transformers.GPT2Config(
        n_embd=16,
        n_layer=2,
        n_head=2,
        vocab_size=VOCABULARY,
        n_positions=16,
        embd_pdrop=dropout,
        resid_pdrop=dropout,
        attn_pdrop=0.0,
        initializer_range=0.3,
    )
    return transformers.GPT2LMHeadModel(config)


def tiny_vit(num_labels=3, problem_type=None, dropout=0.1) -> PreTrainedModel:
    torch.manual_seed(5)
    config = ViTConfig(
        **SIZES,
        image_size=4,
        patch_size=2,
        num_channels=1,
        num_labels=num_labels,
        problem_type=problem_type,
        hidden_dropout_prob=dropout,
        initializer_range=0.3,
    )
    return ViTForImageClassification(config)


def labels_for(problem_type: str | None, size: int, num_labels: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    if problem_type == "regression":
        shape = (size,) if num_labels == 1 else (size, num_labels)
        return torch.randn(shape, generator=generator)
    if problem_type == "multi_label_classification":
        return torch.randint(0, 2, (size, num_labels), generator=generator).float()
    return torch.randint(0, num_labels, (size,), generator=generator)


def text_rows(size=16, num_labels=3, problem_type=None) -> Rows:
    """Return sentences of random words; the first word is one of its own in each."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(64, VOCABULARY, (size, LENGTH), generator=generator)
    words[:, 0] = torch.arange(size)
    return Rows(
        input_ids=words,
        attention_mask=torch.ones_like(words),
        labels=labels_for(problem_type, size, num_labels),
    )


def token_rows(size=16, num_labels=3, problem_type=None) -> Rows:
    """Return the sentences of `text_rows` with a label a word, of which some are ignored."""
    rows = text_rows(size)
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, num_labels, (size, LENGTH), generator=generator)
    labels[torch.rand(size, LENGTH, generator=generator) < 0.3] = -100
    rows.columns["labels"] = labels
    return rows


def image_rows(size=16, num_labels=3, problem_type=None) -> Rows:
    """Return random images; the first pixel is one of its own in each."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(size, 1, 4, 4, generator=generator)
    pixels[:, 0, 0, 0] = torch.arange(size) / 64
    return Rows(pixel_values=pixels, labels=labels_for(problem_type, size, num_labels))


class KeyedDropout(nn.Module):
    """Dropout whose mask is a function of the sample, the pass, the position and the feature."""

    def __init__(self, p: float, name: str, rows: list[tuple[int, int]]) -> None:
        super().__init__()
        self.p, self.name, self.rows = p, name, rows

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        masks = torch.stack([self.mask(*row, x.shape[1:]) for row in self.rows])
        return x * masks.to(x.device)

    def mask(self, sample: int, pass_index: int, shape: torch.Size) -> Tensor:
        generator = torch.Generator().manual_seed(hash((sample, pass_index, *self.name.encode())))
        # Drawn for more positions than there are, so that padding changes nothing.
        whole = torch.rand(16, shape[-1], generator=generator)
        kept = (whole >= self.p).float() / (1 - self.p)
        return kept[: shape[0]] if len(shape) == 2 else kept[0]


def key_dropout(model: PreTrainedModel, num_passes: int = 2) -> PreTrainedModel:
    """Replace the model's dropout by keyed dropout.

    A sample's passes are counted from 0 to num_passes - 1 in the order of their forwards, however
    they are batched.
    """
    rows: list[tuple[int, int]] = []
    seen: Counter[int] = Counter()

    def note_rows(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not module.training:
            return
        if "input_ids" in kwargs:
            samples = kwargs["input_ids"][:, 0].tolist()
        else:
            samples = (kwargs["pixel_values"][:, 0, 0, 0] * 64).round().int().tolist()
        rows.clear()
        for sample in samples:
            rows.append((sample, seen[sample] % num_passes))
            seen[sample] += 1

    for name, module in list(model.named_modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, nn.Dropout) and child.p > 0:
                keyed = KeyedDropout(child.p, f"{name}.{child_name}", rows)
                setattr(module, child_name, keyed)
    model.register_forward_pre_hook(note_rows, with_kwargs=True)
    return model


def noisy_model():
    """Return a classifier of 4 features with dropout and with statistics of its batches."""
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
