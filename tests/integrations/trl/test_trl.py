"""R-Drop in TRL's trainers: their losses and metrics where dropout is off, a loop by hand else."""

import inspect
import re

import pytest
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from regdrop import RDropConfig, rdrop_step, repeat_batch
from regdrop.integrations import trl as ours
from regdrop.integrations.transformers import RDropTrainerMixin
from regdrop.integrations.trl import RDropRewardTrainer, RDropSFTTrainer
from text_data import WORDS, write_tokenizer

ALPHA = 1.5
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} </s>{% endgeneration %}"
    "{% else %}<s> {{ m['content'] }} {% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    loaded.chat_template = TEMPLATE
    return loaded


def sentences(seed, rows=8, least=2):
    generator = torch.Generator().manual_seed(seed)

    def sentence():
        length = int(torch.randint(least, 7, (1,), generator=generator))
        drawn = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        return " ".join(WORDS[i] for i in drawn)

    return [sentence() for _ in range(rows)]


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def data_of(kind):
    questions, answers = sentences(0), sentences(1)
    if kind == "prompt and completion":
        return Dataset.from_dict({"prompt": questions, "completion": answers})
    if kind == "assistant only":
        return Dataset.from_dict({"messages": [*map(chat, questions, answers)]})
    return Dataset.from_dict({"text": questions})


def gpt2(dropout, kind=GPT2LMHeadModel, **options):
    torch.manual_seed(5)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 16}
    rates = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), dropout)
    return kind(GPT2Config(**sizes, **rates, initializer_range=0.3, **options))


def llama(dropout, attention="sdpa"):
    torch.manual_seed(5)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 16}
    config = LlamaConfig(**sizes, **heads, initializer_range=0.3, attention_dropout=dropout)
    return LlamaForCausalLM._from_config(config, attn_implementation=attention)


def arguments(folder, **options):
    common = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "max_length": 16,
    }
    return {"output_dir": str(folder), **common, **options}


def trained(trainer):
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


SETTINGS = {
    "text": {},
    "prompt and completion": {},
    "assistant only": {"assistant_only_loss": True},
    "packing": {"packing": True, "per_device_train_batch_size": 1},
    "label smoothing": {"label_smoothing_factor": 0.1},
}
if Version(transformers.__version__) < Version("5.15"):
    # There TRL's smoothed loss is divided by each micro-batch's own count, not by the window's.
    del SETTINGS["label smoothing"]


@pytest.mark.filterwarnings("ignore:R-Drop has nothing to compare", "ignore:the KL between passes")
@pytest.mark.parametrize(
    ("kind", "is_fused"), [*((kind, False) for kind in SETTINGS), ("text", True), ("packing", True)]
)
def test_without_dropout_loss_gradient_and_metrics_are_those_of_trl(
    kind, is_fused, tokenizer, tmp_path
):
    logs = []
    for trainer_class in (SFTTrainer, RDropSFTTrainer):
        options = {"rdrop": RDropConfig(fused_linear=is_fused)}
        trainer = trainer_class(
            model=llama(0.0) if kind == "packing" else gpt2(0.0),
            args=SFTConfig(**arguments(tmp_path, **SETTINGS[kind])),
            train_dataset=data_of(kind),
            processing_class=tokenizer,
            **(options if trainer_class is RDropSFTTrainer else {}),
        )
        logs.append(trained(trainer))
    before = 0
    for theirs, own in zip(*logs, strict=True):
        tokens, before = theirs["num_tokens"] - before, theirs["num_tokens"]
        # TRL counts the first token of each of the four texts, too, which nobody predicts.
        factor = tokens / (tokens - 4) if kind in ("text", "label smoothing") else 1.0
        for name, expected in (
            ("loss", theirs["loss"] * factor),
            ("nll", theirs["loss"] * factor),
            ("grad_norm", theirs["grad_norm"] * factor),
            ("entropy", theirs["entropy"]),
            ("mean_token_accuracy", theirs["mean_token_accuracy"]),
            ("num_tokens", theirs["num_tokens"]),
        ):
            assert own[name] == pytest.approx(expected, rel=2e-4, abs=2e-4), name
        assert own["kl"] == pytest.approx(0, abs=1e-6)


