"""Vocabularies learned from training text by `tokenizers`: pieces of words (BPE), and words."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"


def learn_vocabulary(texts: Iterable[str], *, size: int, lowercase: bool, max_length: int) -> Any:
    """Learn a byte-pair encoding (Sennrich et al. 2016) and return it as a tokenizer.

    Words begin with the mark of their space, so that decoding gives back the text, and punctuation
    stands alone. Every encoded text ends with the end-of-sentence token.

    Args:
        texts: Training text.
        size: Number of tokens, three special ones included.
        lowercase: Whether text is lower-cased first.
        max_length: Tokens to which text is cut where truncation is asked for.

    Returns:
        A `transformers.PreTrainedTokenizerFast`.
    """
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    steps = [normalizers.NFKC(), *([normalizers.Lowercase()] if lowercase else [])]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[PAD, EOS, UNKNOWN], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = (EOS, tokenizer.token_to_id(EOS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[end]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def learn_words(texts: Iterable[str], *, size: int | None) -> Any:
    """Return a tokenizer of the words between spaces, numbered by falling frequency.

    Every encoded text ends with the end-of-sentence token, which is word 0.

    Args:
        texts: Training text.
        size: Number of words, the end-of-sentence token and that of unknown words included; None
            for all that occur.

    Returns:
        A `transformers.PreTrainedTokenizerFast`.
    """
    from collections import Counter

    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    counts = Counter(word for text in texts for word in text.split())
    first = [EOS, *([UNKNOWN] if UNKNOWN not in counts else [])]
    known = [word for word, _ in counts.most_common() if word != EOS]
    words = [*first, *known][:size]
    if UNKNOWN not in words:
        words[-1] = UNKNOWN
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=EOS,
        eos_token=EOS,
        bos_token=EOS,
        unk_token=UNKNOWN,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def find_vocabulary(learn: Callable[[], Any], folder: Path | None) -> Any:
    """Return the tokenizer in a folder, or learn it and leave it there; None keeps nothing."""
    if folder is None:
        return learn()
    from filelock import FileLock
    from transformers import AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    # Runs beside this one may want the same vocabulary at the same time, or remove it.
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not _has_tokenizer(folder):
            _save_whole(learn(), folder)
        return AutoTokenizer.from_pretrained(folder)


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").exists()


def _save_whole(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer in a new folder, which appears whole or not at all."""
    partial_folder = folder.with_name(f"{folder.name}.partial")
    tokenizer.save_pretrained(partial_folder)
    partial_folder.replace(folder)
