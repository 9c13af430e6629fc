"""R-Drop together with what else people switch on in the Trainer."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate
from transformers import BertForSequenceClassification, Trainer

from implementations import CPP
from models import key_dropout, text_rows, tiny_bert
from regdrop import RDropConfig, dropout_rates, find_dropout, share_prefix, step_passes
from regdrop.integrations.transformers import RDropTrainer
from regdrop.reading import is_free_to_overwrite, may_overwrite
from training import arguments, assert_same_rdrop_run, build, logged, train


def run(folder, model=None, rdrop=None, kind=RDropTrainer, **options):
    defaults = {"max_steps": 3, "learning_rate": 0.05, "max_grad_norm": 1.0}
    model = tiny_bert(dropout=0.3) if model is None else model
    rdrop = RDropConfig(alpha=2.0) if rdrop is None else rdrop
    return train(folder, model, text_rows(), rdrop, kind, **{**defaults, **options})


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    "rdrop",
    [RDropConfig(alpha=2.0), RDropConfig(alpha=2.0, backward_passes=1)],
    ids=["both", "one"],
)
def test_gradient_checkpointing_recomputes_the_same_masks(tmp_path, use_reentrant, rdrop):
    plain = run(tmp_path, rdrop=rdrop)
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    checkpointed = run(tmp_path, rdrop=rdrop, gradient_checkpointing=True, **options)
    assert_same_rdrop_run(checkpointed, plain)


@pytest.mark.long
def test_compiled_models_train_the_same_and_their_passes_differ(tmp_path):
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    assert min(logged(run(tmp_path, **options), "kl")) > 0
    keyless = {"rdrop": RDropConfig(alpha=0.0), "max_steps": 2}
    with pytest.warns(UserWarning, match="nothing to compare"):
        plain = run(tmp_path, tiny_bert(dropout=0.0), **keyless)
    with pytest.warns(UserWarning, match="nothing to compare"):
        compiled = run(tmp_path, tiny_bert(dropout=0.0), **keyless, **options)
    for x, y in zip(compiled.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_stays_near_float32(tmp_path):
    full = run(tmp_path, key_dropout(tiny_bert(dropout=0.3)))
    mixed = run(tmp_path, key_dropout(tiny_bert(dropout=0.3)), bf16=True)
    assert logged(mixed, "loss") == pytest.approx(logged(full, "loss"), rel=0.05)
    assert logged(mixed, "kl") == pytest.approx(logged(full, "kl"), rel=0.2)
    assert {p.dtype for p in mixed.model.parameters()} == {torch.float32}


def test_float16_autocast_with_a_gradient_scaler_stays_near_float32(tmp_path):
    model = key_dropout(tiny_bert(dropout=0.3)).train()
    trainer = build(tmp_path, model, rdrop=RDropConfig(alpha=2.0))
    batch = torch.utils.data.default_collate([text_rows()[i] for i in range(8)])

    def gradient(dtype):
        model.zero_grad()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = trainer.compute_loss(model, dict(batch))
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        return loss, torch.cat([p.grad.flatten() / 2**10 for p in model.parameters()])

    loss, full = gradient(torch.float32)
    half_loss, half = gradient(torch.float16)
    torch.testing.assert_close(half_loss, loss, rtol=1e-2, atol=1e-2)
    assert (half - full).norm() < 0.02 * full.norm()


def test_a_frozen_trunk_stays_and_its_head_learns(tmp_path):
    model = tiny_bert(dropout=0.3)
    model.bert.requires_grad_(False)
    before = [p.clone() for p in model.parameters()]
    trainer = run(tmp_path, model)
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert changed == [name.startswith("classifier") for name, _ in model.named_parameters()]
    assert min(logged(trainer, "kl")) > 0


def test_lora_without_dropout_is_told_so_by_the_name_of_its_option(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], lora_dropout=0.0)
    model = peft.get_peft_model(tiny_bert(dropout=0.0), config)
    assert not any(source.active for source in find_dropout(model.train()))
    with pytest.warns(UserWarning, match="nothing to compare.*lora_dropout above 0"):
        run(tmp_path, model)


class Normalised(nn.Module):
    """A BatchNorm before the classifier."""

    def __init__(self, classifier):
        super().__init__()
        self.norm, self.classifier = nn.BatchNorm1d(classifier.in_features), classifier

    def forward(self, x):
        return self.classifier(self.norm(x))


@pytest.mark.parametrize("backward_passes", [None, 1])
def test_batch_norm_sees_every_pass_and_monitoring_leaves_it_alone(tmp_path, backward_passes):
    def make():
        model = tiny_bert(dropout=0.3)
        model.classifier = Normalised(model.classifier)
        return model

    rdrop = RDropConfig(alpha=2.0, backward_passes=backward_passes)
    trainer = run(tmp_path, make(), rdrop)
    updates = trainer.model.classifier.norm.num_batches_tracked.item()
    assert updates == 3 * (1 if backward_passes is None else 2)
    single = RDropConfig(alpha=0.0, num_passes=1, monitor_steps=1)
    assert run(tmp_path, make(), single).model.classifier.norm.num_batches_tracked == 3


def test_several_gpus_in_one_process_are_refused(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="one process a GPU, got 2 GPUs in one process"):
        RDropTrainer(model=tiny_bert(), args=args, rdrop=RDropConfig())


class UnderDeepSpeed(RDropTrainer):
    """Believes that DeepSpeed is on."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.is_deepspeed_enabled = True


