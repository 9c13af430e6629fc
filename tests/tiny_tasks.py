"""The presets of each family on data made up here, cut to runs of seconds."""

from dataclasses import replace

import numpy as np
import torch

from regdrop.tasks import PRESETS
from text_data import WORDS, write_encoder, write_glue, write_rows, write_translation


def tiny_translation(folder, **changes):
    preset = PRESETS["multi30k-de-en"]
    training = replace(
        preset.training,
        max_steps=150,
        batch_size=256,
        learning_rate=1e-2,
        eval_steps=75,
        logging_steps=25,
    )
    config = {**preset.model_config, "d_model": 32, "dropout": 0.1}
    config |= {f"{side}_layers": 1 for side in ("encoder", "decoder")}
    config |= {f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")}
    options = {
        "dataset": str(write_translation(folder / "data")),
        "training": training,
        "model_config": config,
        "vocabulary_size": 80,
        "max_length": 24,
        "rdrop": replace(preset.rdrop, alpha=0.5),
    }
    return replace(preset, **{**options, **changes})


def write_summaries(folder, train=150, test=10):
    """Write texts whose summary is their first two words; tests have a second, wrong one."""
    generator = torch.Generator().manual_seed(0)

    def row(is_train):
        chosen = torch.randint(len(WORDS), (8,), generator=generator).tolist()
        words = [WORDS[i] for i in chosen]
        summary = " ".join(words[:2])
        return {"text": " ".join(words), "summary": [summary] if is_train else ["dog", summary]}

    for name, size in (("train", train), ("validation", test), ("test", test)):
        write_rows(folder / f"{name}.jsonl", [row(name == "train") for _ in range(size)])
    return folder


def tiny_summarisation(folder, **changes):
    preset = PRESETS["aeslc"]
    training = replace(
        preset.training,
        max_steps=120,
        batch_size=200,
        learning_rate=1e-2,
        eval_steps=60,
        logging_steps=20,
    )
    config = {**preset.model_config, "d_model": 32}
    config |= {f"{side}_layers": 1 for side in ("encoder", "decoder")}
    config |= {f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")}
    options = {
        "dataset": str(write_summaries(folder / "data")),
        "source": "text",
        "target": "summary",
        "training": training,
        "model_config": config,
        "vocabulary_size": 60,
        "max_source_length": 20,
        "max_target_length": 10,
        "max_length": 10,
        "no_repeat_ngram_size": 0,
    }
    return replace(preset, **{**options, **changes})


def tiny_understanding(folder, task="cola", kind="bert", **changes):
    preset = PRESETS[f"bert-base-{task}"]
    training = replace(
        preset.training,
        max_steps=100,
        batch_size=16,
        learning_rate=1e-2,
        eval_steps=50,
        logging_steps=5,
    )
    options = {
        "dataset": str(write_glue(folder / "data", task)),
        "model": str(write_encoder(folder / "model", kind, initializer_range=0.2)),
        "training": training,
        "max_length": 32,
    }
    return replace(preset, **{**options, **changes})


def write_text(folder, train=120, test=15):
    """Write lines in which every word is followed by the next one of a list."""
    generator = torch.Generator().manual_seed(0)

    def row():
        start, length = torch.randint(0, 6, (2,), generator=generator).tolist()
        return {"text": " " + " ".join(WORDS[(start + i) % 12] for i in range(length)) + " \n"}

    for name, size in (("train", train), ("validation", test), ("test", test)):
        write_rows(folder / f"{name}.jsonl", [row() for _ in range(size)])
    return folder


def tiny_language_modelling(folder, kind="ptb", **changes):
    preset = PRESETS[kind]
    training = replace(
        preset.training,
        max_steps=60,
        batch_size=4,
        learning_rate=1e-2,
        eval_steps=30,
        logging_steps=10,
    )
    sizes = {"d_model": 16, "ffn_dim": 16, "attention_heads": 2, "num_layers": 1}
    bands = {"cutoffs": [3, 7], "tail_dropout": 0.1} if "adaptive" in kind else {}
    options = {
        "dataset": str(write_text(folder / "data")),
        "training": training,
        "model_config": {**preset.model_config, **sizes, **bands},
        "block_size": 12,
        "context_window": 8,
    }
    return replace(preset, **{**options, **changes})


def write_photographs(root, train=20, test=8):
    """Write a folder of dark and light images."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for name, tone in (("dark", 60), ("light", 190)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.normal(tone, 30, (20, 24, 3)).clip(0, 255).astype("uint8")
                Image.fromarray(pixels).save(folder / f"{i}.jpeg")
    return str(root)


def write_vit(folder):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=8,
        num_labels=5,
    )
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(folder)
    return str(folder)


def tiny_images(folder, **changes):
    preset = PRESETS["vit-base-cifar100-224"]
    training = replace(
        preset.training,
        max_steps=20,
        batch_size=12,
        gradient_accumulation_steps=2,
        learning_rate=0.1,
        eval_steps=10,
        logging_steps=5,
        warmup_ratio=0.1,
    )
    options = {
        "dataset": write_photographs(folder / "data"),
        "model": write_vit(folder / "model"),
        "image_size": None,
        "training": training,
    }
    return replace(preset, **{**options, **changes})
