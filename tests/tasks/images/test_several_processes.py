"""Images beyond memory, read by two processes of one run."""

import os
import socket
from io import BytesIO

import datasets
import pytest
import torch
from PIL import Image

from regdrop.tasks.images.splits import load_image_splits


def write_images(folder, damaged=None):
    """Write grey images of 1 to 20, a validation split of four and a test split of four."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])}
    )
    for split, count in (("train", 20), ("validation", 4), ("test", 4)):
        files = []
        for i in range(count):
            file = BytesIO()
            Image.new("L", (8, 8), i + 1).save(file, "PNG")
            content = file.getvalue()
            files.append(content[:40] if (split, i) == damaged else content)
        rows = {
            "image": [{"bytes": x, "path": None} for x in files],
            "label": [0, 1] * (count // 2),
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")


def load_as_rank(rank, port, folder, cache):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), XDG_CACHE_HOME=str(cache))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    read = []
    original = Image.Image.convert

    def convert(image, *args, **kwargs):
        read.append(image.getpixel((0, 0)))
        return original(image, *args, **kwargs)

    Image.Image.convert = convert
    found, options = [], {"mean": [0.0], "std": [1.0], "augmentation": None}
    for _ in range(2):
        try:
            load_image_splits(str(folder), image_size=8, num_channels=1, in_memory=False, **options)
            found.append(read.copy())
        except ValueError as error:
            found.append(str(error))
        read.clear()
    torch.save(found, cache / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def load_in_two(folder, cache):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cache.mkdir()
    torch.multiprocessing.spawn(load_as_rank, (port, folder, cache), nprocs=2)
    return [torch.load(cache / f"{rank}.pt") for rank in range(2)]


@pytest.mark.long
def test_each_of_two_processes_checks_its_half_once_and_both_name_what_one_cannot_read(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write_images(data)
    half = [[*range(first, 21, 2), first, first + 2, first, first + 2] for first in (1, 2)]
    assert load_in_two(data, tmp_path / "cache") == [[half[0], []], [half[1], []]]
    write_images(data, damaged=("test", 1))
    for found in load_in_two(data, tmp_path / "again"):
        assert all(x.startswith("the image in row 1 of split 'test'") for x in found)
