"""The last layer and the loss in one: the same training as with logits, without them."""

import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainingArguments

from implementations import CPP
from models import Rows
from processes import run_in_two_processes
from regdrop import RDropConfig
from regdrop.integrations.transformers import RDropTrainer, find_head
from regdrop.integrations.transformers.forward.fusing import SMALLEST_FUSED_VOCABULARY
from regdrop.integrations.transformers.forward.last_layer import find_fused_head
from regdrop.integrations.transformers.forward.verify import check_fused_head
from regdrop.loss import cross_entropy_terms
from training import PARTS, arguments, assert_same_outcome, outcome

WORDS = 90
LLAMA = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "head_dim": 8,
    "vocab_size": WORDS,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
    "attention_dropout": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BART = {
    "vocab_size": WORDS,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": 1,
    "init_std": 0.3,
}
T5 = {
    "vocab_size": WORDS,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 16,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": WORDS, "n_positions": 16}
BERT = {k: v for k, v in LLAMA.items() if k not in ("head_dim", "attention_dropout")}
# Class, config, its options; what the logits go through after the layer.
MODELS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**LLAMA, "final_logit_softcapping": 2.0}),
    "cohere": ("CohereForCausalLM", "CohereConfig", {**LLAMA, "logit_scale": 0.25}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {**LLAMA, "logits_scaling": 4.0}),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
    "marian": ("MarianMTModel", "MarianConfig", BART),
    "t5 tied": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**T5, "tie_word_embeddings": False}),
    "bert": ("BertForMaskedLM", "BertConfig", BERT),
}
# The option has another name in newer versions of transformers.
IS_RENAMED = hasattr(TrainingArguments, "activation_checkpointing")
CHECKPOINTING = {"activation_checkpointing" if IS_RENAMED else "gradient_checkpointing": True}
PAIRS = ("bart", "marian", "t5 tied", "t5")


def build(name, **changes):
    torch.manual_seed(4)
    kind, config, options = MODELS[name]
    config = getattr(transformers, config)(**{**options, **changes})
    config._attn_implementation = "eager"
    model = getattr(transformers, kind)(config)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model


def rows(name, size=8):
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(3, WORDS, (size, 7), generator=generator)
    labels = torch.randint(3, WORDS, (size, 5 if name in PAIRS else 7), generator=generator)
    labels[0, 3:] = labels[1, 2] = labels[5] = -100
    return Rows(input_ids=words, attention_mask=torch.ones_like(words), labels=labels)


def trainer_for(folder, name, rdrop, model=None, kind=RDropTrainer, **options):
    defaults = {"per_device_train_batch_size": 4, "learning_rate": 0.05}
    return kind(
        model=build(name) if model is None else model,
        args=arguments(folder, **{**defaults, **options}),
        train_dataset=rows(name),
        eval_dataset=rows(name),
        rdrop=rdrop,
    )


def seen_logits(model):
    """Note the positions whose logits the model computes in training, a forward each."""
    seen = []

    def note(module, args, output):
        if model.training:
            seen.append(output.logits.shape[1])

    model.register_forward_hook(note)
    return seen


def run(folder, name, rdrop, model=None, **options):
    model = build(name) if model is None else model
    seen = seen_logits(model)
    trainer = trainer_for(folder, name, rdrop, model, **options)
    trainer.train()
    return outcome(trainer, PARTS), seen


def assert_same(a, b, tolerance=1e-5):
    (ours, _), (theirs, _) = a, b
    tolerances = {"rtol": tolerance, "atol": tolerance / 10, "log_rtol": 10 * tolerance}
    assert_same_outcome(ours, theirs, **tolerances)


def run_both(folder, name, rdrop, **options):
    fused = run(folder, name, replace(rdrop, fused_linear=True), **options)
    unfused = run(folder, name, replace(rdrop, fused_linear=False), **options)
    assert set(fused[1]) == {1}
    assert set(unfused[1]) == {5 if name in PAIRS else 7}
    return fused, unfused


@pytest.mark.parametrize("name", MODELS)
def test_training_is_that_of_explicit_logits(tmp_path, name):
    fused, unfused = run_both(tmp_path, name, RDropConfig(alpha=2.0))
    assert_same(fused, unfused)
    assert min(fused[0].logs["kl"]) > 1e-5