def loss_of_one_batch(trainer, batch):
    """Return loss and gradients of a batch with the first dropout masks of a seed."""
    model = trainer.model.train()
    trainer._head(batch)  # the first batch is looked at, in evaluation mode
    torch.manual_seed(3)
    loss = trainer.compute_loss(model, batch)
    model.zero_grad()
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("is_packed", [False, True])
def test_one_step_is_that_of_a_loop_by_hand(is_packed, tokenizer, tmp_path):
    trainer = RDropSFTTrainer(
        model=llama(0.3),
        args=SFTConfig(**arguments(tmp_path, packing=is_packed, gradient_checkpointing=False)),
        train_dataset=data_of("text"),
        processing_class=tokenizer,
        rdrop=RDropConfig(alpha=ALPHA),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert ("cu_seq_lens_q" in batch) is is_packed
    found, gradients = loss_of_one_batch(trainer, batch)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    target = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)

    def forward(inputs):
        return trainer.model(**inputs, use_cache=False).logits

    torch.manual_seed(3)
    expected = rdrop_step(forward, inputs, target, config=RDropConfig(alpha=ALPHA), step=0)
    assert expected.kl > 1e-4
    trainer.model.zero_grad()
    expected.loss.backward()
    torch.testing.assert_close(found, expected.loss.detach(), rtol=1e-6, atol=1e-6)
    for own, parameter in zip(gradients, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(own, parameter.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_do_not_see_each_other_in_any_pass(attention, tokenizer, tmp_path):
    trainer = RDropSFTTrainer(
        model=llama(0.3, attention),
        args=SFTConfig(**arguments(tmp_path, packing=True, per_device_train_batch_size=1)),
        train_dataset=data_of("text"),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    first = int(batch["cu_seq_lens_q"][1])
    assert first < batch["input_ids"].shape[1]
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, :first] = 4
    seen = []
    for one in (batch, other):
        head = trainer._head(one)
        torch.manual_seed(3)
        with torch.no_grad():
            seen.append(trainer.model.train()(**repeat_batch(head.inputs)).logits)
    assert not torch.allclose(seen[0][:, :first], seen[1][:, :first])
    torch.testing.assert_close(seen[0][:, first:], seen[1][:, first:], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(seen[0][0], seen[0][1], atol=1e-4)


def test_lora_logs_a_divergence_and_evaluation_is_that_of_trl(tokenizer, tmp_path):
    options = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": False}
    trainer = RDropSFTTrainer(
        model=gpt2(0.0),
        args=SFTConfig(**arguments(tmp_path)),
        train_dataset=data_of("text"),
        eval_dataset=data_of("text"),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.3, **options),
        rdrop=RDropConfig(alpha=ALPHA),
    )
    for log in trained(trainer):
        assert log["kl"] > 0
        assert log["loss"] == pytest.approx(log["nll"] + ALPHA / 2 * log["kl"], rel=1e-3)
    found = trainer.evaluate()
    with torch.no_grad():
        expected = [
            float(SFTTrainer.compute_loss(trainer, trainer.model.eval(), dict(batch)))
            for batch in trainer.get_eval_dataloader()
        ]
    assert found["eval_loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert {"eval_entropy", "eval_mean_token_accuracy"} <= found.keys()


def test_other_losses_of_sft_are_refused_before_the_first_step(tokenizer, tmp_path):
    def build(rdrop=None, loss=None, **options):
        return RDropSFTTrainer(
            model=gpt2(0.3),
            args=SFTConfig(**arguments(tmp_path, **options)),
            train_dataset=data_of("text"),
            processing_class=tokenizer,
            compute_loss_func=loss,
            rdrop=rdrop,
        )

    with pytest.raises(ValueError, match="loss_type must be 'nll', got 'dft'"):
        build(loss_type="dft")
    with pytest.raises(ValueError, match="compute_loss_func must be None"):
        build(loss=lambda outputs, labels, num_items_in_batch: outputs.logits.sum())
    with pytest.raises(ValueError, match="likelihood='model' was asked for"):
        build(rdrop=RDropConfig(likelihood="model")).train()


@pytest.mark.parametrize("name", ["RDropDPOTrainer", "RDropKTOTrainer"])
def test_preference_trainers_are_refused_with_the_reason(name):
    with pytest.raises(ImportError, match="against those of a reference model without dropout"):
        getattr(ours, name)
    with pytest.raises(AttributeError):
        _ = ours.RDropNoTrainer


class OwnDPOTrainer(RDropTrainerMixin, DPOTrainer):
    """What somebody may write who finds no such trainer here."""


def test_preference_trainer_of_ones_own_is_refused_before_the_first_step(tokenizer, tmp_path):
    data = pairs_of_answers().remove_columns("margin").add_column("prompt", sentences(4))
    trainer = OwnDPOTrainer(
        model=gpt2(0.3),
        ref_model=gpt2(0.3),
        args=DPOConfig(**arguments(tmp_path, disable_dropout=False)),
        train_dataset=data,
        processing_class=tokenizer,
    )
    with pytest.raises(ValueError, match=r"must carry a gradient.*no form for preferences"):
        trainer.train()


def pairs_of_answers():
    margins = [0.0, 0.5] * 4
    return Dataset.from_dict({"chosen": sentences(2), "rejected": sentences(3), "margin": margins})


def reward_trainer(folder, tokenizer, kind, dropout, rdrop=None, **options):
    return kind(
        model=gpt2(dropout, GPT2ForSequenceClassification, num_labels=1, pad_token_id=0),
        args=RewardConfig(**arguments(folder, center_rewards_coefficient=0.1, **options)),
        train_dataset=pairs_of_answers(),
        processing_class=tokenizer,
        **({} if rdrop is None else {"rdrop": rdrop}),
    )


@pytest.mark.filterwarnings("ignore:R-Drop has nothing to compare", "ignore:the KL between passes")
def test_reward_without_dropout_is_that_of_trl(tokenizer, tmp_path):
    theirs, own = (
        trained(reward_trainer(tmp_path, tokenizer, kind, 0.0, rdrop, disable_dropout=False))
        for kind, rdrop in ((RewardTrainer, None), (RDropRewardTrainer, RDropConfig(alpha=1.0)))
    )
    names = ("loss", "grad_norm", "accuracy", "margin", "mean_reward", "num_tokens")
    for one, other in zip(own, theirs, strict=True):
        for name in names:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=2e-4), name


def test_reward_has_the_bernoulli_kl_of_the_margin(tokenizer, tmp_path):
    rdrop = RDropConfig(alpha=ALPHA)
    options = {"disable_dropout": False, "gradient_accumulation_steps": 1}
    trainer = reward_trainer(tmp_path, tokenizer, RDropRewardTrainer, 0.3, rdrop, **options)
    batch = next(iter(trainer.get_train_dataloader()))
    found, gradients = loss_of_one_batch(trainer, dict(batch))
    torch.manual_seed(3)
    model, margins, nll = trainer.model, [], 0.0
    for _ in range(2):
        rewards = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        better, worse = rewards.flatten().chunk(2)
        margins.append(better - worse)
        nll += -F.logsigmoid(margins[-1] - batch["margin"]).mean() / 2
        nll += 0.1 * ((better + worse) ** 2).mean() / 2
    a, b = margins
    kl = ((a.sigmoid() - b.sigmoid()) * (a - b) / 2).mean()
    assert kl > 1e-4
    loss = nll + ALPHA / 2 * kl
    torch.testing.assert_close(found, loss.detach(), rtol=1e-6, atol=1e-6)
    model.zero_grad()
    loss.backward()
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_reward_without_active_dropout_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="disable_dropout must be False"):
        reward_trainer(tmp_path, tokenizer, RDropRewardTrainer, 0.3)
    baseline = RDropConfig(alpha=0, num_passes=1)
    assert reward_trainer(tmp_path, tokenizer, RDropRewardTrainer, 0.3, baseline)


# --- what is used of TRL's own ------------------------------------------------------------------


def test_every_private_name_of_trl_that_is_used_is_listed():
    used = set(re.findall(r"self\.(_[a-z]\w*)", inspect.getsource(ours)))
    for kind, names in ours.INTERNALS.items():
        code = inspect.getsource(kind)
        assert set(names) <= {name for name in used if f"self.{name}" in code}
    named = "".join(map(inspect.getsource, ours.INTERNALS))
    in_trl = {name for name in used if re.search(rf"self\.{name}\b.* = ", named)}
    assert in_trl == {name for names in ours.INTERNALS.values() for name in names}


@pytest.mark.parametrize("kind", [RDropSFTTrainer, RDropRewardTrainer])
def test_a_renamed_attribute_of_trl_is_said_when_a_trainer_is_built(kind, monkeypatch):
    theirs = next(name for name in ours.INTERNALS if issubclass(kind, name))
    monkeypatch.setitem(ours.INTERNALS, theirs, ("_metrics", "_of_another_version"))
    with pytest.raises(
        RuntimeError, match=rf"trl .* {theirs.__name__}\._of_another_version, which"
    ):
        kind(None)
