"""Where two features of the Trainer meet, each with its right value."""

import pytest
import torch
import torch.nn.functional as F

from models import key_dropout, text_rows, tiny_bert
from regdrop import RDropConfig
from regdrop.loss import ItemCounts
from regdrop.meter import LossMeter
from regdrop.schedule import StepPlan, plan_step
from tiny_batches import tiny_batch
from tiny_models import tiny_model
from training import build, logged, parameters, train

WEIGHTS = (1.0, 5.0, 0.2)
SPLIT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


@pytest.mark.filterwarnings("ignore:.*nothing to compare")
@pytest.mark.parametrize("num_passes", [1, 2])
def test_class_weights_over_an_accumulation_window_are_those_of_one_batch(tmp_path, num_passes):
    """Micro-batches differ in the weight of their labels, so that a mean of means is another."""
    rows = text_rows(8)
    rows.columns["labels"] = torch.tensor([0, 0, 1, 1, 2, 2, 1, 0])
    config = RDropConfig(alpha=0.0, class_weight=WEIGHTS, num_passes=num_passes)
    model = tiny_bert(dropout=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    logits = model.train()(**{k: v for k, v in rows.columns.items() if k != "labels"}).logits
    loss = F.cross_entropy(logits, rows.columns["labels"], weight=torch.tensor(WEIGHTS))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    trainer = build(tmp_path, model, rows, config, max_steps=1, **SPLIT)
    trainer.train()
    assert logged(trainer, "nll")[0] == pytest.approx(loss.item(), rel=1e-5)
    for old, new, gradient in zip(before, parameters(trainer), gradients, strict=True):
        torch.testing.assert_close(new, old - 0.1 * gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*nothing to compare")
@pytest.mark.parametrize("scale", ["mean", "sum"])
def test_the_auxiliary_loss_of_experts_is_whole_with_one_backward_pass(tmp_path, scale):
    """Without dropout both passes are the same, and alpha 0 leaves the model's own gradient."""
    name = "MixtralForCausalLM"
    options = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    model = tiny_model(name, attention_dropout=0.0, **options)
    batch = tiny_batch(model.train(), name)
    own = torch.autograd.grad(model(**batch).loss, list(model.parameters()), allow_unused=True)
    config = RDropConfig(alpha=0.0, backward_passes=1, scale=scale)
    trainer = build(tmp_path, model, text_rows(4), config)
    loss = trainer.compute_loss(model, batch)
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    factor = 2 if scale == "sum" else 1
    for ours, theirs in zip(found, own, strict=True):
        torch.testing.assert_close(ours, None if theirs is None else factor * theirs)


def test_alpha_in_the_log_is_that_of_the_last_step_with_several_passes(tmp_path):
    """Steps between those of every_n_steps have one pass, and their alpha says nothing."""
    config = RDropConfig(alpha=3.0, every_n_steps=2, rescale=False)
    plans = [plan_step(config, step) for step in range(4)]
    trainer = train(tmp_path, tiny_bert(), text_rows(16), config, max_steps=4)
    assert sorted({plan.num_passes for plan in plans}) == [1, 2]
    first = next(i for i, plan in enumerate(plans) if plan.num_passes > 1)
    assert logged(trainer, "alpha") == [0.0] * first + [3.0] * (4 - first)


def test_sums_of_two_processes_are_those_of_both_after_a_checkpoint_between_two_logs():
    plan = StepPlan(num_passes=2, alpha=2.0, factor=1.0)
    processes = [LossMeter(), LossMeter()]
    items = [[(1.0, 0.1, 4), (2.0, 0.2, 2)], [(5.0, 0.5, 1), (3.0, 0.3, 3)]]

    def add(parts, nll, kl, count):
        counts = ItemCounts(torch.tensor(count), torch.tensor(count))
        parts.add(plan, torch.tensor(nll), torch.tensor(kl), counts)

    def over_both(_, reduction):
        assert reduction == "sum"
        return sum(parts._sums for parts in processes)

    for parts, own in zip(processes, items, strict=True):
        add(parts, *own[0])
    state = processes[0].state(over_both)
    processes = [LossMeter(), LossMeter()]
    processes[0].load(state, torch.device("cpu"))
    for parts, own in zip(processes, items, strict=True):
        add(parts, *own[1])
    collected = processes[0].collect(over_both)
    assert collected["nll"] == pytest.approx((4 * 1 + 2 * 2 + 5 * 1 + 3 * 3) / 10)
    assert collected["kl"] == pytest.approx((4 * 0.1 + 2 * 0.2 + 0.5 + 3 * 0.3) / 10)
    assert collected["alpha"] == 2.0


def test_only_the_main_process_takes_up_the_sums_of_a_checkpoint(tmp_path, monkeypatch):
    """They are those of all processes: taken up by each they would count twice."""
    options = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 2, "max_steps": 2}
    rows, config = text_rows(16), RDropConfig(alpha=1.0)
    train(tmp_path, key_dropout(tiny_bert()), rows, config, **options)
    checkpoint = str(tmp_path / "checkpoint-1")
    loaded = {}
    for is_main in (True, False):
        trainer = build(tmp_path, key_dropout(tiny_bert()), rows, config, **options)
        monkeypatch.setattr(type(trainer.accelerator), "is_main_process", is_main)
        trainer.create_optimizer_and_scheduler(2)
        trainer._load_optimizer_and_scheduler(checkpoint)
        trainer.state.global_step = 1
        trainer.begin_training()
        loaded[is_main] = not trainer._meter.is_empty
    assert loaded == {True: True, False: False}
