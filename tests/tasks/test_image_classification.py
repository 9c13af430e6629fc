from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from regdrop import find_dropout
from regdrop.experiments import build_arms, run_arm
from regdrop.tasks import PRESETS
from regdrop.tasks.classification import classification_statistics, set_dropout
from regdrop.tasks.image_classification import DIGITS, IMAGES, build_augmentation


def test_presets_go_by_their_names():
    assert all(task.name == name for name, task in PRESETS.items())
    assert {"digits", "images"} <= set(PRESETS)


def test_digits_are_a_small_vision_transformer_with_dropout():
    prepared = DIGITS.prepare()
    model = prepared.build_model().train()
    assert model.config.num_hidden_layers == 4
    assert model.config.hidden_size == 64
    assert model.config.num_labels == 10
    active = [source.rate for source in find_dropout(model) if source.active]
    assert set(active) == {0.1}
    batch = torch.utils.data.default_collate([prepared.splits["train"][i] for i in range(3)])
    assert model(**batch).logits.shape == (3, 10)


def test_weights_follow_the_seed():
    prepared = DIGITS.prepare()

    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in prepared.build_model().parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_images_have_the_papers_size_on_the_meta_device():
    """ViT-B/16 at 224 px has 85.8 million parameters without its head (arXiv 2010.11929)."""
    from transformers import AutoModelForImageClassification

    assert (IMAGES.image_size, IMAGES.rdrop.alpha, IMAGES.dropout) == (224, 0.6, 0.1)
    config = AutoConfig.for_model("vit", num_labels=100)
    set_dropout(config, IMAGES.dropout)
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == 85_798_656 + 769 * 100
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0.1


def test_a_checkpoint_is_fine_tuned_with_its_own_normalisation(tmp_path):
    from transformers import ViTImageProcessor

    first = replace(DIGITS, dropout=0.0).prepare().build_model()
    first.save_pretrained(tmp_path)
    ViTImageProcessor(image_mean=[0.2], image_std=[0.3]).save_pretrained(tmp_path)
    task = replace(DIGITS, model=str(tmp_path), model_config={}, dropout=0.2)
    second = task.prepare().build_model()
    for (name, x), y in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(x, y), name
    assert {source.rate for source in find_dropout(second)} == {0.2}
    assert task._normalisation() == ([0.2], [0.3])


def test_a_model_and_a_config_exclude_each_other():
    with pytest.raises(ValueError, match="exactly one of model and model_config"):
        replace(DIGITS, model="somewhere").prepare()
    with pytest.raises(ValueError, match="exactly one of model and model_config"):
        replace(DIGITS, model_config={}).prepare()


def test_a_model_without_dropout_is_refused():
    with pytest.raises(ValueError, match=r"has no dropout rate to set to 0\.1"):
        set_dropout(SimpleNamespace(hidden_size=4), 0.1)


@pytest.mark.parametrize("kind", ["shift", "flip"])
def test_augmentation_keeps_shape_and_range_and_changes_images(kind):
    torch.manual_seed(0)
    images = torch.rand(16, 3, 16, 16)
    changed = build_augmentation(kind, 16)(images)
    assert changed.shape == images.shape
    assert changed.min() >= 0
    assert changed.max() <= 1 + 1e-5
    assert sum(torch.equal(a, b) for a, b in zip(images, changed, strict=True)) <= 2


def test_no_augmentation_and_an_unknown_one():
    assert build_augmentation("none", 8) is None
    with pytest.raises(ValueError, match="augmentation must be 'none', 'shift' or 'flip', got 'x'"):
        build_augmentation("x", 8)


def test_metrics_by_hand():
    logits = np.log([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.5, 0.3, 0.2]]) + 3
    found = DIGITS.figures(
        classification_statistics(SimpleNamespace(predictions=logits, label_ids=[0, 1, 2]))
    )
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["nll"] == pytest.approx(-np.log([0.7, 0.8, 0.2]).mean())


def test_photographs_from_a_folder_fine_tune_a_checkpoint_of_another_size(tmp_path):
    """The `images` preset as `--dataset` and `--model` change it: it learns, on real files."""
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification

    generator = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 8)):
        for name, tone in (("dark", 60), ("light", 190)):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.normal(tone, 30, (20, 24, 3)).clip(0, 255).astype("uint8")
                Image.fromarray(pixels).save(folder / f"{i}.jpeg")
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=8,
        num_labels=5,
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    training = replace(
        IMAGES.training,
        max_steps=20,
        batch_size=12,
        gradient_accumulation_steps=2,
        learning_rate=0.1,
        eval_steps=10,
        logging_steps=5,
    )
    task = replace(
        IMAGES,
        dataset=str(tmp_path / "data"),
        model=str(tmp_path / "model"),
        training=training,
    )
    record = run_arm(task, build_arms(task)["rdrop"], 0, tmp_path / "out")
    assert record.test["accuracy"] > 0.9
    likelihoods = [entry["nll"] for entry in record.history if "nll" in entry]
    assert likelihoods[-1] < 0.5 * likelihoods[0]
    assert min(entry["kl"] for entry in record.history if "kl" in entry) > 0
