"""What is wrong with data is said by file, split and row before anything is trained."""

import io
import os

import datasets
import numpy as np
import pytest
from PIL import Image

from regdrop.tasks.data_sets import digests
from regdrop.tasks.data_sets.columns import check_texts
from regdrop.tasks.data_sets.digests import data_digests
from regdrop.tasks.data_sets.loading import load_raw_splits
from regdrop.tasks.images.decoding import convert_image, reader
from regdrop.tasks.images.splits import load_image_splits
from text_data import write_rows


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_", ".")).write_bytes(content)
    return folder


def test_a_digest_is_of_content_and_computed_once(tmp_path, cache, monkeypatch):
    data = write(tmp_path / "data", train_csv=b"a\n1\n", test_csv=b"a\n1\n")
    first = data_digests(str(data))
    assert list(first) == ["test.csv", "train.csv"]
    assert first["test.csv"] == first["train.csv"]
    os.utime(data / "train.csv", (1, 1))
    assert data_digests(str(data)) == first
    with monkeypatch.context() as patch:
        patch.setattr(digests, "_BLOCK_BYTES", None)  # nothing is read again
        assert data_digests(str(data)) == first
    (data / "train.csv").write_bytes(b"a\n2\n")
    assert data_digests(str(data))["train.csv"] != first["train.csv"]
    assert data_digests("some/hub-id") == {}


@pytest.mark.parametrize("place", ["", "train/", "data/"])
def test_what_lies_beside_the_data_is_no_part_of_it(tmp_path, place):
    data = tmp_path / "data"
    write_rows(data / place / "train.jsonl", [{"text": "x"}])
    first = data_digests(str(data))
    (data / "runs").mkdir()
    (data / "runs/record.json").write_text("{}")
    (data / "NOTES.md").write_text("hi")
    assert data_digests(str(data)) == first
    assert len(first) == 1
    write_rows(data / place / "train.jsonl", [{"text": "y"}])
    assert data_digests(str(data)) != first


def test_changed_data_of_the_same_time_and_size_is_read_again(tmp_path):
    data = tmp_path / "data"
    write_rows(data / "train.jsonl", [{"text": "old"}])
    os.utime(data / "train.jsonl", (10**9, 10**9))
    assert load_raw_splits(str(data))["train"]["text"][:] == ["old"]
    write_rows(data / "train.jsonl", [{"text": "new"}])
    os.utime(data / "train.jsonl", (10**9, 10**9))
    assert load_raw_splits(str(data))["train"]["text"][:] == ["new"]


@pytest.mark.parametrize("name", ["a[1-2]b", "res[x]", "what?", "a*"])
def test_a_path_is_no_pattern(tmp_path, name):
    write_rows(tmp_path / name / "train.jsonl", [{"text": "x"}])
    assert load_raw_splits(str(tmp_path / name))["train"]["text"][:] == ["x"]
    for split in ("train", "test"):
        write_rows(tmp_path / "files" / f"{split} {name}.jsonl", [{"text": split}])
    loaded = load_raw_splits(str(tmp_path / "files"))
    assert {split: rows["text"][:] for split, rows in loaded.items()} == {
        "train": ["train"],
        "test": ["test"],
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            ["a", None, "c"],
            "'text' of split 'test' of data 'it' must hold text, got null in row 1",
        ),
        ([["a"], ["b"]], r"must hold text, got \['a'\] in row 0"),
        ([1, 2], "must hold text, got 1 in row 0"),
        ([["word"] * 999], r"must hold text, got \['word'.{73}\.\.\. in row 0"),
        ([None, None], "must hold text, got None in row 0"),
    ],
)
def test_texts_are_checked_in_every_split(values, message):
    good = datasets.Dataset.from_dict({"text": ["a"]})
    bad = datasets.Dataset.from_dict({"text": values})
    check_texts("it", {"train": good}, ["text"])
    with pytest.raises(ValueError, match=message):
        check_texts("it", {"train": good, "test": bad}, ["text"])


