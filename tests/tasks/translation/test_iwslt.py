import io
import json
import tarfile

import pytest

from regdrop.tasks.data_sets.loading import load_raw_splits
from regdrop.tasks.translation import iwslt
from regdrop.tasks.translation.iwslt import prepare_iwslt

SENTENCES = 60


def test_chinese_is_not_measured_by_words(tmp_path):
    changes = {f"train.tags.de-en.{x}": None for x in ("de", "en")}
    for language, line in (("zh", "\u6211\u5f88\u9ad8\u5174"), ("en", "I am very glad to be here")):
        changes[f"train.tags.zh-en.{language}"] = f"{line}\n" * 30
        changes[f"IWSLT17.TED.dev2010.zh-en.{language}.xml"] = f'<seg id="1">{line}</seg>'
    sizes = prepare_iwslt(archive(tmp_path / "zh-en.tgz", **changes), tmp_path / "out")
    assert sizes == {"train": 29, "validation": 1, "test": 1}


def archive(path, **changes):
    """Write a small archive of the official layout."""
    files = {}
    for language, word in (("de", "Satz"), ("en", "Sentence")):
        lines = ["<url>http://x</url>", "<keywords>a, b</keywords>", "<talkid>1</talkid>"]
        lines += [f"<title>{word} title</title>", f"<description>{word} one</description>"]
        lines += [f"{word} number {i} is Here ." for i in range(SENTENCES)]
        lines.append("too " * (200 if language == "de" else 190))
        lines.append("one two three four" if language == "de" else "one")
        lines.append("")
        files[f"train.tags.de-en.{language}"] = "\n".join(lines) + "\n"
        for test in ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012"):
            segments = "".join(
                f'<seg id="{i}"> {word}\u2019s &amp; {test} </seg>\n' for i in (1, 2)
            )
            files[f"IWSLT14.{test}.de-en.{language}.xml"] = f"<doc>\n{segments}</doc>\n"
        files[f"IWSLT14.TED.tst2013.de-en.{language}.xml"] = '<seg id="1"> no </seg>'
    files.update(changes)
    with tarfile.open(path, "w:gz") as file:
        for name, text in files.items():
            if text is not None:
                data = text.encode()
                info = tarfile.TarInfo(f"de-en/{name}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return path


def test_splits_and_cleaning(tmp_path):
    sizes = prepare_iwslt(archive(tmp_path / "de-en.tgz"), tmp_path / "out")
    # Title, description and sentences are kept; a too long, a lopsided and an empty pair are not.
    kept = SENTENCES + 2
    assert sizes == {"train": kept - kept // 23, "validation": kept // 23, "test": 10}
    validation = [
        json.loads(x) for x in (tmp_path / "out/validation.jsonl").read_text().split("\n")[:-1]
    ]
    assert validation[0] == {"de": "satz number 20 is here .", "en": "sentence number 20 is here ."}
    raw = load_raw_splits(str(tmp_path / "out"))
    assert {name: len(split) for name, split in raw.items()} == sizes
    assert raw["train"][0] == {"de": "satz title", "en": "sentence title"}
    assert raw["test"][0]["en"] == "sentence's & ted.dev2010"
    assert not any(row["en"] == "no" for row in raw["test"])


def test_bad_archives_are_named(tmp_path):
    names = {f"train.tags.de-en.{x}": None for x in ("de", "en")}
    with pytest.raises(ValueError, match=r"must hold train\.tags\.SOURCE-TARGET\.SOURCE"):
        prepare_iwslt(archive(tmp_path / "a.tgz", **names), tmp_path / "out")
    with pytest.raises(ValueError, match=r"must hold train\.tags\.de-en\.en"):
        prepare_iwslt(
            archive(tmp_path / "b.tgz", **{"train.tags.de-en.en": None}), tmp_path / "out"
        )
    with pytest.raises(ValueError, match="as many de as en training lines, got 64 and 1"):
        prepare_iwslt(archive(tmp_path / "c.tgz", **{"train.tags.de-en.en": "x"}), tmp_path / "out")
    (tmp_path / "d.tgz").write_text("no archive")
    with pytest.raises(ValueError, match=r"d\.tgz cannot be read"):
        prepare_iwslt(tmp_path / "d.tgz", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(ValueError, match="OUTPUT must be a new or empty folder"):
        prepare_iwslt(archive(tmp_path / "e.tgz"), tmp_path / "full")


@pytest.mark.parametrize("part", [0.0, 0.05, 0.5, 0.9, 0.99])
def test_a_truncated_archive_is_named_and_writes_nothing(tmp_path, part):
    path = archive(tmp_path / "a.tgz")
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match=r"ARCHIVE .*a\.tgz (cannot be read|must hold|gives)"):
        prepare_iwslt(path, tmp_path / "out")
    assert [x.name for x in tmp_path.iterdir()] == ["a.tgz"]


def test_a_flipped_archive_is_named_and_writes_nothing(tmp_path):
    path = archive(tmp_path / "a.tgz")
    content = bytearray(path.read_bytes())
    for place in range(20, len(content) - 20, len(content) // 7):
        flipped = bytearray(content)
        flipped[place] ^= 0xFF
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"ARCHIVE .*a\.tgz (cannot be read|must hold|gives)"):
            prepare_iwslt(path, tmp_path / "out")
        assert [x.name for x in tmp_path.iterdir()] == ["a.tgz"]


def test_an_archive_that_unpacks_to_too_much_is_not_unpacked(tmp_path):
    for name in ("de-en/train.tags.de-en.de", "notes"):
        bomb = archive(tmp_path / "bomb.tgz", **{name: "a" * 200_000})
        with pytest.raises(ValueError, match="it holds more than 100,000 bytes"):
            prepare_iwslt(bomb, tmp_path / "out", max_bytes=100_000)


def test_what_cannot_be_written_leaves_nothing_half_written(tmp_path, monkeypatch):
    def fail(row, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(iwslt.json, "dumps", fail)
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="No space"):
        prepare_iwslt(archive(tmp_path / "a.tgz"), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.tgz", "out"]
