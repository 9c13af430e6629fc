from collections import Counter
from pathlib import Path

from regdrop.tasks import PRESETS
from regdrop.tasks.data_sets.loading import load_raw_splits
from text_data import write_rows

ALICE = PRESETS["alice"]


def test_the_book_is_read_by_its_name_and_its_chapters_are_apart():
    splits = {name: list(split["text"]) for name, split in load_raw_splits("alice").items()}
    assert list(splits) == ["train", "validation", "test"]
    assert splits["train"][0] == "down the rabbit-hole"
    assert splits["validation"][0] == "advice from a caterpillar"
    assert splits["test"][0] == "the mock turtle's story"
    words = {name: sum(len(line.split()) for line in lines) for name, lines in splits.items()}
    assert words == {"train": 10_585, "validation": 12_196, "test": 10_910}
    long = {name: {x for x in lines if len(x.split()) > 12} for name, lines in splits.items()}
    assert not long["train"] & (long["validation"] | long["test"])
    assert not long["validation"] & long["test"]


def test_a_folder_of_that_name_is_read_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(Path("alice") / "train.jsonl", [{"text": "mine"}])
    assert len(load_raw_splits("alice")["train"]) == 144
    assert list(load_raw_splits("./alice")["train"]["text"]) == ["mine"]


def test_the_model_knows_the_words_that_it_reads_twice():
    prepared = ALICE.prepare()
    counts = Counter(w for line in load_raw_splits("alice")["train"]["text"] for w in line.split())
    known = {word for word, count in counts.items() if count >= 2}
    assert set(prepared.processing_class.get_vocab()) == known | {"</s>", "<unk>"}
    assert len(prepared.processing_class) == ALICE.vocabulary_size
    assert len(prepared.splits["test"].words) == 1 + 10_910 + 322
