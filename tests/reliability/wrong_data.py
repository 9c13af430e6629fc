"""Data that cannot be: rows of text, files of a split, and images, with something wrong."""

import json
import shutil
import traceback
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from commands import Attack
from PIL import Image

from regdrop.tasks import PRESETS
from regdrop.tasks.images.splits import load_image_splits
from regdrop.tasks.images.streaming import stream_image_splits
from text_data import write_encoder, write_glue, write_rows

WRONG_ROWS = (
    *({"sentence": None}, {"sentence": ["a"]}, {"sentence": 3}, {"sentence": {"a": "b"}}),
    *({"label": None}, {"label": 2}, {"label": -1}, {"label": 10**6}, {"label": "many"}),
    *({"label": ["a"]}, {"label": 0.5}),
)
WRONG_IMAGES = ("cut", "noise", "empty", "null", "range", "nan", "label", "no label")


def give_wrong_rows(attack: Attack) -> None:
    """Put something wrong into a row, or a file, of one split of text."""
    folder = attack.folder / f"data-{attack.counts['tried']}"
    write_glue(folder / "data", "cola")
    split = attack.random.choice(("train", "validation"))
    path = folder / "data" / f"{split}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    row = attack.random.randrange(len(rows))
    wrong = attack.random.choice(WRONG_ROWS)
    kind = attack.random.choice(
        ("row", "row", "column", "empty", "cut", "mark", "two", "one class")
    )
    if kind == "row":
        rows[row].update(wrong)
    elif kind == "column":
        for each in rows:
            del each["label"]
    elif kind == "one class":
        path = folder / "data" / "train.jsonl"
        rows = [{"sentence": "good", "label": 1}] * 20
    write_rows(path, rows)
    content = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(content[: -attack.random.randrange(4, 20)])
    elif kind == "mark":
        path.write_bytes(b"\xef\xbb\xbf" + content)
    elif kind == "two":
        (folder / "data" / f"{split}.csv").write_text("sentence,label\ngood,1\n")
    task = replace(
        PRESETS["minilm-cola"],
        dataset=str(folder / "data"),
        model=str(write_encoder(folder / "model")),
        train_examples=None,
    )

    def load() -> list[Any]:
        splits = task.prepare().splits
        return [splits[name] for name in splits]

    _must_refuse(attack, load, f"{kind} {wrong if kind == 'row' else ''} in row {row} of {split}")
    shutil.rmtree(folder)


def give_wrong_images(attack: Attack) -> None:
    """Put a wrong image or label into a split, kept in memory, on disk, or streamed."""
    folder = attack.folder / f"images-{attack.counts['tried']}"
    split = attack.random.choice(("train", "test"))
    row = attack.random.randrange({"train": 20, "test": 6}[split])
    kind = attack.random.choice(WRONG_IMAGES)
    way = attack.random.choice(("memory", "disk", "stream"))
    write_images(folder, split, row, kind)
    options = {"image_size": 28, "num_channels": 1, "mean": [0.5], "std": [0.5]}
    options["augmentation"] = None

    def load() -> list[Any]:
        if way == "stream":
            return list(stream_image_splits(str(folder), held_out_images=4, **options)[:3])
        return list(load_image_splits(str(folder), in_memory=way == "memory", **options)[:3])

    what = f"{kind} in row {row} of {split}, {way}"
    _must_refuse(attack, load, what, f"row {row} of split '{split}'", f"in row {row}")
    shutil.rmtree(folder)


def write_images(folder: Path, split: str, row: int, kind: str) -> None:
    """Write grey images of two classes, a file a split, with something wrong in one row."""
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])}
    )
    folder.mkdir()
    for name, count in (("train", 20), ("test", 6)):
        content: list[dict[str, Any]] = [
            {"image": _file(Image.new("L", (9, 9), 60 + i)), "label": i % 2} for i in range(count)
        ]
        if name == split:
            right = content[row]["image"]["bytes"]
            wide = np.full((9, 9), np.nan if kind == "nan" else -3, np.float32)
            content[row] |= {
                "cut": {"image": {"bytes": right[: len(right) // 2], "path": None}},
                "noise": {"image": {"bytes": bytes(range(200)), "path": None}},
                "empty": {"image": {"bytes": b"", "path": None}},
                "null": {"image": None},
                "range": {"image": _file(Image.fromarray(wide), "TIFF")},
                "nan": {"image": _file(Image.fromarray(wide), "TIFF")},
                "label": {"label": -1},
                "no label": {"label": None},
            }[kind]
        columns = {key: [each[key] for each in content] for key in ("image", "label")}
        data = datasets.Dataset.from_dict(columns, features=features)
        data.to_parquet(folder / f"{name}.parquet")


def _file(image: Any, kind: str = "PNG") -> dict[str, Any]:
    file = BytesIO()
    image.save(file, kind)
    return {"bytes": file.getvalue(), "path": None}


def _must_refuse(attack: Attack, load: Callable[[], list[Any]], what: str, *named: str) -> None:
    """Note whether wrong data is refused, by one of some names, before its last row is read."""
    try:
        for split in load():
            # A stream of training has no end.
            for _, _ in zip(range(100), split, strict=False):
                pass
    except ValueError as error:
        is_named = not named or any(each in str(error) for each in named)
        attack.note("refused" if is_named else "silent", f"{what}: {error}")
    except Exception:
        attack.note("tracebacks", f"{what}: {traceback.format_exc()[-1500:]}")
    else:
        attack.note("silent", what)
