"""Noise on the embeddings of every pass but the first, as R3F has it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def embedding_noise(embedding: nn.Module, num_passes: int, std: float) -> Iterator[None]:
    """Add normal noise to what an embedding returns for all items of a stacked batch but pass 0's.

    It acts on the first call in the context alone: the decoder of an encoder-decoder that shares
    its embeddings reads its own words as they are (arXiv 2008.03156). An embedding that scales what
    it returns scales the noise too.

    Args:
        embedding: The module, whose output is a tensor (num_passes * rows, ...). A row need not be
            an item: of multiple choice each choice has its own.
        num_passes: Passes that are stacked.
        std: Standard deviation of the noise.

    Raises:
        ValueError: If the embedding is not called.
    """
    calls = 0
    scale = float(getattr(embedding, "embed_scale", 1.0))

    def add(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        nonlocal calls
        calls += 1
        if calls > 1:
            return None
        rows = output.shape[0] // num_passes
        noise = torch.randn_like(output[rows:]) * (std * scale)
        return torch.cat([output[:rows], output[rows:] + noise])

    hook = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()
    if not calls:
        raise ValueError(
            f"the model must call its embedding ({type(embedding).__name__}) for noise to be "
            "added, which it does not where it is given inputs_embeds"
        )