@pytest.mark.parametrize(
    ("rdrop", "options"),
    [
        (RDropConfig(alpha=2.0, backward_passes=1), {}),
        (RDropConfig(alpha=2.0, fraction=0.5), {}),
        (RDropConfig(alpha=2.0, fraction=0.5, backward_passes=1, scale="sum"), {}),
        (RDropConfig(alpha=2.0, num_passes=3, passes="sequential"), {}),
        (RDropConfig(alpha=2.0, every_n_steps=2, monitor_steps=1, start_step=1), {}),
        (RDropConfig(alpha=2.0, class_weight=tuple(1 + i % 3 for i in range(WORDS))), {}),
        (RDropConfig(alpha=2.0, scale="sum"), {"label_smoothing_factor": 0.2}),
        (
            RDropConfig(alpha=2.0, class_weight=tuple(1 + i % 3 for i in range(WORDS))),
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        ),
        (RDropConfig(alpha=2.0), CHECKPOINTING),
        (RDropConfig(alpha=0.0, num_passes=1, monitor_steps=1), {}),
        pytest.param(RDropConfig(alpha=2.0, impl="cpp"), {}, marks=CPP.marks),
    ],
    ids=str,
)
def test_options_mean_what_they_mean_with_logits(tmp_path, rdrop, options):
    assert_same(*run_both(tmp_path, "gpt2", rdrop, **options))


@pytest.mark.parametrize("name", ["gpt2", "t5 tied", "gemma2"])
def test_autocast_is_that_of_the_layer(tmp_path, name):
    fused, unfused = run_both(tmp_path, name, RDropConfig(alpha=2.0), bf16=True)
    assert_same(fused, unfused, 5e-3)


def test_lora_on_the_body(tmp_path):
    peft = pytest.importorskip("peft")

    def train(fused):
        options = {"target_modules": ["c_attn"], "lora_dropout": 0.2, "fan_in_fan_out": True}
        config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options)
        model = peft.get_peft_model(build("gpt2"), config)
        seen = seen_logits(model.get_base_model())
        rdrop = RDropConfig(alpha=2.0, fused_linear=fused)
        trainer = trainer_for(tmp_path, "gpt2", rdrop, model)
        trainer.train()
        return outcome(trainer, ("loss", "nll", "kl")), seen

    fused, unfused = train(True), train(False)
    assert (set(fused[1]), set(unfused[1])) == ({1}, {7})
    assert_same(fused, unfused)


