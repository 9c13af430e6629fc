"""Every kind of PEFT adapter trains in the Trainer as in a loop by hand, and nothing else does."""

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from torch.nn import functional as F

from models import text_rows, tiny_bert, tiny_gpt2, token_rows
from regdrop import RDropConfig, rdrop_step
from regdrop.diagnostics import warn_without_dropout
from regdrop.integrations.transformers import RDropTrainer
from training import arguments, assert_same_rdrop_run, train

ALPHA = 1.5
LORA = {"target_modules": ["query", "value"], "r": 2, "init_lora_weights": False}


def classifier(config):
    return peft.get_peft_model(tiny_bert(dropout=0.3), config)


def writer(config):
    return peft.get_peft_model(tiny_gpt2(dropout=0.3), config)


def two_adapters():
    config = peft.LoraConfig(task_type="SEQ_CLS", lora_dropout=0.3, **LORA)
    model = classifier(config)
    model.add_adapter("second", config)
    model.set_adapter("second")
    return model


KINDS = {
    "lora": lambda: classifier(peft.LoraConfig(task_type="SEQ_CLS", lora_dropout=0.3, **LORA)),
    "dora": lambda: classifier(
        peft.LoraConfig(task_type="SEQ_CLS", lora_dropout=0.3, use_dora=True, **LORA)
    ),
    "ia3": lambda: classifier(
        peft.IA3Config(task_type="SEQ_CLS", target_modules=["query"], feedforward_modules=[])
    ),
    "prefix of a classifier": lambda: classifier(
        peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    ),
    "prefix of a writer": lambda: writer(
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ),
    "second of two adapters": two_adapters,
    "modules to save": lambda: classifier(
        peft.LoraConfig(task_type="SEQ_CLS", modules_to_save=["classifier", "pooler"], **LORA)
    ),
}


if Version(transformers.__version__) >= Version("5.24"):
    # There PEFT (0.21) takes an encoder for a model that knows no keys of earlier positions.
    del KINDS["prefix of a classifier"]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_a_loop_by_hand(kind, tmp_path):
    model, is_writer = KINDS[kind](), kind == "prefix of a writer"
    rows = token_rows() if is_writer else text_rows()
    config = RDropConfig(alpha=ALPHA)
    trainer = RDropTrainer(model=model, args=arguments(tmp_path), train_dataset=rows, rdrop=config)
    batch = dict(next(iter(trainer.get_train_dataloader())))
    trainer._head(batch)  # the first batch is looked at, in evaluation mode
    model.train()
    torch.manual_seed(3)
    found = trainer.compute_loss(model, dict(batch))
    found.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)

    labels = batch.pop("labels")
    target = F.pad(labels[:, 1:], (0, 1), value=-100) if is_writer else labels
    torch.manual_seed(3)
    expected = rdrop_step(
        lambda inputs: model(**inputs).logits, batch, target, config=config, step=0
    )
    assert expected.kl > 1e-3
    torch.testing.assert_close(found, expected.loss, rtol=1e-6, atol=1e-6)
    model.zero_grad()
    expected.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(trained[name], parameter.grad, rtol=1e-5, atol=1e-6)
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_recomputes_the_same_masks(tmp_path, use_reentrant):
    def run(**options):
        torch.manual_seed(0)
        return train(tmp_path, KINDS["lora"](), text_rows(), RDropConfig(alpha=ALPHA), **options)

    options = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    checkpointed = run(max_steps=3, gradient_checkpointing=True, **options)
    assert_same_rdrop_run(checkpointed, run(max_steps=3))


def test_only_the_active_adapter_learns():
    model = two_adapters()
    names = [name for name, p in model.named_parameters() if p.requires_grad and "lora" in name]
    assert names
    assert all(".second." in name for name in names)


def test_saved_adapter_and_modules_are_those_that_were_trained(tmp_path):
    model = KINDS["modules to save"]()
    rows = text_rows()
    trainer = RDropTrainer(model=model, args=arguments(tmp_path), train_dataset=rows)
    before = model.base_model.model.classifier.modules_to_save["default"].weight.clone()
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = peft.PeftModel.from_pretrained(tiny_bert(dropout=0.3), str(tmp_path / "saved")).eval()
    kept = loaded.base_model.model.classifier.modules_to_save["default"].weight
    assert not torch.equal(kept, before)
    inputs = {name: column for name, column in rows.columns.items() if name != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model.eval()(**inputs).logits)
    assert (tmp_path / "saved" / "rdrop_config.json").exists()


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapter_without_dropout_is_told_the_name_of_its_option(use_dora):
    config = peft.LoraConfig(task_type="SEQ_CLS", lora_dropout=0.0, use_dora=use_dora, **LORA)
    model = peft.get_peft_model(tiny_bert(dropout=0.0), config).train()
    with pytest.warns(UserWarning, match="Set lora_dropout above 0 in the LoraConfig"):
        assert warn_without_dropout(model)
