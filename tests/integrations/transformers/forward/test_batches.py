"""Batches that are not one row an item: patches that lie flat, documents that share a row."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from models import VOCABULARY, Rows
from regdrop import RDropConfig, symmetric_kl
from regdrop.integrations.transformers.forward.batches import why_not_stacked
from training import NamedRows, logged, record_scores, said, train

KEPT = {"remove_unused_columns": False}


# --- flat patches -----------------------------------------------------------------------------


class LookingModel(nn.Module):
    """Sentences beside pictures, whose patches lie flat: each picture has a number of its own."""

    def __init__(self, dropout=0.3):
        super().__init__()
        torch.manual_seed(5)
        self.words, self.patches = nn.Embedding(VOCABULARY, 8), nn.Linear(4, 8)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(8, 3)

    def forward(self, input_ids, pixel_values, num_patches, labels=None):
        owner = torch.arange(len(num_patches)).repeat_interleave(num_patches)
        looked = self.patches(pixel_values)
        pictures = torch.zeros(len(num_patches), 8).index_add(0, owner, looked)
        logits = self.head(self.dropout(torch.tanh(self.words(input_ids).mean(1) + pictures)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def looking_rows(size=8):
    generator = torch.Generator().manual_seed(1)
    return Rows(
        input_ids=torch.randint(0, VOCABULARY, (size, 5), generator=generator),
        num_patches=torch.arange(size) % 3 + 1,
        pixel_values=torch.randn(size, 3, 4, generator=generator),
        labels=torch.arange(size) % 3,
    )


def lay_flat(samples):
    batch = torch.utils.data.default_collate(samples)
    patches = zip(batch["pixel_values"], batch["num_patches"].tolist(), strict=True)
    batch["pixel_values"] = torch.cat([rows[:count] for rows, count in patches])
    return batch


def look(folder, rdrop, **options):
    model = LookingModel()
    seen = record_scores(model, "logits")
    defaults = {"per_device_train_batch_size": 4, "further": {"data_collator": lay_flat}, **KEPT}
    return train(folder, model, looking_rows(), rdrop, **defaults, **options), seen


def test_passes_over_flat_patches_run_one_by_one(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer, seen = look(tmp_path, RDropConfig(alpha=2.0))
    assert [len(scores) for scores in seen] == [4, 4, 4, 4]
    labels = looking_rows().columns["labels"]
    for step in range(2):
        passes, target = seen[2 * step : 2 * step + 2], labels[4 * step : 4 * step + 4]
        nll = sum(F.cross_entropy(scores, target) for scores in passes) / 2
        kl = symmetric_kl(torch.cat(passes))
        assert kl > 0
        assert logged(trainer, "nll")[step] == pytest.approx(nll.item(), rel=1e-5)
        assert logged(trainer, "loss")[step] == pytest.approx((nll + kl).item(), rel=1e-5)
    told = [line for line in said(caplog) if "one after the other" in line]
    assert told == [
        "R-Drop: passes run one after the other, not stacked: pixel_values has 7 rows for 4 rows "
        "of the batch."
    ]


def test_the_own_loss_of_flat_patches(tmp_path):
    trainer, seen = look(tmp_path, RDropConfig(alpha=2.0, likelihood="model"), max_steps=1)
    assert [len(scores) for scores in seen] == [4, 4]
    target = looking_rows().columns["labels"][:4]
    nll = sum(F.cross_entropy(scores, target) for scores in seen) / 2
    kl = symmetric_kl(torch.cat(seen))
    assert logged(trainer, "loss") == [pytest.approx((nll + kl).item(), rel=1e-5)]


def test_a_part_of_flat_patches_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"fraction=0.5 .* pixel_values has 7 rows for 4 rows of"):
        look(tmp_path, RDropConfig(fraction=0.5))


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        ({"input_ids": torch.ones(4, 3), "cache_position": torch.arange(3)}, None),
        ({"input_ids": torch.ones(4, 3), "position_ids": torch.arange(3)[None]}, None),
        ({"input_ids": torch.ones(4, 5), "position_ids": torch.ones(3, 4, 5)}, None),
        ({"input_ids": torch.ones(4, 5), "position_ids": torch.ones(3, 1, 5)}, None),
        ({"input_ids": torch.ones(1, 5), "position_ids": torch.ones(4, 1, 5)}, "4 rows for 1"),
        ({"input_ids": torch.ones(4, 5), "position_ids": torch.ones(2, 4, 5)}, "2 rows for 4"),
        ({"input_ids": torch.ones(4, 3), "scale": torch.tensor(2.0), "name": "x"}, None),
        ({"input_ids": torch.ones(4, 3), "edges": torch.ones(2, 9)}, "edges has 2 rows for 4"),
        (
            {"input_ids": torch.ones(1, 3), "position_ids": torch.tensor([[0, 1, 0]])},
            "its one row may hold several documents",
        ),
        (
            {
                "input_ids": torch.ones(1, 3),
                "position_ids": torch.tensor([[0, 1, 0]]),
                "cu_seq_lens_q": torch.tensor([0, 2, 3]),
            },
            None,
        ),
        (
            {
                "input_ids": torch.ones(1, 3),
                "position_ids": torch.tensor([[0, 1, 0]]),
                "seq_idx": torch.tensor([[0, 0, 1]]),
            },
            "its one row may hold several documents",
        ),
        ({"input_ids": torch.ones(4, 3), "max_length": torch.ones(7)}, "max_length has 7 rows"),
        ({"input_ids": torch.ones(4, 3), "seq_idx": torch.ones(1, 12)}, "seq_idx has 1 rows"),
        ({"input_ids": torch.ones(4, 3), "decoder_cu_seq_lens": torch.tensor([0, 9, 12])}, None),
        (
            {
                "input_ids": torch.ones(1, 3),
                "position_ids": torch.arange(3)[None],
                "attention_mask": torch.ones(1, 3),
            },
            None,
        ),
    ],
)
def test_why_a_batch_cannot_be_stacked(batch, reason):
    found = why_not_stacked(batch, len(batch["input_ids"]))
    assert found is None if reason is None else reason in found


# --- documents that share a row ---------------------------------------------------------------

LENGTHS = [3, 5, 4]


def llama(dropout=0.0):
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=16,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        initializer_range=0.3,
        attention_dropout=dropout,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def packed_row():
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(0, VOCABULARY, (sum(LENGTHS),), generator=generator)
    documents = list(words.split(LENGTHS))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    labels = words.masked_fill(positions == 0, -100)
    row = {"input_ids": words[None], "position_ids": positions[None], "labels": labels[None]}
    return row, documents


def test_documents_of_a_row_do_not_read_each_other(tmp_path, caplog):
    row, documents = packed_row()
    model = llama()
    seen = record_scores(model, "logits")
    options = {"per_device_train_batch_size": 1, "max_steps": 1}
    rows = NamedRows(**row)
    with (
        caplog.at_level(logging.WARNING),
        pytest.warns(UserWarning, match="R-Drop has nothing to compare"),
    ):
        trainer = train(tmp_path, model, rows, RDropConfig(alpha=2.0), **options)
    assert [tuple(scores.shape[:2]) for scores in seen] == [(1, 12), (1, 12)]
    alone = llama().eval()
    with torch.no_grad():
        logits = [alone(document[None]).logits[0] for document in documents]
    torch.testing.assert_close(seen[0][0], torch.cat(logits), rtol=1e-4, atol=1e-4)
    losses = [
        F.cross_entropy(scores[:-1], document[1:], reduction="sum")
        for scores, document in zip(logits, documents, strict=True)
    ]
    expected = sum(losses) / sum(length - 1 for length in LENGTHS)
    assert logged(trainer, "nll") == [pytest.approx(expected.item(), rel=1e-4)]
    assert len([line for line in said(caplog) if "position_ids alone" in line]) == 1


def test_dropout_of_a_packed_row_differs_between_passes(tmp_path):
    row, _ = packed_row()
    model = llama(dropout=0.3)
    seen = record_scores(model, "logits")
    options = {"per_device_train_batch_size": 1, "max_steps": 1}
    trainer = train(tmp_path, model, NamedRows(**row), RDropConfig(alpha=2.0), **options)
    counted = torch.nn.functional.pad(row["labels"][:, 1:], (0, 1), value=-100) != -100
    kl = symmetric_kl(torch.cat(seen), mask=counted)
    assert kl > 0
    assert logged(trainer, "kl") == [pytest.approx(kl.item(), rel=1e-4)]


def test_documents_that_cu_seq_lens_tell_are_stacked(tmp_path, caplog):
    row, _ = packed_row()
    starts = torch.tensor([0, 3, 8, 12], dtype=torch.int32)
    packed = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 5}
    batch = {**row, **packed, "max_length_k": 5}
    model = llama()
    seen, given = record_scores(model, "logits"), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs) if module.training else None,
        with_kwargs=True,
    )
    options = {"per_device_train_batch_size": 1, "max_steps": 1, **KEPT}
    further = {"data_collator": lambda samples: batch}
    with (
        caplog.at_level(logging.WARNING),
        pytest.warns(UserWarning, match="R-Drop has nothing to compare"),
    ):
        trainer = train(
            tmp_path, model, NamedRows(**row), RDropConfig(), further=further, **options
        )
    assert said(caplog) == []
    assert [tuple(scores.shape[:2]) for scores in seen] == [(2, 12)]
    expected = torch.tensor([0, 3, 8, 12, 15, 20, 24], dtype=torch.int32)
    assert torch.equal(given[0]["cu_seq_lens_q"], expected)
    assert torch.equal(given[0]["cu_seq_lens_k"], expected)
    assert (given[0]["max_length_q"], given[0]["max_length_k"]) == (5, 5)
    inputs = {name: row[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        alone = llama().eval()(**inputs, use_cache=False).logits
    for half in seen[0].chunk(2):
        torch.testing.assert_close(half, alone, rtol=1e-4, atol=1e-4)
    targets = row["labels"][0, 1:]
    nll = F.cross_entropy(alone[0, :-1], targets)
    assert logged(trainer, "nll") == [pytest.approx(nll.item(), rel=1e-4)]