class LargestTensor(TorchDispatchMode):
    """Note the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("fused", [True, False])
def test_no_tensor_holds_all_logits(tmp_path, fused):
    words = 2000
    model = build("llama", vocab_size=words).train()
    trainer = trainer_for(tmp_path, "llama", RDropConfig(fused_linear=fused), model)
    generator = torch.Generator().manual_seed(0)
    batch = {"input_ids": torch.randint(0, words, (64, 16), generator=generator)}
    batch["labels"] = batch["input_ids"]
    trainer.compute_loss(model, batch)  # the first call compares the model's own loss
    with LargestTensor() as largest:
        trainer.compute_loss(model, batch).backward()
    logits = 2 * 64 * 16 * words
    assert (largest.numel >= logits) is not fused
    assert not fused or largest.numel <= 256 * words


# --- when it is used -------------------------------------------------------------------------


@pytest.mark.parametrize(("fewer", "positions"), [(0, 1), (1, 7)])
def test_auto_leaves_small_vocabularies_alone(tmp_path, fewer, positions):
    model = build("gpt2", vocab_size=SMALLEST_FUSED_VOCABULARY - fewer)
    assert set(run(tmp_path, "gpt2", RDropConfig(alpha=2.0), model)[1]) == {positions}


def test_outputs_that_are_asked_for_have_all_logits(tmp_path):
    model = build("gpt2").train()
    trainer = trainer_for(tmp_path, "gpt2", RDropConfig(fused_linear=True), model)
    batch = dict(rows("gpt2").columns)
    loss, output = trainer.compute_loss(model, batch, return_outputs=True)
    assert output.logits.shape == (16, 7, WORDS)
    assert output.hidden_states is None
    assert loss.requires_grad


def test_evaluation_computes_logits(tmp_path):
    trainer = trainer_for(tmp_path, "gpt2", RDropConfig(fused_linear=True))
    trainer.train()
    output = trainer.predict(rows("gpt2"))
    assert output.predictions.shape == (8, 7, WORDS)
    assert not trainer.model.lm_head._forward_pre_hooks


class DoubledLMHeadModel(transformers.GPT2LMHeadModel):
    """Does more to its logits than anybody can read in its config."""

    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        if labels is not None:
            logits = output.logits[:, :-1].flatten(0, 1)
            output.loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        return output


class WholeLMHeadModel(transformers.GPT2LMHeadModel):
    """Needs the logits of every position."""

    def forward(self, input_ids, **kwargs):
        output = super().forward(input_ids, **kwargs)
        output.logits = output.logits.view(*input_ids.shape, -1)
        return output


class TwiceLMHeadModel(transformers.GPT2LMHeadModel):
    """Calls its last layer for something else too."""

    def forward(self, input_ids, **kwargs):
        self.lm_head(self.transformer.wte(input_ids))
        return super().forward(input_ids, **kwargs)


class FunctionalLMHeadModel(transformers.GPT2LMHeadModel):
    """Multiplies by the weight without calling the layer."""

    def forward(self, input_ids, labels=None, **kwargs):
        hidden = self.transformer(input_ids).last_hidden_state
        logits = nn.functional.linear(hidden, self.lm_head.weight)
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class ScaledLMHeadModel(transformers.GPT2LMHeadModel):
    def __init__(self, config):
        super().__init__(config)
        self.lm_head = ScaledLinear(16, config.vocab_size, bias=False)


class LateBiasLMHeadModel(transformers.GPT2LMHeadModel):
    """Has a bias of its own behind its last layer, which is 0 at first."""

    def __init__(self, config):
        super().__init__(config)
        self.late_bias = nn.Parameter(torch.zeros(config.vocab_size))

    def change(self, logits):
        return logits + self.late_bias

    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = self.change(output.logits)
        if labels is not None:
            logits = output.logits[:, :-1].flatten(0, 1)
            output.loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        return output


class TemperatureLMHeadModel(LateBiasLMHeadModel):
    """Divides by a temperature that is 1 at first."""

    def __init__(self, config):
        super().__init__(config)
        self.late_bias = nn.Parameter(torch.ones(()))

    def change(self, logits):
        return logits / self.late_bias


class DroppedLMHeadModel(LateBiasLMHeadModel):
    """Drops logits, in training alone."""

    def __init__(self, config):
        super().__init__(config)
        del self.late_bias

    def change(self, logits):
        return nn.functional.dropout(logits, 0.3, self.training)


def with_recomputed(recompute, name="weight", bias=False):
    class RecomputedLMHeadModel(transformers.GPT2LMHeadModel):
        """Computes its last layer's weight or bias in a hook, each forward."""

        def __init__(self, config):
            super().__init__(config)
            self.lm_head = nn.Linear(16, config.vocab_size, bias=bias)
            recompute(self.lm_head, name)

    return RecomputedLMHeadModel


def pruned(layer, name):
    prune.random_unstructured(layer, name, 0.4)


class HookedLMHeadModel(transformers.GPT2LMHeadModel):
    """Has an adapter of its last layer in a hook, which begins with nothing."""

    def __init__(self, config):
        super().__init__(config)
        self.down, self.up = nn.Linear(16, 2), nn.Linear(2, config.vocab_size, bias=False)
        nn.init.zeros_(self.up.weight)
        self.lm_head.register_forward_hook(lambda m, args, out: out + self.up(self.down(args[0])))


class WatchedLMHeadModel(transformers.GPT2LMHeadModel):
    """Has somebody read the gradient of its last layer's outputs."""

    def __init__(self, config):
        super().__init__(config)
        self.lm_head.register_full_backward_hook(lambda module, before, after: None)


class Quantised(torch.Tensor):
    """Has no operation but that of its layer, as the tensors of torchao."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.t, torch.Tensor.mT.__get__, torch.mm, torch.matmul):
            raise NotImplementedError(function)
        return super().__torch_function__(function, types, args, kwargs or {})


class QuantisedLMHeadModel(transformers.GPT2LMHeadModel):
    """Has a last layer of torch's own class, whose weight is not."""

    def __init__(self, config):
        super().__init__(config)
        weight = torch.randn(config.vocab_size, 16).as_subclass(Quantised)
        self.lm_head = nn.Linear(16, config.vocab_size, bias=False)
        self.lm_head.weight = nn.Parameter(weight, requires_grad=False)


