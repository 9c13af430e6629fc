from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from regdrop import find_dropout
from regdrop.experiments import build_arms, run_arm
from regdrop.tasks import PRESETS
from regdrop.tasks.common.classification import classification_statistics, set_dropout
from regdrop.tasks.images.augmentation import augment, build_augmentation
from regdrop.tasks.images.presets import DIGITS
from tiny_tasks import tiny_images, write_photographs

IMAGES = PRESETS["vit-base-cifar100-224"]


def test_presets_go_by_their_names():
    assert all(task.name == name for name, task in PRESETS.items())
    assert {"digits", "vit-base-cifar100"} <= set(PRESETS)


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


@pytest.mark.parametrize(
    ("name", "sizes", "parameters"),
    [
        # ViT-B/16 and L/16 have 85.8 and 303.3 million without their heads (arXiv 2010.11929).
        ("vit-base-cifar100-224", {}, 85_798_656 + 769 * 100),
        ("vit-base-cifar100", {}, 85_798_656 + (24**2 - 14**2) * 768 + 769 * 100),
        (
            "vit-large-imagenet-224",
            {
                "hidden_size": 1024,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "intermediate_size": 4096,
            },
            303_301_632 + 1025 * 1000,
        ),
    ],
)
def test_paper_presets_have_the_papers_sizes_and_settings(name, sizes, parameters):
    from transformers import AutoModelForImageClassification

    preset = PRESETS[name]
    assert (preset.rdrop.alpha, preset.dropout) == (0.6, 0.1)
    assert preset.image_size == (224 if name.endswith("224") else 384)
    assert (preset.training.optim, preset.training.optim_args) == ("sgd", "momentum=0.9")
    assert (preset.training.batch_size, preset.training.max_grad_norm) == (512, 1.0)
    assert preset.training.warmup_ratio * preset.training.max_steps == pytest.approx(500)
    labels = 1000 if preset.streaming else 100
    config = AutoConfig.for_model("vit", num_labels=labels, image_size=preset.image_size, **sizes)
    set_dropout(config, preset.dropout)
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
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


def test_normalisation_is_of_the_checkpoint_that_the_weights_are_of(tmp_path, monkeypatch):
    from transformers import ViTImageProcessor

    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "vit"
    ViTImageProcessor(image_mean=[0.2], image_std=[0.3]).save_pretrained(folder)
    assert replace(DIGITS, model="~/vit", model_config={})._normalisation() == ([0.2], [0.3])
    (tmp_path / "plain").mkdir()
    assert replace(DIGITS, model="~/plain", model_config={})._normalisation() == ([0.5], [0.5])


def test_a_processor_that_cannot_be_read_is_no_reason_for_another_normalisation(
    tmp_path, monkeypatch
):
    import huggingface_hub

    (tmp_path / "preprocessor_config.json").write_text("{")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for model in (str(tmp_path), "nobody/answers"):
        task = replace(DIGITS, model=model, model_config={})
        with pytest.raises(ValueError, match=f"image processor of model '{model}' cannot"):
            task._normalisation()


def test_a_model_and_a_config_exclude_each_other():
    with pytest.raises(ValueError, match="exactly one of model and model_config"):
        replace(DIGITS, model="somewhere").prepare()
    with pytest.raises(ValueError, match="exactly one of model and model_config"):
        replace(DIGITS, model_config={}).prepare()


def test_a_model_without_dropout_is_refused():
    with pytest.raises(ValueError, match=r"has no dropout rate to set to 0\.1"):
        set_dropout(SimpleNamespace(hidden_size=4), 0.1)


@pytest.mark.parametrize("kind", ["shift", "flip", "crop"])
def test_augmentation_keeps_shape_and_range_and_changes_images(kind):
    torch.manual_seed(0)
    images = torch.rand(16, 3, 16, 16)
    changed = build_augmentation(kind, 16)(images)
    assert changed.shape == images.shape
    assert changed.min() >= 0
    assert changed.max() <= 1 + 1e-5
    assert sum(torch.equal(a, b) for a, b in zip(images, changed, strict=True)) <= 2


