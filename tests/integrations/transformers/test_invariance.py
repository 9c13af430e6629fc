"""The update of a step does not depend on how its batch is cut: masks are keyed by sample."""

from dataclasses import replace

import pytest
import torch

from models import (
    image_rows,
    key_dropout,
    text_rows,
    tiny_bert,
    tiny_bert_of,
    tiny_gpt2,
    tiny_vit,
    token_rows,
)
from processes import run_in_two_processes
from regdrop import RDropConfig
from regdrop.integrations.transformers import RDropTrainer
from training import arguments, assert_same_outcome, outcome

CASES = {
    "bert": (tiny_bert, text_rows, 3, None, {}),
    "bert multi-label": (tiny_bert, text_rows, 3, "multi_label_classification", {}),
    "bert regression": (tiny_bert, text_rows, 1, "regression", {}),
    "bert class weights": (tiny_bert, text_rows, 3, None, {"class_weight": (1.0, 5.0, 0.2)}),
    "vit": (tiny_vit, image_rows, 3, None, {}),
    "bert tokens": (tiny_bert_of("ForTokenClassification"), token_rows, 3, None, {}),
    "gpt2": (tiny_gpt2, token_rows, 3, None, {}),
}
ONE_BACKWARD = RDropConfig(alpha=3.0, backward_passes=1)
SEQUENTIAL = RDropConfig(alpha=3.0, passes="sequential")


def train(folder, case, *, size=20, collator=None, config=None, resume=None, **options):
    """Train for two epochs and return what was logged and learned."""
    build, rows, num_labels, problem_type, changes = CASES[case]
    config = RDropConfig(alpha=3.0, **changes) if config is None else config
    trainer = RDropTrainer(
        model=key_dropout(build(num_labels, problem_type, dropout=0.3), config.num_passes),
        args=arguments(
            folder, **{"learning_rate": 0.03, "max_steps": -1, "num_train_epochs": 2, **options}
        ),
        rdrop=config,
        train_dataset=rows(size, num_labels, problem_type),
        data_collator=collator,
    )
    trainer.train(resume_from_checkpoint=resume)
    return outcome(trainer, ("loss", "nll", "kl", "alpha"))


def assert_same(a, b):
    assert_same_outcome(a, b, rtol=1e-6, atol=1e-6, log_rtol=1e-4, least_kl=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("config", [None, ONE_BACKWARD], ids=["both", "one backward"])
def test_accumulation_of_small_batches_is_one_large_batch(tmp_path, case, config):
    if config is not None:
        config = replace(config, **CASES[case][-1])
    # 20 samples: the last window of an epoch is half full.
    whole = train(tmp_path / "a", case, config=config, per_device_train_batch_size=8)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert_same(train(tmp_path / "b", case, config=config, **options), whole)


def test_a_dropout_mask_of_another_pass_changes_the_update(tmp_path):
    """The invariances are not vacuous: masks matter to the update they compare."""
    options = {"per_device_train_batch_size": 8}
    a = train(tmp_path / "a", "bert", **options).parameters
    b = train(tmp_path / "b", "bert", config=RDropConfig(alpha=0.0), **options).parameters
    assert max((x - y).abs().max() for x, y in zip(a, b, strict=True)) > 1e-3


@pytest.mark.parametrize("case", ["bert", "vit", "gpt2"])
@pytest.mark.parametrize("num_passes", [2, 3])
def test_sequential_passes_are_stacked_passes(tmp_path, case, num_passes):
    found = [
        train(
            tmp_path / passes,
            case,
            config=RDropConfig(alpha=3.0, passes=passes, num_passes=num_passes),
            per_device_train_batch_size=8,
        )
        for passes in ("stacked", "sequential")
    ]
    assert_same(*found)


def pad(samples):
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    values = {"input_ids": 70, "attention_mask": 0}
    if batch["labels"].dim() > 1:
        values["labels"] = -100
    for name, value in values.items():
        batch[name] = torch.nn.functional.pad(batch[name], (0, 4), value=value)
    return batch


@pytest.mark.parametrize("case", ["bert", "bert tokens", "gpt2"])
def test_padding_changes_nothing(tmp_path, case):
    options = {"per_device_train_batch_size": 8}
    padded = train(tmp_path / "b", case, collator=pad, **options)
    assert_same(padded, train(tmp_path / "a", case, **options))


@pytest.mark.parametrize(
    "config",
    [
        RDropConfig(alpha=3.0),
        RDropConfig(alpha=3.0, start_step=2, alpha_schedule="linear", alpha_warmup_steps=3),
        RDropConfig(alpha=3.0, every_n_steps=2),
    ],
    ids=["constant", "late ramp", "every second step"],
)
@pytest.mark.parametrize("case", ["bert", "vit"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, case, config):
    options = {
        "config": config,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 4,
    }
    whole = train(tmp_path / "a", case, **options)
    resumed = train(tmp_path / "b", case, resume=str(tmp_path / "a" / "checkpoint-4"), **options)
    for x, y in zip(whole.parameters, resumed.parameters, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    assert resumed.logs["alpha"] == whole.logs["alpha"]


# What two processes are trained on, one after the other: starting them takes longer than training.
TOGETHER = [
    ("bert", None, 1),
    ("bert", SEQUENTIAL, 1),
    ("bert", ONE_BACKWARD, 2),
    ("bert class weights", None, 2),
    ("gpt2", None, 2),
    ("vit", None, 1),
]


def _worker(rank, folder):
    for i, (case, config, accumulation) in enumerate(TOGETHER):
        result = train(
            folder,
            case,
            config=config,
            ddp_backend="gloo",
            size=16,
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
        )
        if rank == 0:
            torch.save(result, folder / f"{i}.pt")


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    run_in_two_processes(_worker, tmp_path)
    for i, (case, config, _) in enumerate(TOGETHER):
        two = torch.load(tmp_path / f"{i}.pt", weights_only=False)
        one = train(tmp_path, case, config=config, per_device_train_batch_size=8, size=16)
        assert_same(two, one)