RECOMPUTED = "the {} of its last layer must be a parameter, got one that each forward computes"
HOOKED = "its last layer must have no forward and no backward hooks"
UNKNOWN = {
    LateBiasLMHeadModel: "its logits depend on late_bias too, behind its last layer",
    TemperatureLMHeadModel: "its logits depend on late_bias too, behind its last layer",
    DroppedLMHeadModel: "its logits are not those of its last layer",
    with_recomputed(pruned): RECOMPUTED.format("weight"),
    with_recomputed(pruned, "bias", bias=True): RECOMPUTED.format("bias"),
    with_recomputed(torch.nn.utils.weight_norm): RECOMPUTED.format("weight"),
    with_recomputed(torch.nn.utils.spectral_norm): RECOMPUTED.format("weight"),
    HookedLMHeadModel: HOOKED,
    WatchedLMHeadModel: HOOKED,
    DoubledLMHeadModel: "its logits are not those of its last layer",
    WholeLMHeadModel: "its forward needs the logits of every position",
    TwiceLMHeadModel: "its forward must call its last layer once, got 2 calls",
    FunctionalLMHeadModel: "its forward must call its last layer once, got 0 calls",
    QuantisedLMHeadModel: "the parameters of its last layer must be plain tensors, got Quantised",
    ScaledLMHeadModel: r"its last layer must be a plain torch\.nn\.Linear, got ScaledLinear",
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_head_that_is_not_understood_is_trained_with_its_logits_and_told_once(tmp_path, kind):
    def train(fused):
        torch.manual_seed(4)
        options = {**GPT2, "vocab_size": SMALLEST_FUSED_VOCABULARY}
        model = kind(transformers.GPT2Config(**options))
        rdrop = RDropConfig(alpha=2.0, fused_linear=fused)
        return run(tmp_path, "gpt2", rdrop, model, remove_unused_columns=False)

    with pytest.warns(UserWarning, match=UNKNOWN[kind]) as caught:
        auto = train("auto")
    assert sum(kind.__name__ in str(warning.message) for warning in caught) == 1
    assert_same(auto, train(False))
    with pytest.raises(ValueError, match=f"fused_linear=True .* {kind.__name__}: {UNKNOWN[kind]}"):
        train(True)


def test_what_acts_behind_the_layer_later_is_seen_then(tmp_path):
    class CooledLMHeadModel(LateBiasLMHeadModel):
        temperature = 1.0

        def change(self, logits):
            return logits / self.temperature

    class Cooling(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            model.temperature = 0.5

    def train(fused):
        torch.manual_seed(4)
        options = {**GPT2, "vocab_size": SMALLEST_FUSED_VOCABULARY}
        model = CooledLMHeadModel(transformers.GPT2Config(**options))
        rdrop = RDropConfig(alpha=2.0, fused_linear=fused)
        trainer = trainer_for(tmp_path, "gpt2", rdrop, model, remove_unused_columns=False)
        trainer.add_callback(Cooling())
        trainer.train()
        return outcome(trainer, PARTS), None

    with pytest.warns(UserWarning, match="its logits are not those of its last layer"):
        auto = train("auto")
    assert_same(auto, train(False))


class Watching(transformers.TrainerCallback):
    """Puts a hook on the last layer once the run has begun, between two looks at it."""

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == 2:
            model.lm_head.register_forward_hook(lambda module, inputs, output: None)


def test_a_layer_that_is_watched_later_on_has_its_logits_from_then_on(tmp_path, caplog):
    def train(fused):
        model = build("gpt2", vocab_size=SMALLEST_FUSED_VOCABULARY)
        rdrop = RDropConfig(alpha=2.0, fused_linear=fused)
        trainer = trainer_for(tmp_path, "gpt2", rdrop, model, max_steps=4)
        trainer.add_callback(Watching())
        trainer.train()
        return outcome(trainer, PARTS), None

    auto = train("auto")
    assert "from this step on the logits are computed" in caplog.text
    assert_same(auto, train(False))
    with pytest.raises(ValueError, match="must have no forward and no backward hooks"):
        train(True)


def test_a_head_of_ones_own_keeps_its_terms(tmp_path):
    class Own(RDropTrainer):
        def rdrop_head(self, model, inputs):
            def terms(*args, **options):
                return cross_entropy_terms(*args, **options)

            return replace(super().rdrop_head(model, inputs), terms=terms, takes_kernel=False)

    with pytest.raises(ValueError, match="its terms must be those of a cross entropy"):
        run(tmp_path, "gpt2", RDropConfig(fused_linear=True), kind=Own)


def test_other_heads_have_no_last_layer_to_take_over(tmp_path):
    model = transformers.BertForTokenClassification(
        transformers.BertConfig(**BERT, num_labels=WORDS)
    )
    with pytest.raises(ValueError, match="BertForTokenClassification: its head is not one"):
        trainer_for(tmp_path, "bert", RDropConfig(fused_linear=True), model).train()


@pytest.mark.parametrize("is_in_place", [False, True])
def test_a_compiled_model_keeps_its_logits(tmp_path, is_in_place):
    model = build("gpt2").train()
    trainer = trainer_for(tmp_path, "gpt2", RDropConfig(fused_linear=True), model)
    compiled = model if is_in_place else torch.compile(model, backend="eager")
    if is_in_place:
        trainer._head(dict(rows("gpt2").columns))  # looked at before there is a graph
        model.compile(backend="eager")
    with pytest.raises(ValueError, match="GPT2LMHeadModel: it is compiled"):
        trainer.compute_loss(compiled, dict(rows("gpt2").columns))


def test_the_check_leaves_the_run_as_it_was():
    model, batch = build("bart").train(), rows("bart").columns
    state = torch.get_rng_state()
    check_fused_head(model, find_head(model, batch))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert not model.lm_head._forward_pre_hooks
    assert not model._forward_hooks


def test_memory_that_runs_out_in_the_check_is_raised():
    """It does not say that the logits of every position are needed."""

    def fill(module, args):
        raise torch.OutOfMemoryError("no memory")

    model, batch = build("gpt2").train(), rows("gpt2").columns
    model.transformer.register_forward_pre_hook(fill)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        check_fused_head(model, find_head(model, batch))


@pytest.mark.parametrize(
    ("name", "scale", "softcap"), [("gemma2", 1.0, 2.0), ("cohere", 0.25, None), ("t5", 1.0, None)]
)
def test_what_follows_the_layer_is_read_from_the_config(name, scale, softcap):
    projection = find_fused_head(build(name)).projection
    assert (projection.scale, projection.softcap) == (scale, softcap)
    assert projection.weight.shape == (WORDS, 16)


# --- several processes -----------------------------------------------------------------------


def plain_dropout(name):
    """Return a model without dropout, whose passes differ by nothing that depends on ranks."""
    if name == "bart":
        return build(name, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
    return build(name, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


class ShiftPass(nn.Module):
    """Adds to the states of the second half of a stacked batch: passes differ without chance."""

    def forward(self, x):
        half = len(x) // 2
        return torch.cat([x[:half], x[half:] * 1.5 + 0.1]) if self.training else x


def shifted(name):
    model = plain_dropout(name)
    if name == "bart":
        layer = model.model.decoder.layers[-1]
        layer.final_layer_norm = nn.Sequential(layer.final_layer_norm, ShiftPass())
    else:
        model.transformer.ln_f = nn.Sequential(model.transformer.ln_f, ShiftPass())
    return model


# What two processes are trained on, one after the other: starting them takes longer than training.
TOGETHER = [
    ("gpt2", {}),
    ("gpt2", {"gradient_accumulation_steps": 2}),
    ("bart", {"ddp_find_unused_parameters": False}),
    ("gpt2", {"ddp_static_graph": True, "ddp_find_unused_parameters": False}),
]


def _worker(rank, folder):
    for i, (name, options) in enumerate(TOGETHER):
        size = 2 // options.get("gradient_accumulation_steps", 1)
        options = {"per_device_train_batch_size": size, "ddp_backend": "gloo", **options}
        result = _train_shifted(folder, name, True, **options)
        if rank == 0:
            torch.save(result, folder / f"{i}.pt")


def _train_shifted(folder, name, fused, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "R-Drop has nothing to compare")
        rdrop = RDropConfig(alpha=2.0, fused_linear=fused)
        return run(folder, name, rdrop, shifted(name), **options)


@pytest.mark.long
def test_two_processes_are_one(tmp_path):
    run_in_two_processes(_worker, tmp_path)
    for i, (name, _) in enumerate(TOGETHER):
        two = torch.load(tmp_path / f"{i}.pt", weights_only=False)
        assert set(two[1]) == {1}
        for fused in (True, False):
            assert_same(two, _train_shifted(tmp_path, name, fused))
