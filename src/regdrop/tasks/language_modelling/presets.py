"""Presets of language modelling: the paper's, and small ones for a small machine."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from regdrop.config import RDropConfig
from regdrop.tasks.common.base import TrainingSettings
from regdrop.tasks.language_modelling.task import LanguageModelling


def _decoder(
    width: int, feed_forward: int, heads: int, layers: int, dropout: float
) -> dict[str, Any]:
    """Return a decoder with sinusoidal positions, normalised first (XGLM's class)."""
    return {
        "model_type": "xglm",
        "d_model": width,
        "ffn_dim": feed_forward,
        "attention_heads": heads,
        "num_layers": layers,
        "activation_function": "relu",
        "dropout": dropout,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        # Embeddings of unit variance once they are scaled.
        "init_std": width**-0.5,
    }


def _adaptive(decoder: Mapping[str, Any], cutoffs: Sequence[int], factor: int) -> dict[str, Any]:
    return {
        **decoder,
        "model_type": "adaptive-input",
        "cutoffs": list(cutoffs),
        "band_factor": factor,
    }


# As the authors' script: fairseq's transformer_lm_gpt. 8 GPUs times 16 micro-batches of at most
# 2,000 tokens, into which 3 blocks of 512 fit.
WIKITEXT103 = LanguageModelling(
    name="wikitext103",
    description="Transformer decoder (12 layers, 768 wide) on WikiText-103, by the authors' script",
    dataset="Salesforce/wikitext",
    dataset_config="wikitext-103-v1",
    model_config={
        **_decoder(768, 3072, 12, 12, 0.1),
        "activation_function": "gelu",
        "attention_dropout": 0.1,
    },
    training=TrainingSettings(
        max_steps=50_000,
        batch_size=8 * 16 * 3,
        gradient_accumulation_steps=96,
        learning_rate=5e-4,
        eval_steps=1_000,
        logging_steps=100,
        lr_scheduler_type="inverse_sqrt",
        warmup_ratio=4_000 / 50_000,
        weight_decay=0.01,
        max_grad_norm=0.0,
        adam_beta2=0.98,
        mixed_precision="fp16",
    ),
    rdrop=RDropConfig(alpha=1.0),
)

# As the authors' script: fairseq's transformer_lm_wiki103 (Baevski and Auli's), 8 GPUs times 3
# micro-batches. Theirs without R-Drop has 286,000 steps. Neither sets a rate of dropout, for which
# fairseq's is 0.3. Their cosine begins anew after 286,000 steps, three quarters as high, and has a
# floor of 1e-4; ours is one cosine down to 0.
WIKITEXT103_ADAPTIVE = LanguageModelling(
    name="wikitext103-adaptive",
    description="Adaptive Input Transformer on WikiText-103, by the authors' script but for one "
    "cosine in place of a restarted one, and the paper's dropout of 0.1",
    dataset="Salesforce/wikitext",
    dataset_config="wikitext-103-v1",
    model_config={
        **_adaptive(_decoder(1024, 4096, 8, 16, 0.1), (20_000, 60_000), 4),
        "attention_dropout": 0.1,
        "activation_dropout": 0.1,
        "tail_dropout": 0.2,
    },
    training=TrainingSettings(
        max_steps=320_000,
        batch_size=24,
        gradient_accumulation_steps=24,
        learning_rate=1.0,
        eval_steps=2_000,
        logging_steps=100,
        lr_scheduler_type="cosine",
        warmup_ratio=16_000 / 320_000,
        weight_decay=0.0,
        max_grad_norm=0.1,
        optim="sgd",
        optim_args="momentum=0.99,nesterov=true",
        mixed_precision="fp16",
    ),
    rdrop=RDropConfig(alpha=1.0),
    block_size=3072,
    test_block_size=512,
    context_window=400,
)


def _small(
    name: str, title: str, model_config: Mapping[str, Any], steps: int, **changes: Any
) -> LanguageModelling:
    return LanguageModelling(
        name=name,
        description=f"a small {title}",
        dataset=f"data/{name.split('-')[0]}",
        model_config=model_config,
        training=TrainingSettings(
            max_steps=steps,
            batch_size=32,
            learning_rate=2e-3,
            eval_steps=max(1, steps // 20),
            logging_steps=max(1, steps // 40),
            lr_scheduler_type="inverse_sqrt",
            warmup_ratio=0.1,
            weight_decay=0.01,
            max_grad_norm=1.0,
            adam_beta2=0.98,
        ),
        rdrop=RDropConfig(alpha=1.0),
        block_size=64,
        context_window=32,
        **changes,
    )


def _part(task: LanguageModelling, words: int) -> LanguageModelling:
    """Return a task on so small a part of its training split that it overfits within minutes."""
    return replace(
        task,
        name=f"{task.name}-part",
        description=f"{task.description}, {words:,} words of it",
        train_words=words,
        # Chosen on the validation split, as is alpha.
        model_config={**task.model_config, "dropout": 0.3},
        training=replace(
            task.training, batch_size=8, learning_rate=4e-3, eval_steps=50, logging_steps=50
        ),
        rdrop=replace(task.rdrop, alpha=8.0),
    )


_DECODER = _decoder(128, 512, 4, 2, 0.1)

# The demo's: the text comes with the package, and a run takes seconds. Rate of dropout, learning
# rate and alpha are chosen on the validation split.
ALICE = LanguageModelling(
    name="alice",
    description="a small Transformer decoder on Alice's Adventures in Wonderland, four chapters",
    dataset="alice",
    model_config=_decoder(128, 512, 4, 2, 0.3),
    training=TrainingSettings(
        max_steps=400,
        batch_size=8,
        learning_rate=8e-3,
        eval_steps=50,
        logging_steps=50,
        lr_scheduler_type="inverse_sqrt",
        warmup_ratio=0.1,
        weight_decay=0.01,
        max_grad_norm=1.0,
        adam_beta2=0.98,
    ),
    rdrop=RDropConfig(alpha=2.0),
    vocabulary_size=735,  # the words that occur twice in the training split
    block_size=32,
    context_window=16,
)

PAPER_PRESETS = (WIKITEXT103, WIKITEXT103_ADAPTIVE)
SMALL_PRESETS = (
    ALICE,
    _small("ptb", "Transformer decoder on the Penn Treebank", _DECODER, 6_000),
    _small("wikitext2", "Transformer decoder on WikiText-2", _DECODER, 12_000),
    _small(
        "ptb-adaptive",
        "Adaptive Input Transformer on the Penn Treebank",
        _adaptive(_DECODER, (2_000, 5_000), 2),
        6_000,
    ),
    _small(
        "wikitext2-adaptive",
        "Adaptive Input Transformer on WikiText-2",
        _adaptive(_DECODER, (4_000, 12_000), 2),
        12_000,
    ),
    _part(_small("ptb", "Transformer decoder on the Penn Treebank", _DECODER, 600), 20_000),
)
