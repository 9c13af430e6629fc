"""Presets of summarisation: the paper's, and small ones for a small machine."""

from dataclasses import replace
from typing import Any

from regdrop.config import RDropConfig
from regdrop.tasks.common.base import TrainingSettings
from regdrop.tasks.summarisation.task import Summarisation

# Lengths count the first and the last token: the paper's are 55 and 140.
CNN_DAILYMAIL = Summarisation(
    name="cnn-dailymail",
    description="BART-large on CNN/DailyMail, by the paper's settings",
    dataset="abisee/cnn_dailymail",
    dataset_config="3.0.0",
    source="article",
    target="highlights",
    model="facebook/bart-large",
    model_config={"dropout": 0.1, "attention_dropout": 0.1},
    min_length=56,
    training=TrainingSettings(
        max_steps=20_000,
        batch_size=32 * 2048,
        gradient_accumulation_steps=32,
        learning_rate=3e-5,
        eval_steps=2_000,
        logging_steps=50,
        lr_scheduler_type="linear",
        warmup_ratio=500 / 20_000,
        weight_decay=0.01,
        max_grad_norm=0.1,
        label_smoothing=0.1,
        mixed_precision="fp16",
    ),
    rdrop=RDropConfig(alpha=0.7),
)


def _bart(width: int, layers: int) -> dict[str, Any]:
    return {
        "model_type": "bart",
        "d_model": width,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        **{f"{side}_layers": layers for side in ("encoder", "decoder")},
        **{f"{side}_ffn_dim": 4 * width for side in ("encoder", "decoder")},
        **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    }


def _small(name: str, title: str, source: str, target: str, steps: int) -> Summarisation:
    return Summarisation(
        name=name,
        description=f"a small BART from scratch on {title}",
        dataset=f"data/{name}",
        source=source,
        target=target,
        model_config=_bart(256, 2),
        vocabulary_size=8_000,
        max_source_length=256,
        max_target_length=64,
        max_length=64,
        validation_num_beams=1,
        length_penalty=1.0,
        training=TrainingSettings(
            max_steps=steps,
            batch_size=4096,
            learning_rate=1e-3,
            eval_steps=max(1, steps // 10),
            logging_steps=max(1, steps // 40),
            lr_scheduler_type="inverse_sqrt",
            warmup_ratio=0.1,
            weight_decay=0.01,
            max_grad_norm=1.0,
            label_smoothing=0.1,
            adam_beta2=0.98,
        ),
        rdrop=RDropConfig(alpha=0.7),
        selection_metric="rougeLsum",
    )


def _part(task: Summarisation, examples: int, source_length: int) -> Summarisation:
    """Return a task on so small a part of its training split that it overfits within minutes."""
    training = replace(
        task.training,
        max_steps=1_000,
        batch_size=1024,
        learning_rate=2e-3,
        eval_steps=100,
        logging_steps=50,
    )
    return replace(
        task,
        name=f"{task.name}-part",
        description=f"{task.description}, {examples:,} training examples",
        train_examples=examples,
        max_source_length=source_length,
        vocabulary_size=2_000,
        model_config=_bart(128, 1),
        training=training,
        rdrop=RDropConfig(alpha=5.0),  # chosen on the validation split
        selection_metric="nll",  # ROUGE of summaries this poor moves up and down by chance
    )


_SCITLDR = _small("scitldr", "SciTLDR (abstracts to one sentence)", "source", "target", 3_000)

PAPER_PRESETS = (CNN_DAILYMAIL,)
SMALL_PRESETS = (
    _small("aeslc", "AESLC (e-mails to their subjects)", "email_body", "subject_line", 5_000),
    _SCITLDR,
    _part(_SCITLDR, 1_000, 128),
)