@pytest.mark.parametrize("changes", [{"passes": "sequential"}, {"backward_passes": 1}])
def test_several_forwards_for_one_backward_are_refused_under_deepspeed(tmp_path, changes):
    build(tmp_path, tiny_bert(), rdrop=RDropConfig(), kind=UnderDeepSpeed)
    with pytest.raises(ValueError, match="DeepSpeed takes one forward for each backward"):
        build(tmp_path, tiny_bert(), rdrop=RDropConfig(**changes), kind=UnderDeepSpeed)


def test_parts_of_a_log_survive_a_resume_in_its_middle(tmp_path):
    options = {"max_steps": 6, "logging_steps": 3, "learning_rate": 1e-3}
    whole = run(tmp_path / "a", save_strategy="steps", save_steps=4, **options)
    trainer = RDropTrainer(
        model=tiny_bert(dropout=0.3),
        args=whole.args,
        train_dataset=text_rows(),
        rdrop=whole.rdrop,
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    for name in ("nll", "kl", "alpha"):
        assert logged(trainer, name) == pytest.approx(logged(whole, name), rel=1e-5)


# --- the gradient over the logits ------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "is_free"),
    [
        (lambda x: nn.functional.linear(x, torch.ones(3, 4)), True),
        (lambda x: nn.functional.linear(x, torch.ones(3, 4)).view(1, 2, 3), True),
        (lambda x: nn.functional.linear(x[None], torch.ones(3, 4), torch.ones(3)), True),
        (lambda x: torch.cat([x * 2, x * 3]), True),
        (lambda x: (x * 2).to(torch.float64), True),
        (lambda x: nn.functional.linear(x, torch.ones(3, 4)).tanh() * 30, True),
        (lambda x: x.tanh(), False),
        (lambda x: x.exp().view(-1), False),
        (lambda x: x.relu(), False),
        (lambda x: x.softmax(-1), False),
        (lambda x: x, False),
        (lambda x: x.detach(), False),
    ],
)
def test_logits_are_overwritten_only_where_no_backward_needs_them(make, is_free):
    x = torch.randn(2, 4, requires_grad=True)
    logits = make(x)
    assert is_free_to_overwrite(logits) is is_free
    if is_free:  # and indeed none does
        expected = torch.autograd.grad(logits.sum(), x, retain_graph=True)[0]
        with torch.no_grad():
            logits.zero_()
        torch.testing.assert_close(torch.autograd.grad(logits.sum(), x)[0], expected)


def test_training_overwrites_logits_and_gives_the_same_model(tmp_path):
    overwritten = []

    class Watching(RDropTrainer):
        takes_kernel = True

        def rdrop_head(self, model, inputs):
            def read(output):
                self.kept = output.logits, output.logits.clone()
                return output.logits

            head = super().rdrop_head(model, inputs)
            return replace(head, outputs=read, takes_kernel=self.takes_kernel)

        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            overwritten.append(not torch.equal(*self.kept))
            return loss

    class Copying(Watching):
        takes_kernel = False

    a, b = run(tmp_path, kind=Watching), run(tmp_path, kind=Copying)
    assert overwritten == [True] * 3 + [False] * 3
    assert_same_rdrop_run(a, b, rtol=1e-6)


