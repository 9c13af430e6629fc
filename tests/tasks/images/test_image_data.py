import os
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from regdrop.tasks.data_sets.loading import load_raw_splits
from regdrop.tasks.images import decoding
from regdrop.tasks.images.digits import load_digits_splits
from regdrop.tasks.images.splits import load_image_splits
from regdrop.tasks.images.streaming import stream_image_splits

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Write a folder of one-colour images of several sizes, in the layout of an image folder."""
    root = tmp_path_factory.mktemp("colours")
    for split, count in (("train", 10), ("test", 4)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (6 + i, 8), colour).save(folder / f"{i}.png")
    return root


def load(dataset, **options):
    defaults = {
        "image_size": 8,
        "num_channels": 3,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "augmentation": None,
    }
    return load_image_splits(str(dataset), **{**defaults, **options})


def test_digits_are_split_by_class_without_overlap():
    splits = load_digits_splits(None)
    assert [len(split) for split in splits[:3]] == [300, 300, 1197]
    assert splits.class_names == [str(i) for i in range(10)]
    counts = torch.bincount(splits.train.labels)
    assert counts.min() >= 28
    assert counts.max() <= 32
    seen = [
        {item["pixel_values"].numpy().tobytes() for item in split.__getitems__(range(len(split)))}
        for split in splits[:3]
    ]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 1797


def test_digits_are_the_same_for_every_seed():
    torch.manual_seed(1)
    np.random.seed(1)
    a = load_digits_splits(None).train
    torch.manual_seed(2)
    np.random.seed(2)
    b = load_digits_splits(None).train
    assert torch.equal(a.labels, b.labels)
    assert torch.equal(a[7]["pixel_values"], b[7]["pixel_values"])


def test_digits_are_scikit_learns_between_minus_one_and_one():
    from sklearn.datasets import load_digits

    item = load_digits_splits(None).test[0]
    assert item["pixel_values"].shape == (1, 8, 8)
    original = load_digits().images / 16
    distances = np.abs(original - (item["pixel_values"][0].numpy() + 1) / 2).max((1, 2))
    assert distances.min() < 1 / 255
    assert load_digits().target[distances.argmin()] == item["labels"]


def test_augmentation_acts_on_the_training_split_alone():
    class Black(nn.Module):
        def forward(self, x):
            return x * 0

    splits = load_digits_splits(Black())
    assert (splits.train[0]["pixel_values"] == -1).all()
    assert not (splits.validation[0]["pixel_values"] == -1).all()
    assert not (splits.test[0]["pixel_values"] == -1).all()


def test_folder_of_images(colours):
    splits = load(colours)
    assert sorted(splits.class_names) == sorted(COLOURS)
    # A tenth of the training split validates where there is no split for it.
    assert [len(split) for split in splits[:3]] == [27, 3, 12]
    for split in splits[:3]:
        for i in range(len(split)):
            item = split[i]
            colour = torch.tensor(COLOURS[splits.class_names[item["labels"]]]) / 255
            assert item["pixel_values"].shape == (3, 8, 8)
            torch.testing.assert_close(item["pixel_values"].mean((1, 2)), colour * 2 - 1)


def test_normalisation_and_grey(colours):
    split = load(colours, num_channels=1, mean=[0.1], std=[0.2]).test
    greys = {"red": 76, "green": 150, "blue": 29}  # ITU-R 601, as Pillow converts
    names = load(colours).class_names
    item = split[0]
    expected = (greys[names[item["labels"]]] / 255 - 0.1) / 0.2
    torch.testing.assert_close(item["pixel_values"], torch.full((1, 8, 8), expected))


def test_images_decoded_on_demand_are_those_from_memory(colours):
    kept = load(colours, in_memory=True).train[5]
    decoded = load(colours, in_memory=False).train[5]
    assert torch.equal(kept["pixel_values"], decoded["pixel_values"])


def test_hidden_labels_are_not_tested_and_a_lone_training_split_is_refused(
    colours, tmp_path, caplog
):
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    images = [Image.new("RGB", (8, 8), colour) for colour in COLOURS.values()] * 10

    def write(name, labels):
        rows = {"image": images[: len(labels)], "label": labels}
        (tmp_path / "data").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(
            tmp_path / "data" / f"{name}.parquet"
        )

    write("train", [0, 1] * 15)
    with pytest.raises(ValueError, match="must have a split 'test' or 'validation' with labels"):
        load(tmp_path / "data")
    write("validation", [0, 1] * 2)
    write("test", [-1] * 6)
    assert [len(split) for split in load(tmp_path / "data")[:3]] == [27, 3, 4]
    assert "split 'test' of data" in caplog.text
    assert "has no labels in 'label': not used" in caplog.text


TONES = {"dark": 0, "middle": 120, "light": 255}


def write_classes(folder, **names):
    """Write a file a split, with images of the tones that its classes are named after."""
    import datasets

    folder.mkdir()
    for split, own in names.items():
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=own)}
        )
        images = [Image.new("L", (8, 8), TONES[name]) for name in own] * 10
        rows = {"image": images, "label": list(range(len(own))) * 10}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.mark.parametrize("test", [["light", "middle", "dark"], ["light", "dark"], ["middle"]])
def test_classes_are_those_that_each_split_names(tmp_path, test):
    train = ["dark", "middle", "light"]
    folder = write_classes(tmp_path / "data", train=train, test=test)
    splits = load(folder, num_channels=1, mean=[0], std=[1])
    found = {round(float(x["pixel_values"].mean()) * 255): int(x["labels"]) for x in splits.test}
    assert found == {TONES[name]: train.index(name) for name in test}


def test_a_class_that_is_not_learned_is_said_or_refused(tmp_path, caplog):
    folder = write_classes(tmp_path / "more", train=["dark", "light"], test=["dark", "middle"])
    with pytest.raises(ValueError, match=r"split 'test' .* of split 'train', .*\['middle'\]"):
        load(folder, num_channels=1, mean=[0], std=[1])
    for split, names in (("train", ["cat", "dog"]), ("test", ["cat", "dog", "Cat"])):
        for name in names:
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(10):
                Image.new("L", (8, 8)).save(tmp_path / "data" / split / name / f"{i}.png")
    load(tmp_path / "data")
    assert "has no image of the classes ['Cat']: they are not learned" in caplog.text


def test_a_stream_has_its_classes_in_one_order(tmp_path):
    folder = write_classes(tmp_path / "data", train=["dark", "light"], test=["light", "dark"])
    with pytest.raises(ValueError, match=r"split 'test' .* in their order to be streamed"):
        stream(folder)


def test_a_set_without_images_is_refused(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\na,0\nb,1\n")
    with pytest.raises(ValueError, match="must have a column of images and one of class labels"):
        load(tmp_path)


def test_a_set_without_a_training_split_is_there_to_be_tested_on(tmp_path, colours):
    import shutil

    whole = load(colours)
    shutil.copytree(colours / "test", tmp_path / "alone" / "test")
    alone = load(tmp_path / "alone")
    assert (alone.train, alone.validation) == (None, None)
    assert torch.equal(alone.test[0]["pixel_values"], whole.test[0]["pixel_values"])
    shutil.copytree(colours / "test", tmp_path / "other" / "further")
    # The library takes a folder of another name for training data.
    with pytest.raises(ValueError, match=r"'test' or 'validation' with labels, got \['train'\]"):
        load(tmp_path / "other")


@pytest.mark.long
@pytest.mark.slow
def test_real_photographs():
    folder = Path(os.environ.get("REGDROP_TEST_DATA", "nowhere")) / "cifar10_jpeg"
    if not folder.is_dir():
        pytest.skip("REGDROP_TEST_DATA names no folder that holds cifar10_jpeg")
    splits = load(folder, image_size=32)
    assert len(splits.train) == 45_000
    assert len(splits.test) == 10_000
    assert len(splits.class_names) == 10
    assert splits.train[0]["pixel_values"].shape == (3, 32, 32)
    assert splits.test.labels.bincount().tolist() == [1000] * 10


def write_stream(folder, *, train, test=4, change=None):
    """Write grey images, a file a split; `change(split, row, image, label)` may change a row."""
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])}
    )
    folder.mkdir()
    for split, count in (("train", train), ("test", test)):
        rows = {"image": [], "label": []}
        for i in range(count):
            file = BytesIO()
            Image.new("L", (8, 8), 60 + i).save(file, "PNG")
            image, label = {"bytes": file.getvalue(), "path": None}, i % 2
            image, label = change(split, i, image, label) if change else (image, label)
            rows["image"].append(image)
            rows["label"].append(label)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


def stream(folder, **options):
    defaults = {"image_size": 8, "num_channels": 1, "mean": [0], "std": [1], "augmentation": None}
    return stream_image_splits(
        str(folder), held_out_images=4, shuffle_buffer=6, **{**defaults, **options}
    )


def test_a_streams_images_are_those_of_its_file_in_every_split(tmp_path):
    splits = stream(write_stream(tmp_path / "data", train=20))
    tones = [
        [round(float(item["pixel_values"].mean()) * 255) for item in split]
        for split in (islice(splits.train, 16), splits.validation, splits.test)
    ]
    assert sorted(tones[0]) == [*range(64, 80)]
    assert tones[0] != sorted(tones[0])
    assert tones[1:] == [[*range(60, 64)], [*range(60, 64)]]
    assert [int(item["labels"]) for item in splits.validation] == [0, 1, 0, 1]


def test_a_stream_sorted_by_class_is_refused(tmp_path):
    for ordered, folder in ((True, tmp_path / "sorted"), (False, tmp_path / "mixed")):
        write_stream(
            folder,
            train=20,
            change=lambda name, i, image, label, ordered=ordered: (
                image,
                i // 10 if ordered else label,
            ),
        )
    with pytest.raises(ValueError, match="its first 12 images sorted by 'label'"):
        stream(tmp_path / "sorted", watched_labels=12)
    assert len(list(stream(tmp_path / "mixed", watched_labels=12).validation)) == 4


@pytest.mark.parametrize(
    ("split", "row", "kind", "message"),
    [
        ("train", 9, "cut", r"the image in row 9 of split 'train' of data .* cannot be read"),
        ("train", 9, "null", r"the image in row 9 of split 'train' of data .*: there is none"),
        ("train", 2, "cut", r"the image in row 2 of split 'train' of data .* cannot be read"),
        ("test", 3, "noise", r"the image in row 3 of split 'test' of data .* cannot be read"),
        ("train", 9, "label", r"from 0 to 1, got -1 in row 9"),
        ("test", 1, "label", r"labels of split 'test' of .* from 0 to 1, got -1 in row 1"),
        ("test", 1, "no label", r"labels of split 'test' of .* from 0 to 1, got null in row 1"),
    ],
)
def test_a_wrong_row_of_a_stream_is_named_by_its_place_in_the_data(
    tmp_path, split, row, kind, message
):
    def change(name, i, image, label):
        if (name, i) != (split, row):
            return image, label
        content = image["bytes"]
        return {
            "cut": ({"bytes": content[: len(content) // 2], "path": None}, label),
            "noise": ({"bytes": b"no image", "path": None}, label),
            "null": (None, label),
            "label": (image, -1),
            "no label": (image, None),
        }[kind]

    folder = write_stream(tmp_path / "data", train=20, change=change)

    def read():
        splits = stream(folder)
        for each in (islice(splits.train, 16), splits.validation, splits.test):
            list(each)

    with pytest.raises(ValueError, match=message):
        read()


@pytest.mark.parametrize(
    ("split", "row"), [*(("train", row) for row in range(0, 20, 3)), ("test", 2)]
)
def test_a_corrupt_image_is_named_by_its_row_before_training_also_beyond_memory(
    tmp_path, monkeypatch, split, row
):
    """A tenth of the training split, drawn at random, validates: its rows are those of the file."""

    def change(name, i, image, label):
        content = image["bytes"]
        cut = {"bytes": content[: len(content) // 2], "path": None}
        return (cut if (name, i) == (split, row) else image), label

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_stream(tmp_path / "data", train=20, change=change)
    for in_memory in (True, False):
        with pytest.raises(
            ValueError, match=rf"in row {row} of split '{split}' of .* cannot be read"
        ):
            load(folder, num_channels=1, mean=[0.5], std=[0.5], in_memory=in_memory)


def test_reading_a_large_split_says_how_far_it_is(caplog):
    def read(count, seconds):
        caplog.clear()
        decoding.read_once("the split", range(count), str, None, seconds_between_lines=seconds)
        return [record.getMessage() for record in caplog.records]

    assert read(1001, -1.0) == [
        "the split: 1,000 of 1,001 images checked",
        "the split: 1,001 of 1,001 images checked",
    ]
    assert read(1001, 60.0) == []


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Return a list that every image is added to which is read, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read = []
    convert = decoding.convert_image

    def count(image, num_channels):
        read.append(image)
        return convert(image, num_channels)

    monkeypatch.setattr(decoding, "convert_image", count)
    return read


def test_images_beyond_memory_are_read_once_in_all_and_again_once_they_change(tmp_path, read):
    options = {"num_channels": 1, "mean": [0.5], "std": [0.5], "in_memory": False}
    for folder, train, expected in (("one", 20, 24), ("one", 20, 0), ("two", 30, 34)):
        if not (tmp_path / folder).exists():
            write_stream(tmp_path / folder, train=train)
        read.clear()
        load(tmp_path / folder, **options)
        assert len(read) == expected


def test_a_wrong_label_is_named_by_its_row_wherever_it_is_drawn_to(tmp_path):
    for row in range(0, 20, 3):
        folder = write_stream(
            tmp_path / str(row),
            train=20,
            change=lambda name, i, image, label, row=row: (
                image,
                None if (name, i) == ("train", row) else label,
            ),
        )
        with pytest.raises(ValueError, match=rf"split 'train' of .*, got null in row {row}$"):
            load(folder, num_channels=1, mean=[0.5], std=[0.5])


def test_images_that_were_not_read_are_read_where_they_are_drawn_to(tmp_path, read):
    """A part of the training split and what validates are of one split: each has its own rows."""
    folder = write_stream(tmp_path / "data", train=40)
    options = {"num_channels": 1, "mean": [0.5], "std": [0.5], "in_memory": False}
    # A part as large as what validates, four images, then all; then in colours.
    for changes, expected in (
        ({"train_examples": 4}, 4 + 4 + 4),
        ({}, 36),
        ({"num_channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3}, 44),
        ({}, 0),
    ):
        read.clear()
        load(folder, **{**options, **changes})
        assert len(read) == expected


def test_a_trained_model_is_tested_without_reading_what_trained_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cut = {"bytes": b"not an image", "path": None}
    folder = write_stream(
        tmp_path / "data",
        train=20,
        change=lambda name, i, image, label: (cut if name == "train" else image, label),
    )
    options = {"num_channels": 1, "mean": [0.5], "std": [0.5], "in_memory": False}
    with pytest.raises(ValueError, match=r"of split 'train' of .* cannot be read"):
        load(folder, **options)
    names = load_raw_splits(str(folder))["test"].features["label"].names
    assert load(folder, class_names=names, **options).test[0]["pixel_values"].shape[0] == 1


@pytest.mark.parametrize("error", [MemoryError, ConnectionError])
def test_what_is_no_fault_of_an_image_is_not_said_to_be(error):
    with pytest.raises(error), decoding.named_image("split 'train'", 3):
        raise error