def pixels(image, channels=1):
    return np.asarray(convert_image(image, channels))


def test_images_of_more_bits_keep_their_range():
    sixteen = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    assert pixels(Image.fromarray(sixteen)).tolist() == [[0, 1, 128, 255]]
    assert pixels(Image.fromarray(sixteen.astype(np.int32))).tolist() == [[0, 1, 128, 255]]
    part = Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32))
    assert pixels(part).tolist() == [[0, 128, 255]]
    byte = Image.fromarray(np.array([[0.0, 128.0, 255.0]], dtype=np.float32))
    assert pixels(byte).tolist() == [[0, 128, 255]]
    for wrong in (-1.0, np.nan, 1e6):
        with pytest.raises(ValueError, match="must be from 0 to 65535"):
            convert_image(Image.fromarray(np.array([[wrong]], dtype=np.float32)), 1)


def test_what_is_transparent_is_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert pixels(image, 3).tolist() == [[[255, 0, 0], [255, 255, 255]]]
    assert convert_image(Image.new("CMYK", (1, 1)), 3).mode == "RGB"


@pytest.mark.parametrize(
    ("image", "channels", "line"),
    [
        (
            Image.new("I;16", (1, 1)),
            1,
            "{} has images of more than 8 bits (I;16): scaled to 8",
        ),
        (Image.new("RGBA", (1, 1)), 3, "{} has images with transparency: put on white"),
        (Image.new("P", (1, 1)), 1, "{} has images of mode P: made grey, as num_channels is 1"),
        (Image.new("L", (1, 1)), 1, None),
        (Image.new("L", (1, 1)), 3, None),
        (Image.new("RGB", (1, 1)), 3, None),
    ],
)
def test_what_is_converted_is_said_once_a_split(image, channels, line, caplog, request):
    where = f"split {request.node.name!r}"  # what another test said is not said again
    reader(where, [{"image": image}] * 3, "image", 4, channels, rows=range(3))
    assert caplog.messages == ([] if line is None else [line.format(where)])


FEATURES = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}


def png(*, cut=0):
    file = io.BytesIO()
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "png")
    return file.getvalue()[: len(file.getvalue()) - cut]


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (b"no image", 0, "the image in row 2 of split 'test' .* cannot be read: cannot identify"),
        (png(cut=60), 0, "the image in row 2 of split 'test' .* cannot be read"),
        (None, 0, "the image in row 2 of split 'test' .* cannot be read: there is none"),
        (png(), None, "labels of split 'test' .* classes from 0 to 1, got null in row 2"),
        (png(), -1, "labels of split 'test' .* classes from 0 to 1, got -1 in row 2"),
    ],
)
def test_images_and_their_labels_are_checked_in_every_split(tmp_path, image, label, message):
    for name in ("train", "test"):
        images, labels = [png()] * 12, [0, 1] * 6
        if name == "test":
            images[2], labels[2] = image, label
        rows = {"image": [x and {"bytes": x, "path": None} for x in images], "label": labels}
        split = datasets.Dataset.from_dict(rows, features=datasets.Features(FEATURES))
        (tmp_path / "data").mkdir(exist_ok=True)
        split.to_parquet(tmp_path / "data" / f"{name}.parquet")
    options = {"image_size": 8, "num_channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3}
    with pytest.raises(ValueError, match=message):
        load_image_splits(str(tmp_path / "data"), augmentation=None, **options)


def test_images_of_one_class_are_nothing_to_learn_from(tmp_path):
    rows = {"image": [{"bytes": png(), "path": None}] * 12, "label": [1] * 12}
    split = datasets.Dataset.from_dict(rows, features=datasets.Features(FEATURES))
    (tmp_path / "data").mkdir()
    for name in ("train", "test"):
        split.to_parquet(tmp_path / "data" / f"{name}.parquet")
    options = {"image_size": 8, "num_channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3}
    with pytest.raises(ValueError, match=r"labels of split 'train' .* several classes, got 1"):
        load_image_splits(str(tmp_path / "data"), augmentation=None, **options)