class KeepingBert(BertForSequenceClassification):
    """Keeps its logits for somebody else to read."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        self.kept = output.logits if self.keeps_them else output.logits.detach()
        self.copied = output.logits.detach().clone()
        return output


@pytest.mark.parametrize("keeps_them", [True, False])
def test_logits_that_a_model_keeps_stay_readable(tmp_path, keeps_them):
    model = KeepingBert(tiny_bert().config)
    model.keeps_them, seen = keeps_them, []

    class Comparing(RDropTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            seen.append(torch.equal(model.kept, model.copied))
            return loss

    options = {"remove_unused_columns": False}
    train(tmp_path, model, text_rows(), RDropConfig(), Comparing, **options)
    assert all(seen)


@pytest.mark.parametrize("name", ["classifier", ""])
def test_logits_that_a_hook_keeps_stay_readable(tmp_path, name):
    model, kept = tiny_bert(), []

    def keep(module, args, output):
        logits = getattr(output, "logits", output)
        kept.append((logits.detach(), logits.detach().clone()))

    model.get_submodule(name).register_forward_hook(keep)
    train(tmp_path, model, text_rows(), RDropConfig())
    assert all(torch.equal(*pair) for pair in kept)


def test_logits_that_a_hook_of_all_modules_keeps_stay_readable(tmp_path):
    kept = []

    def keep(module, args, output):
        if isinstance(output, torch.Tensor) and output.shape[-1] == 3:
            kept.append((output.detach(), output.detach().clone()))

    hook = torch.nn.modules.module.register_module_forward_hook(keep)
    try:
        train(tmp_path, tiny_bert(), text_rows(), RDropConfig())
    finally:
        hook.remove()
    assert kept
    assert all(torch.equal(*pair) for pair in kept)


def test_hooks_of_ours_keep_no_logits(tmp_path):
    """With them the gradient overwrites the logits as without."""
    trainer = build(tmp_path, tiny_bert(), text_rows(), RDropConfig())
    batch = default_collate([text_rows()[i] for i in range(4)])
    head = trainer.rdrop_head(trainer.model, batch)
    logits = torch.nn.functional.linear(torch.ones(8, 3), torch.ones(3, 3, requires_grad=True))
    words = "bert.embeddings.word_embeddings"
    with dropout_rates(trainer.model, 0.2), share_prefix(trainer.model, words):
        assert may_overwrite(trainer.model, head, "auto", logits)
    trainer.model.register_forward_hook(lambda module, args, output: None)
    assert not may_overwrite(trainer.model, head, "auto", logits)


@pytest.mark.parametrize("impl", ["auto", "eager"])
def test_a_second_gradient_of_a_loss_is_as_the_first_or_says_what_it_needs(tmp_path, impl):
    """As in ways to keep the gradients of several tasks from each other's."""
    trainer = build(tmp_path, tiny_bert(), text_rows(), RDropConfig(impl=impl))
    batch = default_collate([text_rows()[i] for i in range(4)])
    model = trainer.model.train()
    loss = trainer.compute_loss(model, batch)
    (first,) = torch.autograd.grad(loss, [model.classifier.weight], retain_graph=True)
    if impl == "auto":
        with pytest.raises(RuntimeError, match=r"asked for twice, .* set impl='eager'"):
            torch.autograd.grad(loss, [model.classifier.weight])
        loss, _ = trainer.compute_loss(model, batch, return_outputs=True)
        (first,) = torch.autograd.grad(loss, [model.classifier.weight], retain_graph=True)
    (second,) = torch.autograd.grad(loss, [model.classifier.weight])
    torch.testing.assert_close(first, second)


def test_a_step_computes_the_softmax_of_its_logits_once(tmp_path):
    def softmaxes(steps):
        with torch.profiler.profile() as profiler:
            run(tmp_path, max_steps=steps)
        return sum(event.name == "aten::_log_softmax" for event in profiler.events())

    assert softmaxes(4) - softmaxes(2) == 2


def test_outputs_that_are_asked_for_stay_readable(tmp_path):
    class Reading(RDropTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            if model.training:
                self.seen = outputs.logits, outputs.logits.detach().clone()
            return (loss, outputs) if return_outputs else loss

    trainer = run(tmp_path, kind=Reading)
    assert torch.equal(*trainer.seen)
    assert issubclass(Reading, Trainer)


# --- how the loss is computed -----------------------------------------------------------------


@pytest.mark.parametrize("impl", ["eager", "chunked", CPP])
def test_the_loss_is_computed_as_asked_and_trains_the_same(tmp_path, impl, monkeypatch):
    automatic = run(tmp_path)
    seen = set()
    original = step_passes.rdrop_cross_entropy

    def watched(*args, impl, **kwargs):
        seen.add(impl)
        return original(*args, impl=impl, **kwargs)

    monkeypatch.setattr(step_passes, "rdrop_cross_entropy", watched)
    assert_same_rdrop_run(run(tmp_path, rdrop=RDropConfig(alpha=2.0, impl=impl)), automatic)
    assert seen == {impl}


def test_a_head_without_a_cross_entropy_has_no_kernel_to_choose(tmp_path):
    model = tiny_bert(num_labels=3, problem_type="multi_label_classification")
    rows = text_rows(3, problem_type="multi_label_classification")
    trainer = build(tmp_path, model, rows, RDropConfig(impl="chunked"))
    with pytest.raises(ValueError, match=r"impl='chunked' chooses how .* use impl='auto'"):
        trainer.train()
