import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regdrop import DropoutSource, dropout_rates, find_dropout


def rates(model):
    return {source.name: (source.kind, source.rate) for source in find_dropout(model)}


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        return x


class FunctionalDropout(nn.Module):
    """A block that keeps its rates as numbers, as most attention layers do."""

    def __init__(self):
        super().__init__()
        self.attention_dropout = 0.2
        self.hidden_dropout_prob = 0.1

    def forward(self, x):
        return F.dropout(x, self.hidden_dropout_prob, self.training)


class Config:
    def __init__(self, **values):
        self.__dict__.update(values)


@pytest.mark.parametrize(
    "module", [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout]
)
def test_dropout_modules_are_found(module):
    assert rates(nn.Sequential(nn.Linear(2, 2), module(0.25))) == {"1": ("dropout", 0.25)}


class OneNumber(nn.Module):
    """Functional dropout whose rate is kept under any name, as graph networks do."""

    def __init__(self, name, value):
        super().__init__()
        self.name = name
        setattr(self, name, value)

    def forward(self, x):
        return F.dropout(x, getattr(self, self.name), self.training)


@pytest.mark.parametrize(
    "name",
    [
        *("drop", "drop_ratio", "dropout_ratio", "drop_frac", "feat_drop", "input_drop"),
        *("resid_drop", "attn_drop", "hidden_drop", "proj_drop", "weight_drop", "wdrop"),
        *("dropi", "idrop", "drop1", "edge_drop", "drop_edge", "drop_token_rate"),
    ],
)
def test_usual_names_of_rates_are_found_and_can_be_set(name):
    model = nn.Sequential(OneNumber(name, 0.25))
    assert list(rates(model)) == [f"0.{name}"]
    with dropout_rates(model, 0.999):
        assert (model(torch.ones(1000)) == 0).float().mean() > 0.9
    assert getattr(model[0], name) == 0.25


@pytest.mark.parametrize("name", ["drop_path", "path_drop", "drop_connect_rate"])
def test_rates_of_whole_paths_are_told_by_their_names(name):
    assert rates(OneNumber(name, 0.25)) == {name: ("stochastic depth", 0.25)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("drop_last", True), ("drop_last", 0.5), ("drop", 1), ("drop", 7.0), ("edge_drop", 1)],
        *[("dropped", 0.5), ("n_drop", 0.5), ("drop_count", 0.5), ("lr_drop", 0.1)],
        *[("loss_drop", 0.5), ("backdrop", 0.5), ("drop_threshold", 0.5), ("keep_drop", 0.5)],
        ("p", 0.5),
    ],
)
def test_other_numbers_are_no_rates(name, value):
    assert find_dropout(OneNumber(name, value)) == []


@pytest.mark.parametrize("name", ["DropEdge", "PatchDrop", "WeightDrop"])
def test_classes_whose_name_has_the_word_keep_their_rate_as_modules_of_torch_do(name):
    module = type(name, (nn.Module,), {})()
    module.p = 0.25
    assert rates(module) == {"": ("dropout", 0.25)}
    assert rates(OneNumber("p", 0.25)) == {}


def test_a_source_is_active_with_a_rate_in_training_mode():
    model = nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.0))
    assert find_dropout(model.train()) == [
        DropoutSource("0", "dropout", 0.1, True),
        DropoutSource("1", "dropout", 0.0, False),
    ]
    assert [source.active for source in find_dropout(model.eval())] == [False, False]


def test_the_mode_is_that_of_each_module():
    model = nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.1)).train()
    model[0].eval()
    assert [source.active for source in find_dropout(model)] == [False, True]


def test_a_model_without_dropout_has_no_sources():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.LSTM(2, 2))
    assert find_dropout(model) == []


def test_functional_and_attention_dropout_kept_as_numbers():
    assert rates(nn.Sequential(FunctionalDropout())) == {
        "0.attention_dropout": ("attention", 0.2),
        "0.hidden_dropout_prob": ("dropout", 0.1),
    }


def test_torchs_own_attention_and_recurrent_layers():
    model = nn.ModuleDict(
        {
            "mha": nn.MultiheadAttention(4, 2, dropout=0.1),
            "rnn": nn.GRU(4, 4, num_layers=2, dropout=0.3),
            "single": nn.GRU(4, 4, num_layers=1),
        }
    )
    assert rates(model) == {"mha.dropout": ("attention", 0.1), "rnn.dropout": ("dropout", 0.3)}


def test_stochastic_depth_counts():
    assert rates(nn.Sequential(DropPath(0.2))) == {"0": ("stochastic depth", 0.2)}


def test_layerdrop_and_neftune():
    from transformers import BartConfig, BartForSequenceClassification

    config = BartConfig(
        vocab_size=20,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        encoder_layerdrop=0.1,
        decoder_layerdrop=0.2,
    )
    model = BartForSequenceClassification(config)
    found = [s for s in find_dropout(model) if s.kind == "layerdrop"]
    assert sorted(source.rate for source in found) == [0.1, 0.2]

    model.get_input_embeddings().neftune_noise_alpha = 5.0
    assert [s.rate for s in find_dropout(model) if s.kind == "neftune"] == [5.0]


def test_lora_dropout():
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(4, 4))
    config = peft.LoraConfig(target_modules=["0"], lora_dropout=0.05, r=2)
    found = find_dropout(peft.get_peft_model(base, config).train())
    assert [(s.kind, s.rate, s.active) for s in found] == [("lora", 0.05, True)]


@pytest.mark.parametrize(
    ("name", "active"),
    [("BertConfig", True), ("ViTConfig", False), ("LlamaConfig", False), ("GPT2Config", True)],
)
def test_models_of_transformers_are_on_or_off_by_their_own_defaults(name, active):
    import transformers

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    sizes |= {"intermediate_size": 8, "vocab_size": 20, "n_layer": 1, "n_embd": 8, "n_head": 1}
    config = getattr(transformers, name)(**sizes)
    model = transformers.AutoModel.from_config(config).train()
    assert any(source.active for source in find_dropout(model)) is active


@pytest.mark.parametrize("kind", ["dropout", "attention", "none"])
def test_the_sources_of_bert_are_what_makes_passes_differ(kind):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        vocab_size=20,
        hidden_dropout_prob=0.5 if kind == "dropout" else 0.0,
        attention_probs_dropout_prob=0.5 if kind == "attention" else 0.0,
    )
    model = BertModel(config).train()
    x = torch.arange(12).view(2, 6)
    assert any(source.active for source in find_dropout(model)) == (kind != "none")
    assert torch.equal(model(x)[0], model(x)[0]) == (kind == "none")


def test_rates_that_only_the_config_knows_are_listed_once():
    model = nn.Sequential(nn.Dropout(0.1))
    model.config = Config(resid_pdrop=0.3, hidden_dropout=0.1, hidden_size=4, use_dropout=True)
    assert rates(model) == {"0": ("dropout", 0.1), "config.resid_pdrop": ("dropout", 0.3)}


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        find_dropout({})
