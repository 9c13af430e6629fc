import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    XGLMConfig,
    XGLMForCausalLM,
    set_seed,
)

from regdrop.tasks import PRESETS
from regdrop.tasks.common.initialisation import initialise

WIDTH, WORDS = 64, 400
QUERIES = ("q_proj", "k_proj", "v_proj")


def model_of(kind, **options):
    if kind == "xglm":
        sizes = {"d_model": WIDTH, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4}
        return XGLMForCausalLM(XGLMConfig(vocab_size=WORDS, **sizes, **options))
    sizes = {"d_model": WIDTH, "vocab_size": WORDS, "pad_token_id": 3, "eos_token_id": 1}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_ffn_dim": 128, f"{side}_attention_heads": 4}
    special = {"decoder_start_token_id": 1, "bos_token_id": 1, "forced_eos_token_id": None}
    if kind == "bart":
        return BartForConditionalGeneration(BartConfig(**sizes, **special, **options))
    return MarianMTModel(MarianConfig(**sizes, **special, decoder_vocab_size=WORDS, **options))


def deviation(weight):
    return weight.detach().std().item()


def xavier_bound(weight, gain=1.0):
    return gain * math.sqrt(6 / sum(weight.shape))


@pytest.mark.parametrize("kind", ["marian", "bart", "xglm"])
def test_weights_are_fairseqs(kind):
    torch.manual_seed(0)
    model = model_of(kind)
    assert initialise(model) is model
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    layers = {name: module for name, module in linear.items() if name != "lm_head"}
    assert len(layers) == {"marian": 32, "bart": 32, "xglm": 12}[kind]
    for name, module in layers.items():
        bound = xavier_bound(module.weight, 0.5**0.5 if name[-6:] in QUERIES else 1.0)
        largest = module.weight.abs().max().item()
        assert 0.98 * bound < largest <= bound
        assert deviation(module.weight) == pytest.approx(bound / math.sqrt(3), rel=0.05)  # uniform
        assert not module.bias.any()
    words = model.get_input_embeddings().weight
    assert deviation(words) == pytest.approx(WIDTH**-0.5, rel=0.05)
    assert model.get_output_embeddings().weight is words


@pytest.mark.parametrize("kind", ["marian", "bart"])
def test_the_embedding_of_padding_is_zero(kind):
    model = initialise(model_of(kind))
    words = model.get_input_embeddings().weight
    assert not words[3].any()
    assert words[2].any()


def test_queries_keys_and_values_are_one_matrix_of_torchs_attention():
    """The three are as wide as the one matrix that torch draws by Xavier's rule."""
    attention = nn.MultiheadAttention(WIDTH, 4)
    bound = xavier_bound(attention.in_proj_weight)
    assert attention.in_proj_weight.abs().max().item() == pytest.approx(bound, rel=0.02)
    own = initialise(model_of("marian")).model.encoder.layers[0].self_attn.q_proj.weight
    assert own.abs().max().item() == pytest.approx(bound, rel=0.02)


def test_a_table_of_sinusoids_is_left_as_it_is():
    model = model_of("marian")
    before = model.model.encoder.embed_positions.weight.clone()
    initialise(model)
    torch.testing.assert_close(model.model.encoder.embed_positions.weight, before)


def test_an_output_of_its_own_is_drawn_as_embeddings_are():
    model = initialise(model_of("xglm", tie_word_embeddings=False))
    output, words = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert output is not words
    assert deviation(output) == pytest.approx(WIDTH**-0.5, rel=0.05)


class Vocabulary:
    pad_token_id, eos_token_id, bos_token_id, unk_token_id = 0, 1, 1, 2

    def __len__(self):
        return WORDS


def build(name, **changes):
    task = PRESETS[name]
    task = replace(task, model_config={**task.model_config, **changes})
    if task.family == "summarisation":
        return task._build_model(Vocabulary(), task.build_config(Vocabulary()))
    return task._build_model(Vocabulary())


@pytest.mark.parametrize("name", ["multi30k-de-en", "scitldr-part"])
def test_presets_begin_with_these_weights_by_the_seed(name):
    models = []
    for seed in (0, 0, 1):
        set_seed(seed)
        models.append(build(name))
    weights = [next(w for n, w in m.named_parameters() if "fc1.weight" in n) for m in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert weights[0].abs().max() <= xavier_bound(weights[0])
    query = next(w for n, w in models[0].named_parameters() if "q_proj.weight" in n)
    assert query.abs().max() <= xavier_bound(query, 0.5**0.5)


@pytest.mark.parametrize("name", ["multi30k-de-en", "scitldr-part"])
def test_a_deviation_of_ones_own_keeps_the_librarys_weights(name):
    model = build(name, init_std=0.5)
    weight = next(w for n, w in model.named_parameters() if "fc1.weight" in n)
    assert deviation(weight) == pytest.approx(0.5, rel=0.05)
