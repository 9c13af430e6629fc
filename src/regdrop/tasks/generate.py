"""Text from the saved model of a run, line by line."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch


def generate_lines(
    folder: Path, lines: Iterable[str], *, batch_size: int = 32, num_beams: int | None = None
) -> Iterator[str]:
    """Generate one line of text for each line, in their order.

    Args:
        folder: Folder of a saved encoder-decoder and its tokenizer.
        lines: Lines of text; an empty one gives an empty one.
        batch_size: Lines at a time.
        num_beams: Number of beams; None for the model's own.

    Raises:
        ValueError: If the folder holds no encoder-decoder.
    """
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    if batch_size < 1 or (num_beams is not None and num_beams < 1):
        raise ValueError(
            f"batch_size and num_beams must be at least 1, got {batch_size} and {num_beams}"
        )
    try:
        model = AutoModelForSeq2SeqLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} must hold an encoder-decoder: {error}") from error
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    options = {} if num_beams is None else {"num_beams": num_beams}
    remaining = iter(lines)
    while batch := [line.strip() for line in islice(remaining, batch_size)]:
        filled = [line for line in batch if line]
        texts: Iterator[str] = iter(())
        if filled:
            inputs = tokenizer(filled, padding=True, truncation=True, return_tensors="pt")
            inputs = inputs.to(model.device)
            with torch.inference_mode():
                tokens = model.generate(**inputs, **options)
            texts = iter(tokenizer.batch_decode(tokens, skip_special_tokens=True))
        for line in batch:
            yield next(texts).replace("\n", " ") if line else ""
