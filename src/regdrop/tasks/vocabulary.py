"""A joint BPE vocabulary, learned from the training text of both languages by `tokenizers`."""

from collections.abc import Iterable
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
