"""Text from the saved model of a run, line by line."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch


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
    inputs = tokenizer(lines, padding=True, truncation=True, return_tensors="pt").to(model.device)
    with torch.inference_mode():
        tokens = model.generate(**inputs, **options)
    texts: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return texts


def _continue(model: Any, tokenizer: Any, options: dict[str, Any], lines: list[str]) -> list[str]:
    (line,) = lines
    words = [tokenizer.bos_token_id, *tokenizer(line, add_special_tokens=False)["input_ids"]]
    prompt = torch.tensor([words], device=model.device)
    with torch.inference_mode():
        tokens = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return [tokenizer.decode(tokens[0], skip_special_tokens=True)]
