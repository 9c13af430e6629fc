"""A quote that is not closed swallows rows: refused, or said where it may be meant."""

import csv
import gzip

import pytest

from regdrop.tasks.data_sets.loading import load_raw_splits
from regdrop.tasks.data_sets.quotes import check_quotes
from regdrop.tasks.notices import say_once

ROWS = [(f"film {i} was good", i % 2) for i in range(20)]


@pytest.fixture(autouse=True)
def nothing_said(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    say_once.cache_clear()


def write(folder, suffix, *, before=(), after=()):
    """Write rows as they are, with a quote before or after the texts of some."""
    folder.mkdir()
    separator = "\t" if "tsv" in suffix else ","
    lines = [separator.join(["text", "label"])]
    for i, (text, label) in enumerate(ROWS):
        quoted = '"' * (i in before) + text + '"' * (i in after)
        lines.append(f"{quoted}{separator}{label}")
    content = ("\n".join(lines) + "\n").encode()
    packed = gzip.compress(content) if suffix.endswith("gz") else content
    (folder / f"train.{suffix}").write_bytes(packed)
    return folder


@pytest.mark.parametrize("suffix", ["tsv", "csv", "tsv.gz"])
def test_rows_that_an_open_quote_swallows_are_refused_by_file_and_row(tmp_path, suffix):
    folder = write(tmp_path / "data", suffix, before=(3, 10))
    with pytest.raises(ValueError, match=rf"'text' of split 'train' .*train\.{suffix} in row 3: a"):
        load_raw_splits(str(folder))


def test_a_quote_before_one_row_and_after_another_is_refused_in_tsv_and_said_in_csv(
    tmp_path, caplog
):
    with pytest.raises(ValueError, match=r"several lines of .*train\.tsv in row 3"):
        load_raw_splits(str(write(tmp_path / "tsv", "tsv", before=[3], after=[10])))
    load_raw_splits(str(write(tmp_path / "csv", "csv", before=[3], after=[10])))
    assert "has 1 texts whose lines have the commas of rows, the first in row 3" in caplog.text


@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_texts_of_several_lines_in_quotes_are_read(tmp_path, suffix, caplog):
    texts = ['first "quoted"\nsecond', "long " * 50_000, '"', "plain"]
    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / f"train.{suffix}").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if suffix == "tsv" else ",")
        writer.writerows([["text"], *([text] for text in texts)])
    assert load_raw_splits(str(tmp_path / "data"))["train"]["text"][:] == texts
    assert caplog.messages == []


def test_a_file_that_python_cannot_unpack_is_not_looked_into(tmp_path):
    import datasets

    packed = tmp_path / "train.csv.zst"
    packed.write_bytes(b"\x28\xb5\x2f\xfd\xff\xfe")
    split = datasets.Dataset.from_dict({"text": ["two\nlines"], "label": [0]})
    check_quotes("split 'train'", split, [packed], ",")
