"""The official archives of IWSLT as plain text: the paper's splits and cleaning.

They are those of fairseq's `prepare-iwslt14.sh`: every 23rd pair of the training text is the
validation split; dev2010, dev2012 and tst2010 to tst2012 are the test split.
"""

import json
import lzma
import re
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

_VALIDATION_EVERY = 23
_MAX_RATIO = 1.5
# Moses' tokenizer does not part the words of these: a ratio of lengths would say nothing.
_WITHOUT_SPACES = {"ja", "th", "zh"}
_MAX_TOKENS = 175
_BLOCK_BYTES = 2**14
_TESTS = ("dev2010", "dev2012", "tst2010", "tst2011", "tst2012")
_DROPPED_LINES = ("<url>", "<talkid>", "<keywords>")
_STRIPPED_TAGS = re.compile(r"</?(?:title|description)>")
_SEGMENT = re.compile(r"<seg id=\"\d+\">\s*(.*?)\s*</seg>")

Pair = tuple[str, str]


def prepare_iwslt(archive: Path, output: Path, *, max_bytes: int = 2**30) -> dict[str, int]:
    """Turn an official archive into a folder that `datasets.load_dataset` reads.

    Text is lower-cased; training pairs with 1 to 175 tokens a side (Moses' tokenizer) and a ratio
    of at most 1.5 are kept; any ratio where a language is written without spaces. The text stays
    untokenized.

    Args:
        archive: The `.tgz` of one pair of languages, as IWSLT publishes it.
        output: Folder to write; one JSON lines file a split.
        max_bytes: Unpacked size above which an archive is refused; the largest of IWSLT's hold less
            than a tenth of the default.

    Returns:
        The number of pairs of each split.

    Raises:
        ValueError: If the archive is damaged, not of that layout or larger than such a one is, or
            the output folder is not empty.
    """
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"OUTPUT must be a new or empty folder, got {output}")
    texts = _read_texts(archive, max_bytes)
    source, target = _languages(archive, texts)
    pairs = list(_training_pairs(archive, texts, source, target))
    is_kept = _length_filter(source, target)
    kept = [(a.lower(), b.lower()) for a, b in pairs if is_kept(a, b)]
    splits = {
        "train": [pair for i, pair in enumerate(kept, 1) if i % _VALIDATION_EVERY],
        "validation": kept[_VALIDATION_EVERY - 1 :: _VALIDATION_EVERY],
        "test": list(_test_pairs(archive, texts, source, target)),
    }
    for name, rows in splits.items():
        if not rows:
            raise ValueError(f"ARCHIVE {archive} gives an empty split {name!r}")
    _write(output, {name: [{source: a, target: b} for a, b in x] for name, x in splits.items()})
    return {name: len(rows) for name, rows in splits.items()}


def _read_texts(archive: Path, max_bytes: int) -> dict[str, str]:
    """Return the texts of an archive by the names of their files, read in one go through it."""
    texts = {}
    try:
        with tarfile.open(archive) as file:
            for member in file:
                if member.offset_data + member.size > max_bytes:
                    raise ValueError(f"it holds more than {max_bytes:,} bytes")
                if member.isfile() and _is_wanted(member.name):
                    texts[Path(member.name).name] = _read(file, member)
            _read_to_the_end(file.fileobj, max_bytes)
    except (EOFError, OSError, ValueError, lzma.LZMAError, tarfile.TarError, zlib.error) as error:
        raise ValueError(f"ARCHIVE {archive} cannot be read: {error}") from error
    return texts


def _read_to_the_end(stream: Any, max_bytes: int) -> None:
    """Read what follows the last file: the checksum of a compressed archive is there."""
    for _ in range(max_bytes // _BLOCK_BYTES):
        if not stream.read(_BLOCK_BYTES):
            return
    raise ValueError(f"more than {max_bytes:,} bytes follow its last file")


def _write(output: Path, splits: dict[str, list[dict[str, str]]]) -> None:
    """Write a file a split; the folder appears whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="prepare-", dir=output.parent) as name:
        folder = Path(name, "data")
        folder.mkdir()
        for split, rows in splits.items():
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        if output.exists():
            output.rmdir()
        folder.rename(output)


def _is_wanted(name: str) -> bool:
    base = Path(name).name
    return base.startswith("train.tags.") or (base.startswith("IWSLT") and base.endswith(".xml"))


def _read(file: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    stream: Any = file.extractfile(member)
    text: str = stream.read().decode("utf-8")
    return text


def _languages(archive: Path, texts: dict[str, str]) -> Pair:
    for name in sorted(texts):
        found = re.fullmatch(r"train\.tags\.(\w+)-(\w+)\.\1", name)
        if found:
            return found[1], found[2]
    raise ValueError(
        f"ARCHIVE {archive} must hold train.tags.SOURCE-TARGET.SOURCE, got {sorted(texts)}"
    )


def _get(archive: Path, texts: dict[str, str], name: str) -> str:
    if name not in texts:
        raise ValueError(f"ARCHIVE {archive} must hold {name}, got {sorted(texts)}")
    return texts[name]


def _training_pairs(
    archive: Path, texts: dict[str, str], source: str, target: str
) -> Iterator[Pair]:
    sides = []
    for language in (source, target):
        text = _get(archive, texts, f"train.tags.{source}-{target}.{language}")
        # Not str.splitlines: other line breaks stand inside sentences.
        lines = text.rstrip("\n").split("\n")
        kept = [line for line in lines if not any(tag in line for tag in _DROPPED_LINES)]
        sides.append([_STRIPPED_TAGS.sub("", line).strip() for line in kept])
    if len(sides[0]) != len(sides[1]):
        raise ValueError(
            f"ARCHIVE {archive} must hold as many {source} as {target} training lines, "
            f"got {len(sides[0])} and {len(sides[1])}"
        )
    yield from zip(*sides, strict=True)


def _test_pairs(archive: Path, texts: dict[str, str], source: str, target: str) -> Iterator[Pair]:
    for test in _TESTS:
        pattern = rf"IWSLT\d+\.TEDX?\.{test}\.{source}-{target}\.{source}\.xml"
        for name in sorted(name for name in texts if re.fullmatch(pattern, name)):
            other = name.removesuffix(f"{source}.xml") + f"{target}.xml"
            sides = [_SEGMENT.findall(_get(archive, texts, key)) for key in (name, other)]
            if len(sides[0]) != len(sides[1]):
                raise ValueError(
                    f"ARCHIVE {archive} must hold as many segments in {name} as in {other}, "
                    f"got {len(sides[0])} and {len(sides[1])}"
                )
            for a, b in zip(*sides, strict=True):
                yield _clean_segment(a), _clean_segment(b)


def _clean_segment(text: str) -> str:
    return unescape(text).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").lower()


def _length_filter(source: str, target: str) -> Callable[[str, str], bool]:
    from sacremoses import MosesTokenizer

    tokenizers = MosesTokenizer(lang=source), MosesTokenizer(lang=target)
    has_ratio = not _WITHOUT_SPACES & {source, target}

    def is_kept(a: str, b: str) -> bool:
        counts = [len(t.tokenize(x)) for t, x in zip(tokenizers, (a, b), strict=True)]
        shorter, longer = min(counts), max(counts)
        if shorter < 1 or longer > _MAX_TOKENS:
            return False
        return not has_ratio or longer <= _MAX_RATIO * shorter

    return is_kept
