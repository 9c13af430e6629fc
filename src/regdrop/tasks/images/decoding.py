"""Images of any mode as tensors: eight bits a channel, grey or RGB."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regdrop.tasks.common.notices import say_once

# Splits up to this size are decoded once and kept in memory.
_IN_MEMORY_BYTES = 2**29


def convert_image(image: Any, num_channels: int) -> Any:
    """Return a Pillow image with eight bits a channel, grey or RGB.

    Sixteen bits and floating point keep their range, and what is transparent is white.

    Raises:
        ValueError: For numbers that are neither between 0 and 1 nor of eight or sixteen bits.
    """
    from PIL import Image

    if _is_wide(image):
        array = np.asarray(image, dtype=np.float64)
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high < 2**16):
            raise ValueError(f"its numbers must be from 0 to 65535, got {low:g} to {high:g}")
        is_part = image.mode == "F" and high <= 1
        is_byte = image.mode == "F" and high <= 255
        scale = 255 if is_part else 1 if is_byte else 255 / 65535
        image = Image.fromarray(np.rint(array * scale).astype(np.uint8))
    elif _has_transparency(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("L" if num_channels == 1 else "RGB")


def _is_wide(image: Any) -> bool:
    mode: str = image.mode
    return mode == "F" or mode.startswith("I")


def _has_transparency(image: Any) -> bool:
    return image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info


def say_conversion(where: str, image: Any, num_channels: int) -> None:
    """Say what `convert_image` changes in an image, once for all images of a split."""
    if _is_wide(image):
        say_once(f"{where} has images of more than 8 bits ({image.mode}): scaled to 8")
    elif _has_transparency(image):
        say_once(f"{where} has images with transparency: put on white")
    if num_channels == 1 and not (_is_wide(image) or image.mode in ("1", "L", "LA", "La")):
        say_once(f"{where} has images of mode {image.mode}: made grey, as num_channels is 1")


def to_tensor(image: Any, num_channels: int) -> Tensor:
    """Return a Pillow image as (C, H, W) between 0 and 1."""
    array = np.array(convert_image(image, num_channels))
    pixels = torch.from_numpy(array).reshape(*array.shape[:2], num_channels)
    return pixels.permute(2, 0, 1).float() / 255


def reader(
    where: str, source: Any, column: str, image_size: int, num_channels: int
) -> Callable[[Sequence[int]], Tensor]:
    """Return a function from positions to uint8 images, from memory where they fit."""
    from PIL import Image

    def decode_one(position: int) -> np.ndarray:
        try:
            image = source[int(position)][column]
            if image is None:
                raise ValueError("there is none")
            converted = convert_image(image, num_channels)
            say_conversion(where, image, num_channels)
            return np.array(converted.resize((image_size, image_size)))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"the image in row {position} of {where} cannot be read: {error}"
            ) from error

    def decode(positions: Sequence[int]) -> Tensor:
        arrays = [decode_one(position) for position in positions]
        return (
            torch.from_numpy(np.stack(arrays))
            .reshape(len(arrays), image_size, image_size, num_channels)
            .permute(0, 3, 1, 2)
        )

    if len(source) * num_channels * image_size**2 > _IN_MEMORY_BYTES:
        return decode
    blocks = [
        decode(range(start, min(start + 1000, len(source))))
        for start in range(0, len(source), 1000)
    ]
    pixels = torch.cat(blocks).contiguous()
    return lambda positions: pixels[list(positions)]