def test_augmentation_leaves_the_generators_that_draw_dropout_masks(monkeypatch):
    """On a GPU a batch that is read before a step must not seed that step's masks."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.default_generator.manual_seed(0)
    before = torch.get_rng_state()
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    first, again, other = (
        augment(build_augmentation("shift", 16), images, key) for key in ((1,), (1,), (2,))
    )
    assert not seeded
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_no_augmentation_and_an_unknown_one():
    assert build_augmentation("none", 8) is None
    with pytest.raises(ValueError, match=r"augmentation must be .* 'flip' or 'crop', got 'x'"):
        build_augmentation("x", 8)


def test_metrics_by_hand():
    logits = np.log([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.5, 0.3, 0.2]]) + 3
    found = DIGITS.compute_metrics(
        classification_statistics(SimpleNamespace(predictions=logits, label_ids=[0, 1, 2]))
    )
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["nll"] == pytest.approx(-np.log([0.7, 0.8, 0.2]).mean())


def assert_learned(record):
    assert record.test["accuracy"] > 0.9
    likelihoods = [entry["nll"] for entry in record.history if "nll" in entry]
    assert likelihoods[-1] < 0.5 * likelihoods[0]
    assert min(entry["kl"] for entry in record.history if "kl" in entry) > 0


def test_photographs_from_a_folder_fine_tune_a_checkpoint_of_another_size(tmp_path):
    """The paper's preset as `--data` and `--model` change it: it learns, on real files."""
    task = tiny_images(tmp_path)
    assert_learned(run_arm(task, build_arms(task)["rdrop"], 0, tmp_path / "out"))


def test_photographs_are_streamed(tmp_path, monkeypatch):
    from regdrop.tasks.images import streaming as image_stream

    data = write_photographs(tmp_path / "data")
    with pytest.raises(ValueError, match="must have more than the 10,000 images"):
        tiny_images(tmp_path / "few", dataset=data, streaming=True).prepare()
    # No setting of a task: a set of more than ten thousand images would take minutes here.
    monkeypatch.setattr(image_stream, "HELD_OUT_IMAGES", 8)
    # The first images are of one class here: the whole set validates, as the test split does.
    task = tiny_images(tmp_path / "more", dataset=data, streaming=True, augmentation="crop")
    prepared = task.prepare()
    sizes = [sum(1 for _ in prepared.splits[name]) for name in ("validation", "test")]
    assert sizes == [8, 16]

    def epochs():
        labels = [int(item["labels"]) for item in islice(prepared.splits["train"], 64)]
        return labels[:32], labels[32:]

    first, second = epochs()
    assert first != second
    assert sorted(first) == sorted(second)
    assert epochs() == (first, second)
    assert_learned(run_arm(task, build_arms(task)["rdrop"], 0, tmp_path / "out"))


@pytest.mark.parametrize("streaming", [False, True])
def test_an_interrupted_run_goes_on_with_the_same_crops_of_the_same_images(
    tmp_path, monkeypatch, streaming
):
    from regdrop.experiments.running import building
    from regdrop.tasks.images import streaming as image_stream

    class Interrupted(building.TaskTrainer):
        def _save_checkpoint(self, *args, **kwargs):
            super()._save_checkpoint(*args, **kwargs)
            raise KeyboardInterrupt

    # As above.
    monkeypatch.setattr(image_stream, "HELD_OUT_IMAGES", 8)
    task = tiny_images(tmp_path, streaming=streaming, augmentation="crop")
    arm = build_arms(task)["rdrop"]
    whole = run_arm(task, arm, 0, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(building, "TaskTrainer", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_arm(task, arm, 0, tmp_path / "cut")
    resumed = run_arm(task, arm, 0, tmp_path / "cut")
    losses = [[e["loss"] for e in r.history if "loss" in e] for r in (whole, resumed)]
    assert losses[0] == losses[1]
    assert whole.test == resumed.test


def test_crops_of_an_image_differ_by_epoch_and_seed(tmp_path):
    images = tiny_images(tmp_path, augmentation="crop").prepare().splits["train"]
    crops = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        torch.manual_seed(seed)
        images.set_epoch(epoch)
        crops.append(images[3]["pixel_values"])
    assert torch.equal(crops[0], crops[3])
    assert not torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[0], crops[2])


def test_a_checkpoints_positions_are_resized_to_another_image_size(tmp_path):
    from transformers import ViTForImageClassification

    task = tiny_images(tmp_path, image_size=32)
    model = task.prepare().build_model()
    assert model.config.image_size == 32
    own = ViTForImageClassification.from_pretrained(tmp_path / "model")
    kept = dict(own.named_parameters())
    for name, value in model.named_parameters():
        if name.endswith("position_embeddings"):
            assert value.shape == (1, 17, 16)
            assert torch.equal(value[:, 0], kept[name][:, 0])
            # The means of the places stay about where they were.
            torch.testing.assert_close(
                value[:, 1:].mean(1), kept[name][:, 1:].mean(1), atol=0.01, rtol=0.2
            )
        elif "classifier" not in name:
            assert torch.equal(value, kept[name]), name
    batch = torch.randn(2, 3, 32, 32)
    expected = own.eval().vit(batch, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(model.eval().vit(batch).last_hidden_state, expected)


_SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "patch_size": 2}
_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "patch_size": 8,
}


