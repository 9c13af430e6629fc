"""Images of any mode as tensors: eight bits a channel, grey or RGB."""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regdrop.tasks.common.shared_work import share_work
from regdrop.tasks.data_sets.folders import cache_folder
from regdrop.tasks.notices import say_once

_logger = logging.getLogger(__name__)

# Splits up to this size are decoded once and kept in memory.
_IN_MEMORY_BYTES = 2**29
_BLOCK = 1000


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


@contextmanager
def named_image(where: str, row: int) -> Iterator[None]:
    """Name the split and the row of an image that cannot be read in the block.

    Raises:
        ValueError: Whatever a damaged file makes of its decoder.
    """
    try:
        yield
    except (ConnectionError, MemoryError):  # not the image's
        raise
    except Exception as error:
        raise ValueError(f"the image in row {row} of {where} cannot be read: {error}") from error


def reader(
    where: str,
    source: Any,
    column: str,
    image_size: int,
    num_channels: int,
    *,
    rows: Sequence[int],
    read_first: bool = True,
    identity: str | None = None,
    in_memory: bool | None = None,
) -> Callable[[Sequence[int]], Tensor]:
    """Return a function from positions to uint8 images, from memory where they fit.

    Args:
        where: The split and its data, in words.
        source: A `datasets.Dataset`.
        column: Its images.
        image_size: Height and width to which they are resized.
        num_channels: 1 for grey, 3 for RGB.
        rows: The row of each of them in its file.
        read_first: Whether those beyond memory are all read before any is used.
        identity: What changes where the images do, so that this is done once for all runs; None if
            it is not known.
        in_memory: Whether all are decoded once and kept. None: if they take at most half a GiB.

    Raises:
        ValueError: For an image that cannot be read, by its row.
    """

    def load(position: int) -> Any:
        with named_image(where, rows[position]):
            image = check_image(source[int(position)][column])
            converted = convert_image(image, num_channels)
            say_conversion(where, image, num_channels)
            return converted

    def decode(positions: Sequence[int]) -> Tensor:
        size = (image_size, image_size)
        arrays = [np.array(load(position).resize(size)) for position in positions]
        return (
            torch.from_numpy(np.stack(arrays))
            .reshape(len(arrays), image_size, image_size, num_channels)
            .permute(0, 3, 1, 2)
        )

    if in_memory is None:
        in_memory = len(source) * num_channels * image_size**2 <= _IN_MEMORY_BYTES
    if not in_memory:
        if read_first:
            kind = None if identity is None else f"{identity} {num_channels}"
            share_work(
                len(rows),
                lambda part: read_once(
                    where, [rows[i] for i in part], lambda i: load(part[i]), kind
                ),
            )
        return decode
    blocks = [
        decode(range(start, min(start + _BLOCK, len(source))))
        for start in range(0, len(source), _BLOCK)
    ]
    pixels = torch.cat(blocks).contiguous()
    return lambda positions: pixels[list(positions)]


def check_image(image: Any) -> Any:
    """Return an image of a data set.

    Raises:
        ValueError: If there is none.
    """
    if image is None:
        raise ValueError("there is none")
    return image


def read_once(
    where: str,
    rows: Sequence[int],
    load: Callable[[int], Any],
    identity: str | None,
    *,
    seconds_between_lines: float = 10.0,
) -> None:
    """Read every image of a split, unless that was done before; say how far it is.

    Args:
        where: The split and its data, in words.
        rows: The row of each of its images in its file.
        load: Reads the image of a position among them, and raises if it cannot be read.
        identity: What changes where the images do; None if it is not known.
        seconds_between_lines: Least time from one line of the log to the next.
    """
    count = len(rows)
    key = hashlib.sha256(repr((where, list(rows), identity)).encode("utf-8", "surrogateescape"))
    done = cache_folder("images-read") / key.hexdigest()
    if identity is not None and done.exists():
        return
    told = time.monotonic()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # decoders leave Python's lock
        for start in range(0, count, _BLOCK):
            end = min(start + _BLOCK, count)
            for _ in pool.map(load, range(start, end)):
                pass
            if time.monotonic() - told > seconds_between_lines:
                told = time.monotonic()
                _logger.warning("%s: %s of %s images checked", where, f"{end:,}", f"{count:,}")
    if identity is not None:
        with suppress(OSError):
            done.parent.mkdir(parents=True, exist_ok=True)
            done.touch()
