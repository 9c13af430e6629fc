"""Text from the saved model of a run, line by line."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from regdrop.tasks.common.positions import position_limit
from regdrop.tasks.notices import say_once


def generate_lines(
    folder: Path, lines: Iterable[str], *, batch_size: int = 32, num_beams: int | None = None
) -> Iterator[str]:
    """Generate one line of text for each line, in their order.

    An encoder-decoder gives its output for the line, a language model the line and what follows.

    Args:
        folder: Folder of a saved model that generates, and its tokenizer.
        lines: Lines of text; to an encoder-decoder an empty one gives an empty one.
        batch_size: Lines at a time; a language model takes one.
        num_beams: Number of beams; None for the model's own.

    Raises:
        ValueError: If the folder holds no model that generates.
    """
    if batch_size < 1 or (num_beams is not None and num_beams < 1):
        raise ValueError(
            f"batch_size and num_beams must be at least 1, got {batch_size} and {num_beams}"
        )
    model, tokenizer = _load(folder)
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    options = {} if num_beams is None else {"num_beams": num_beams}
    is_encoder_decoder = model.config.is_encoder_decoder
    generate = partial(_translate if is_encoder_decoder else _continue, model, tokenizer, options)
    remaining = (line.strip() for line in lines)
    while batch := list(islice(remaining, batch_size if is_encoder_decoder else 1)):
        filled = [line for line in batch if line or not is_encoder_decoder]
        texts = iter(generate(filled) if filled else ())
        for line in batch:
            is_given = line or not is_encoder_decoder
            yield next(texts).replace("\n", " ") if is_given else ""


def _load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    from regdrop.tasks.language_modelling.adaptive_input import register

    register()
    try:
        config = AutoConfig.from_pretrained(folder)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        return auto.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} must hold a model that generates text: {error}") from error


def _translate(model: Any, tokenizer: Any, options: dict[str, Any], lines: list[str]) -> list[str]:
    limit = position_limit(model.get_encoder())
    most = min(tokenizer.model_max_length, limit or tokenizer.model_max_length)
    if limit is not None and any(len(ids) > most for ids in tokenizer(lines)["input_ids"]):
        say_once(f"Lines of more than the {most} tokens that the model reads are cut to them")
    # Without a length of its own a tokenizer cuts nothing.
    cut = {} if limit is None else {"max_length": most}
    inputs = tokenizer(lines, padding=True, truncation=True, return_tensors="pt", **cut)
    inputs = inputs.to(model.device)
    with torch.inference_mode():
        tokens = model.generate(**inputs, **options)
    texts: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return texts


def _continue(model: Any, tokenizer: Any, options: dict[str, Any], lines: list[str]) -> list[str]:
    (line,) = lines
    words = [tokenizer.bos_token_id, *tokenizer(line, add_special_tokens=False)["input_ids"]]
    if tokenizer.unk_token_id in words:
        known = tokenizer.get_vocab()
        unknown = [word for word in line.split() if word not in known]
        if unknown:
            say_once(f"Words that the model does not know are left out: {' '.join(unknown)}")
    limit = position_limit(model)
    if limit is not None:
        if len(words) > limit:
            raise ValueError(
                f"a line must have at most {limit - 1} words, which the model has positions for, "
                f"got {len(words) - 1}: {line[:60]!r}"
            )
        # The last word that is generated is not read.
        most = limit - len(words) + 1
        own = model.generation_config.max_new_tokens
        options = {**options, "max_new_tokens": most if own is None else min(own, most)}
    prompt = torch.tensor([words], device=model.device)
    with torch.inference_mode():
        tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return [tokenizer.decode(tokens[0], skip_special_tokens=True)]
