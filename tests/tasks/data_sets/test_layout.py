"""Which files make which split: by their names; what could be read by accident is refused."""

import gzip
import json
import shutil

import datasets
import pytest
from PIL import Image

from regdrop.tasks.data_sets.columns import check_texts
from regdrop.tasks.data_sets.layout import find_layout
from regdrop.tasks.data_sets.loading import load_raw_splits
from regdrop.tasks.notices import say_once


@pytest.fixture(autouse=True)
def nothing_said(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    say_once.cache_clear()


def write(folder, *names):
    """Write files that hold their own name as their only text, each in its suffix's form."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        row = json.dumps({"text": name}) + "\n"
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(row.encode()))
        else:
            is_csv = name.lower().endswith((".csv", ".tsv"))
            path.write_text(f"text\n{name}\n" if is_csv else row)
    return folder


def read(folder):
    return {name: rows["text"][:] for name, rows in load_raw_splits(str(folder)).items()}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train.jsonl", "dev.jsonl"], ["train.jsonl"]),
        (["train.jsonl", "valid.jsonl", "test.jsonl"], ["train.jsonl"]),
        (["train.jsonl", "val.jsonl"], ["train.jsonl"]),
        (["train.jsonl", "eval.jsonl", "test.jsonl"], ["train.jsonl"]),
        (["Train.jsonl", "Validation.jsonl", "Test.jsonl"], ["Train.jsonl"]),
        (["training.jsonl", "validation.jsonl", "testing.jsonl"], ["training.jsonl"]),
        (["my_train.jsonl", "my_dev.jsonl", "my_test.jsonl"], ["my_train.jsonl"]),
        (["train.CSV", "validation.CSV"], ["train.CSV"]),
        (["train.tsv", "validation.tsv"], ["train.tsv"]),
        (["train.jsonl.gz", "validation.jsonl"], ["train.jsonl.gz"]),
        (["train.jsonl", "validation.jsonl", "notes.txt", "train.md5"], ["train.jsonl"]),
        (["train.jsonl", "validation.jsonl", "train.jsonl~", "train.zip"], ["train.jsonl"]),
        (["data/train.jsonl", "data/dev.jsonl"], ["data/train.jsonl"]),
        (["train/b.jsonl", "train/a.jsonl", "dev/a.jsonl"], ["train/a.jsonl", "train/b.jsonl"]),
        (
            [f"train-0000{i}-of-00002.jsonl" for i in (0, 1)] + ["validation.jsonl"],
            [f"train-0000{i}-of-00002.jsonl" for i in (0, 1)],
        ),
    ],
)
def test_a_split_has_the_files_that_are_named_after_it(tmp_path, names, expected):
    found = read(write(tmp_path / "data", *names))
    assert found["train"] == expected
    assert [split for split in found if split != "test"] == ["train", "validation"]
    assert ("test" in found) == any("est" in name for name in names)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train.jsonl", "train_old.jsonl"], r"one file for 'train', got .*train_old\.jsonl"),
        (["train.jsonl", "train.ndjson"], r"one file for 'train', got .*train\.ndjson"),
        (["train.jsonl", "train.jsonl.gz"], "one file for 'train'"),
        (["test.jsonl", "test2.jsonl"], "one file for 'test'"),
        (["dev.jsonl", "eval.jsonl"], r"one file for 'validation', got .*'eval\.jsonl'"),
        (["train.csv", "test.jsonl"], r"of one kind, got \['train\.csv', 'test\.jsonl'\]"),
        (["train-test.jsonl"], "after one split, got 'train-test' of train and test"),
        (["train/a.jsonl", "train_old/a.jsonl"], "must have one folder for 'train'"),
        (["train.jsonl", "test/a.jsonl"], r"files or folders of splits, got .*train\.jsonl and"),
        (["train/a.jsonl", "train/validation.jsonl"], "folder of 'train' and named after 'valid"),
        (
            ["train/d-00000-of-00001.jsonl", "train/d-00000-of-00002.jsonl"],
            "parts of one whole, got parts of 'd' of 1 and of 2: remove the old ones",
        ),
        (["book.jsonl"], r"after its splits, train, .* end in one of .*\.csv.*got \['book"),
        (["train.xlsx"], r"end in one of .*\.csv.*; got \['train\.xlsx'\]"),
    ],
)
def test_what_could_be_read_by_accident_is_refused_by_name(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        load_raw_splits(str(write(tmp_path / "data", *names)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.csv", b"", r"train\.csv is empty"),
        ("train.csv", b"\xef\xbb\xbfa,b\n", r"train\.csv begins with a byte order mark of UTF-8"),
        ("train.jsonl", b"\xff\xfe{", "begins with a byte order mark of UTF-16: save it as"),
    ],
)
def test_files_that_cannot_be_data_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        find_layout("it", tmp_path)


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="'it' is a file"):
        find_layout("it", tmp_path / "file")


def test_a_split_without_rows_is_named(tmp_path):
    write(tmp_path / "data", "train.csv", "validation.csv")
    (tmp_path / "data" / "validation.csv").write_text("text\n")
    with pytest.raises(ValueError, match="cannot be read: split 'validation': it is empty"):
        load_raw_splits(str(tmp_path / "data"))


def test_other_names_unread_files_and_missing_parts_are_said(tmp_path, caplog):
    names = ["train-00000-of-00002.jsonl", "dev.jsonl", "unlabelled.jsonl"]
    folder = write(tmp_path / "data", *names)
    read(folder)
    assert caplog.messages == [
        f"data '{folder}' has 1 of the 2 parts of 'train'",
        f"data '{folder}': dev.jsonl is its split 'validation'",
        f"unlabelled.jsonl of data '{folder}' is of no split: not read",
    ]


def test_all_files_of_a_folder_are_read_and_it_is_said(tmp_path, caplog):
    folder = write(tmp_path / "data", "train/train.jsonl", "train/train_old.jsonl")
    assert len(read(folder)["train"]) == 2
    assert f"{folder / 'train'} has 2 files, train.jsonl, train_old.jsonl: all are read" in (
        caplog.messages
    )


def test_of_a_saved_data_set_its_last_save_is_read(tmp_path):
    split = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
    for rows, shards in ((3, 3), (2, 1)):
        saved = datasets.DatasetDict({"train": split.select(range(rows))})
        saved.save_to_disk(tmp_path / "data", num_shards={"train": shards})
    assert len(list((tmp_path / "data/train").glob("*.arrow"))) == 4
    assert read(tmp_path / "data") == {"train": ["a", "b"]}


def test_a_card_may_say_which_files_make_a_split(tmp_path):
    folder = write(tmp_path / "data", "first.jsonl", "second.jsonl")
    (folder / "README.md").write_text("# about it\n")
    with pytest.raises(ValueError, match="named after its splits"):
        read(folder)
    files = "".join(
        f"  - split: {split}\n    path: {name}.jsonl\n"
        for split, name in (("train", "first"), ("test", "second"))
    )
    card = f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n"
    (folder / "README.md").write_text(card)
    assert read(folder) == {"train": ["first.jsonl"], "test": ["second.jsonl"]}


def write_images(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name)
    return folder


@pytest.mark.parametrize("name", ["train", "test", "val", "old test"])
def test_a_class_may_be_named_like_a_split(tmp_path, name):
    names = [f"{split}/{x}/0.png" for split in ("train", "eval", "test") for x in ("cat", name)]
    loaded = load_raw_splits(str(write_images(tmp_path / "data", *names)))
    assert {split: len(rows) for split, rows in loaded.items()} == {
        "train": 2,
        "validation": 2,
        "test": 2,
    }
    assert loaded["train"].features["label"].names == ["cat", name]


def test_archives_are_left_to_the_library(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / split, f"{split}.jsonl")
        shutil.make_archive(str(tmp_path / "packed" / split), "zip", tmp_path / split)
    assert read(tmp_path / "packed") == {"train": ["train.jsonl"], "test": ["test.jsonl"]}


def test_a_split_may_be_a_link_and_a_class_may_not(tmp_path):
    write_images(tmp_path / "real", "train/cat/0.png", "train/dog/0.png", "test/cat/0.png")
    linked = tmp_path / "linked"
    linked.mkdir()
    for split in ("train", "test"):
        (linked / split).symlink_to(tmp_path / "real" / split)
    assert {split: len(x) for split, x in load_raw_splits(str(linked)).items()} == {
        "train": 2,
        "test": 1,
    }
    (tmp_path / "real" / "test" / "dog").symlink_to(tmp_path / "real" / "train" / "dog")
    with pytest.raises(ValueError, match=r"test/dog is a link to a folder"):
        load_raw_splits(str(tmp_path / "real"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("train/cat/young/0.png", r"on one level in all splits, got .* and .*young/0\.png"),
        ("train/0.png", r"must lie in folders of their classes, got .*train/0\.png"),
    ],
)
def test_images_whose_class_no_folder_tells_are_named(tmp_path, wrong, message):
    folder = write_images(tmp_path / "data", "train/cat/0.png", "train/dog/0.png", wrong)
    with pytest.raises(ValueError, match=message):
        load_raw_splits(str(folder))
    (folder / wrong).unlink()
    shutil.rmtree(folder / "train/cat/young", ignore_errors=True)
    (folder / "train/metadata.csv").write_text("file_name,x\ncat/0.png,1\n")
    with pytest.raises(ValueError, match=r"train/metadata\.csv would take the place of the class"):
        load_raw_splits(str(folder))


def test_a_folder_that_is_nowhere_and_a_cache_that_cannot_be_written_are_named(
    tmp_path, monkeypatch
):
    import datasets

    with pytest.raises(ValueError, match="; there is no folder of that name here"):
        load_raw_splits("no/where")
    folder = write(tmp_path / "data", "train.jsonl")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "/somewhere")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        ValueError, match="cannot be kept in the cache, which HF_HOME and XDG_CACHE"
    ):
        load_raw_splits(str(folder))


def test_an_empty_field_of_a_table_is_said_to_be_null(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("text,x\na,1\nNA,2\n")
    loaded = load_raw_splits(str(tmp_path / "data"))
    with pytest.raises(ValueError, match="got null in row 1: in CSV and TSV an empty field, NA"):
        check_texts("it", loaded, ["text"])