@pytest.mark.parametrize(
    ("kind", "options", "is_resizable"),
    [
        ("swin", _SWIN, True),
        ("convnext", {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2}, True),
        ("deit", {**_VIT, "architectures": ["DeiTForImageClassification"]}, True),
        ("beit", {**_VIT, "use_relative_position_bias": True}, False),
        ("swin", {**_SWIN, "use_absolute_embeddings": True}, True),
    ],
)
def test_another_image_size_is_taken_or_refused_by_name(tmp_path, kind, options, is_resizable):
    from transformers import AutoModelForImageClassification

    from regdrop.tasks.images.models import load_image_model

    config = AutoConfig.for_model(kind, image_size=16, **options)
    own = AutoModelForImageClassification.from_config(config).eval()
    own.save_pretrained(tmp_path)
    if not is_resizable:
        with pytest.raises(ValueError, match="image_size must be the 16 of model"):
            load_image_model(str(tmp_path), AutoConfig.from_pretrained(tmp_path), 32)
        return
    model = load_image_model(str(tmp_path), AutoConfig.from_pretrained(tmp_path), 32).eval()
    assert model.config.image_size == 32
    batch = torch.randn(2, 3, 32, 32)
    is_plain = kind == "convnext"
    interpolation = {} if is_plain else {"interpolate_pos_encoding": True}
    torch.testing.assert_close(model(batch).logits, own(batch, **interpolation).logits)


def test_dropout_reaches_every_rate_of_units_and_else_that_of_paths():
    from transformers import ConvNextConfig, GPT2Config, SwinConfig

    config = GPT2Config()
    set_dropout(config, 0.3)
    assert {config.attn_pdrop, config.embd_pdrop, config.resid_pdrop} == {0.3}
    config = ConvNextConfig()
    set_dropout(config, 0.3)
    assert config.drop_path_rate == 0.3
    config = SwinConfig()
    set_dropout(config, 0.3)
    assert (config.hidden_dropout_prob, config.drop_path_rate) == (0.3, 0.1)


@pytest.mark.slow
def test_efficientnet_lite_is_fine_tuned_and_saved(tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch", reason="the packaged weights")
    from regdrop.experiments.evaluating.evaluate import evaluate
    from regdrop.experiments.running.run import RunPaths, train_run

    preset = PRESETS["efficientnet-cifar10-jpeg"]
    training = replace(preset.training, max_steps=16, batch_size=12, eval_steps=8, logging_steps=4)
    task = replace(
        preset, dataset=write_photographs(tmp_path / "data"), image_size=32, training=training
    )
    model = task.prepare().build_model().train()
    assert [(s.name, s.rate) for s in find_dropout(model) if s.active] == [("dropout", 0.2)]
    assert not any(m.training for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    folder = tmp_path / "run"
    record = train_run(task, build_arms(task)["rdrop"], 1, RunPaths.alone(folder))
    assert record.test["accuracy"] > 0.9
    assert evaluate(folder, "test").metrics == pytest.approx(record.test, rel=1e-4)


def test_bad_settings_are_named(tmp_path):
    for changed, message in (
        (replace(DIGITS, train_examples=20), "neither streaming nor train_examples nor"),
        (replace(DIGITS, streaming=True), "neither streaming nor train_examples nor"),
        (replace(DIGITS, dataset_config="a"), "nor dataset_config applies"),
        (
            replace(IMAGES, model=None, model_config={"model_type": "vit"}, image_size=None),
            "image_size must be given where there is no model",
        ),
        (tiny_images(tmp_path, train_examples=1_000), "train_examples must be between 1 and"),
        (replace(IMAGES, model="./nowhere", image_size=None), "there is no folder './nowhere'"),
    ):
        with pytest.raises(ValueError, match=message):
            changed.prepare()
