"""The Trainer under DDP in two processes on a CPU learns what one process does."""

import sys
from pathlib import Path

import pytest
import torch

from models import text_rows, tiny_bert, tiny_gpt2, token_rows
from regdrop import RDropConfig
from training import build as build_trainer

sys.path.insert(0, str(Path(__file__).parents[1]))

from sharded_runs import assert_same, build, in_one_process, in_two_processes, result

CASES = [
    ("bert", RDropConfig(alpha=3.0)),
    ("bert", RDropConfig(alpha=3.0, likelihood="model")),
    ("gpt2", RDropConfig(alpha=3.0, likelihood="model")),
]


def all_cases(folder):
    return [result(build(folder, *case, ddp_backend="gloo")) for case in CASES]


@pytest.mark.long
def test_two_processes_learn_what_one_does_also_beside_the_models_own_loss(tmp_path):
    for found, case in zip(in_two_processes(tmp_path, all_cases), CASES, strict=True):
        assert_same(found, in_one_process(tmp_path, *case))


@pytest.mark.parametrize(
    ("model", "rows"), [(tiny_bert, text_rows), (tiny_gpt2, token_rows)], ids=["bert", "gpt2"]
)
def test_an_evaluation_is_a_mean_over_its_own_batch_whatever_all_processes_hold(
    tmp_path, model, rows
):
    trainer = build_trainer(tmp_path, model(), rows(8), RDropConfig(alpha=3.0))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(**batch).loss
        for num_items in (None, torch.tensor(1000)):
            found = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=num_items)
            torch.testing.assert_close(found, expected)
