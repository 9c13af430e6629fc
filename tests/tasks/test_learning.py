"""Shrunken copies of the presets learn as fast as torch's own layers do."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch_models import (
    AdaptiveLanguageModel,
    EncoderDecoder,
    ImageClassifier,
    LanguageModel,
    TextClassifier,
    draw_normal,
    draw_xavier,
)
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from regdrop.tasks import PRESETS
from regdrop.tasks.understanding.task import _build_model

WORDS, WIDTH, LENGTH, BATCH, CLASSES = 30, 32, 12, 16, 4
STEPS, WARMUP, LEARNING_RATE = 80, 20, 2e-3
STEPS_OF_DEEP_ONES = 60
# Layers of each side of the checkpoints that presets are fine-tuned from.
DEPTHS = {"bert-base": 12, "roberta-large": 24, "vit-base": 12, "vit-large": 24, "bart-large": 12}
# Settings that do not change the layers.
NOT_OF_LAYERS = ("tail_dropout", "cutoffs", "band_factor", "patch_size")


class Vocabulary:
    pad_token_id, eos_token_id, bos_token_id, unk_token_id = 0, 1, 1, 2

    def __len__(self):
        return WORDS


def shrunk(config):
    """Return a configuration of the same depth, narrow and without dropout."""
    sizes = {
        "init_std": WIDTH**-0.5,  # as the presets have it at their own width
        "d_model": WIDTH,
        "hidden_size": WIDTH,
        "ffn_dim": 2 * WIDTH,
        "intermediate_size": 2 * WIDTH,
        "attention_heads": 4,
        "dropout": 0.0,
    }
    return {
        name: next((size for end, size in sizes.items() if name.endswith(end)), value)
        for name, value in config.items()
    }


def streams(generator):
    """Yield running words, most of which tell the next one."""
    following = torch.randperm(WORDS - 3, generator=generator) + 3
    while True:
        words = [torch.randint(3, WORDS, (BATCH,), generator=generator)]
        for _ in range(LENGTH):
            other = torch.randint(3, WORDS, (BATCH,), generator=generator)
            is_other = torch.rand(BATCH, generator=generator) < 0.2
            words.append(torch.where(is_other, other, following[words[-1] - 3]))
        stream = torch.stack(words, dim=1)
        yield (stream[:, :-1],), stream[:, 1:]


def pairs(generator):
    """Yield such a text twice: the source, and what is to be said again."""
    for _, text in streams(generator):
        yield (text, F.pad(text[:, :-1], (1, 0), value=1)), text


def mislabelled(classes, generator):
    """Return classes a fifth of which are drawn anew, so that no loss can come near 0."""
    others = torch.randint(CLASSES, (BATCH,), generator=generator)
    return torch.where(torch.rand(BATCH, generator=generator) < 0.2, others, classes)


def labelled_words(generator):
    """Yield words, the first of which tells the class."""
    while True:
        words = torch.randint(4, WORDS, (BATCH, LENGTH), generator=generator)
        yield (words,), mislabelled(words[:, 0] % CLASSES, generator)


def labelled_images(*shape):
    """Return what yields noisy images of a pattern for each class."""

    def draw(generator):
        patterns = 2 * torch.randn(CLASSES, *shape, generator=generator)
        while True:
            classes = torch.randint(CLASSES, (BATCH,), generator=generator)
            noise = torch.randn(BATCH, *shape, generator=generator)
            yield (patterns[classes] + noise,), mislabelled(classes, generator)

    return draw


def final_loss(predict, parameters, draw, steps):
    """Train by Adam, and return the mean loss of the last tenth of the steps."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98))
    batches = draw(torch.Generator().manual_seed(0))
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP)
        inputs, target = next(batches)
        loss = F.cross_entropy(predict(*inputs).flatten(0, -2), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    first, last = sum(losses[:2]) / 2, sum(losses[-steps // 10 :]) / (steps // 10)
    assert last < 0.8 * first
    return last


def assert_learns_as_fast(model, predict, reference, draw, steps=STEPS):
    """Check that a model's loss falls as far as the reference's, which itself falls."""
    own = final_loss(predict, model.train().parameters(), draw, steps)
    other = final_loss(reference.train(), reference.parameters(), draw, steps)
    assert own < 1.1 * other


def unlike(presets):
    """Return the presets but those whose shrunken model another one has, too."""
    found = {}
    for preset in presets:
        config = shrunk(preset.model_config)
        kept = {name: config[name] for name in config if name not in NOT_OF_LAYERS}
        found.setdefault(str(sorted(kept.items())), preset.name)
    return list(found.values())


def of_family(family, *, pretrained=False):
    presets = [preset for preset in PRESETS.values() if preset.family == family]
    return [p for p in presets if (getattr(p, "model", None) is not None) == pretrained]


@pytest.mark.slow
@pytest.mark.parametrize("name", unlike(of_family("translation")))
def test_translation_learns_as_fast_as_torchs_layers(name):
    task = replace(PRESETS[name], model_config=shrunk(PRESETS[name].model_config))
    torch.manual_seed(0)
    model = task._build_model(Vocabulary())
    config = model.config
    reference = EncoderDecoder(
        WORDS, WIDTH, config.encoder_layers, config.decoder_layers, "relu", learned=False
    )
    assert_learns_as_fast(model, seq2seq(model), draw_xavier(reference), pairs)


@pytest.mark.slow
@pytest.mark.parametrize("name", unlike(of_family("summarisation")))
def test_summarisation_from_scratch_learns_as_fast_as_torchs_layers(name):
    task = replace(PRESETS[name], model_config=shrunk(PRESETS[name].model_config))
    torch.manual_seed(0)
    model = task._build_model(Vocabulary(), task.build_config(Vocabulary()))
    config = model.config
    reference = EncoderDecoder(
        WORDS, WIDTH, config.encoder_layers, config.decoder_layers, "gelu", learned=True
    )
    assert_learns_as_fast(model, seq2seq(model), draw_xavier(reference), pairs)


@pytest.mark.slow
@pytest.mark.parametrize("name", unlike(of_family("language-modelling")))
def test_language_models_learn_as_fast_as_torchs_layers(name):
    config = shrunk(PRESETS[name].model_config)
    if "cutoffs" in config:
        config |= {"cutoffs": [8, 20], "band_factor": 2}
    task = replace(PRESETS[name], model_config=config)
    torch.manual_seed(0)
    model = task._build_model(Vocabulary())
    config = model.config
    if "adaptive" in name:
        reference = AdaptiveLanguageModel(config)
    else:
        reference = LanguageModel(WORDS, WIDTH, config.num_layers, config.activation_function)
    assert_learns_as_fast(model, lambda ids: model(ids).logits, draw_xavier(reference), streams)


@pytest.mark.slow
@pytest.mark.parametrize("name", unlike(of_family("images")))
def test_images_from_scratch_learn_as_fast_as_torchs_layers(name):
    task = replace(PRESETS[name], model_config=shrunk(PRESETS[name].model_config), dropout=0.0)
    size = 2 * task.model_config["patch_size"]
    task = replace(task, image_size=size)
    torch.manual_seed(0)
    model = task._build_model([str(i) for i in range(CLASSES)])
    assert_images_are_learned_as_fast(model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit-base", pytest.param("vit-large", marks=pytest.mark.long)])
def test_pretrained_images_learn_as_fast_as_torchs_layers(kind, tmp_path):
    """From a checkpoint of the published depth, narrow and drawn anew, at another image size."""
    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTHS[kind],
        num_attention_heads=4,
        intermediate_size=2 * WIDTH,
        image_size=16,
        patch_size=4,
    )
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(tmp_path)
    preset = PRESETS[f"{kind}-cifar100"]
    task = replace(preset, model=str(tmp_path), image_size=8, dropout=0.0)
    torch.manual_seed(0)
    assert_images_are_learned_as_fast(task._build_model([str(i) for i in range(CLASSES)]))


def assert_images_are_learned_as_fast(model):
    config = model.config
    patches = (config.image_size // config.patch_size) ** 2
    reference = ImageClassifier(
        config.num_channels, config.patch_size, patches, WIDTH, config.num_hidden_layers, CLASSES
    )
    draw = labelled_images(config.num_channels, config.image_size, config.image_size)
    assert_learns_as_fast(
        model, lambda x: model(x).logits, draw_normal(reference), draw, STEPS_OF_DEEP_ONES
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["bert-base", pytest.param("roberta-large", marks=pytest.mark.long)]
)
def test_pretrained_encoders_learn_as_fast_as_torchs_layers(kind, tmp_path):
    config_class, model_class = {
        "bert-base": (BertConfig, BertForSequenceClassification),
        "roberta-large": (RobertaConfig, RobertaForSequenceClassification),
    }[kind]
    config = config_class(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=DEPTHS[kind],
        num_attention_heads=4,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model_class(config).save_pretrained(tmp_path)
    task = replace(PRESETS[f"{kind}-cola"], model=str(tmp_path), dropout=0.0, max_length=32)
    config = task._config(str(tmp_path), [str(number) for number in range(CLASSES)])
    torch.manual_seed(0)
    model = _build_model(str(tmp_path), config)
    reference = draw_normal(TextClassifier(WORDS, WIDTH, DEPTHS[kind], CLASSES))
    assert_learns_as_fast(
        model, lambda ids: model(ids).logits, reference, labelled_words, STEPS_OF_DEEP_ONES
    )


@pytest.mark.slow
def test_a_pretrained_encoder_decoder_learns_as_fast_as_torchs_layers(tmp_path):
    preset = PRESETS["cnn-dailymail"]
    sizes = {"vocab_size": WORDS, "d_model": WIDTH, "max_position_embeddings": 1100}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": DEPTHS["bart-large"], f"{side}_ffn_dim": 2 * WIDTH}
        sizes |= {f"{side}_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    config = BartConfig(**sizes, **special, decoder_start_token_id=1, forced_eos_token_id=1)
    torch.manual_seed(0)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    task = replace(preset, model=str(tmp_path), model_config=shrunk(preset.model_config))
    model = task._build_model(Vocabulary(), task.build_config(Vocabulary()))
    assert AutoConfig.from_pretrained(tmp_path).dropout != model.config.dropout == 0.0
    layers = DEPTHS["bart-large"]
    reference = EncoderDecoder(WORDS, WIDTH, layers, layers, "gelu", learned=True)
    assert_learns_as_fast(model, seq2seq(model), draw_normal(reference), pairs, STEPS_OF_DEEP_ONES)


def seq2seq(model):
    return lambda source, shifted: model(input_ids=source, decoder_input_ids=shifted).logits
