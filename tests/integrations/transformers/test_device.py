"""The Trainer on another device than the CPU, emulated here: nothing is left behind."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from accelerator import AwayTensor, accelerator
from models import (
    image_rows,
    text_rows,
    tiny_bert,
    tiny_bert_of,
    tiny_gpt2,
    tiny_vit,
    token_rows,
)
from regdrop import RDropConfig
from regdrop.integrations.transformers import RDropTrainer
from training import Plain, arguments, logged, number_rows

CASES = {
    "classes": (tiny_bert, lambda: text_rows(), {}),
    "several labels": (
        lambda: tiny_bert(3, "multi_label_classification"),
        lambda: text_rows(16, 3, "multi_label_classification"),
        {},
    ),
    "a number": (lambda: tiny_bert(1), lambda: text_rows(16, 1, "regression"), {}),
    "tokens": (tiny_bert_of("ForTokenClassification"), token_rows, {}),
    "words": (tiny_gpt2, lambda: token_rows(), {"fused_linear": False}),
    "images": (tiny_vit, image_rows, {}),
    "unknown, known loss": (
        lambda: Plain(F.cross_entropy),
        lambda: number_rows(torch.arange(16) % 3),
        {},
    ),
    "unknown, own loss": (
        lambda: Plain(lambda logits, labels: F.cross_entropy(logits, labels) ** 2),
        lambda: number_rows(torch.arange(16) % 3),
        {},
    ),
    "the model's": (tiny_bert, lambda: text_rows(), {"likelihood": "model"}),
    "a part": (tiny_bert, lambda: text_rows(), {"fraction": 0.5}),
    "one backward": (tiny_bert, lambda: text_rows(), {"backward_passes": 1}),
    "one after the other": (tiny_bert, lambda: text_rows(), {"passes": "sequential"}),
    "fraternal": (tiny_bert, lambda: text_rows(), {"method": "fraternal"}),
    "noise": (tiny_bert, lambda: text_rows(), {"method": "r3f"}),
    "weights": (tiny_bert, lambda: text_rows(), {"class_weight": (1.0, 2.0, 0.5)}),
}


class OwnLoader(RDropTrainer):
    """Its loader leaves batches where they are, as one does that accelerate has not prepared."""

    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=4, collate_fn=self.data_collator)


def run(folder, kind, case, **options):
    make, rows, rdrop = CASES[case]
    torch.manual_seed(0)
    model, args = make(), arguments(folder, **options)
    assert args.device.type == "cpu"  # it asks once, and forgets what there was before
    with accelerator() as device:
        args.__dict__["_setup_devices"] = device
        trainer = kind(
            model=model,
            args=args,
            train_dataset=rows(),
            eval_dataset=rows(),
            rdrop=RDropConfig(**rdrop),
        )
        trainer.train()
        metrics = trainer.evaluate()
    assert all(isinstance(p, AwayTensor) for p in trainer.model.parameters())
    return trainer, metrics


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_loss(tmp_path, case):
    trainer, metrics = run(tmp_path, RDropTrainer, case, gradient_accumulation_steps=2)
    assert len(logged(trainer, "nll")) == 2
    assert metrics["eval_loss"] > 0


@pytest.mark.parametrize("case", ["classes", "unknown, own loss"])
def test_a_loader_of_ones_own(tmp_path, case):
    trainer, _ = run(tmp_path, OwnLoader, case, gradient_accumulation_steps=2)
    assert len(logged(trainer, "kl")) == 2
