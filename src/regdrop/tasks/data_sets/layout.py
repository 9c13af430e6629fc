"""Which files of a folder make which split: by their names, and never two by accident."""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from regdrop.tasks.data_sets.file_kinds import ACCEPTED_SUFFIXES, check_start, kind_of, stem_of
from regdrop.tasks.data_sets.image_folders import check_image_folders, is_image
from regdrop.tasks.data_sets.split_names import ACCEPTED_NAMES, Part, find_part, find_split
from regdrop.tasks.notices import say_once

_SHOWN = 6  # names in a message
_ARCHIVES = (".tar", ".zip")


class Layout(NamedTuple):
    """The files of each split.

    Attributes:
        kind: What all of them are; of images the folder of each split stands for its files.
        splits: By the name of the split.
    """

    kind: str
    splits: dict[str, list[Path]]


def find_layout(dataset: str, folder: Path) -> Layout | None:
    """Return the files of each split of a folder; None for one that only `datasets` can read.

    Args:
        dataset: The folder as it was given, for errors.
        folder: Holds one file or one folder a split, or does so in its folder "data".

    Raises:
        ValueError: If it is no folder, a split has several files that are no parts of one, files
            are named after no split or of several kinds, or one is empty.
    """
    if not folder.is_dir():
        raise ValueError(f"data must be a folder or a hub id; {dataset!r} is a file")
    if _describes_itself(folder):
        return None
    entries = [path for path in sorted(folder.iterdir()) if not _is_hidden(path.name)]
    files = [path for path in entries if path.is_file() and kind_of(path)]
    folders = [path for path in entries if path.is_dir()]
    by_file = _by_split(dataset, files, "file")
    by_folder = _by_split(dataset, folders, "folder")
    if not (by_file or by_folder):
        if folder / "data" in folders:
            return find_layout(dataset, folder / "data")
        is_packed = any(path.suffix.lower() in _ARCHIVES for path in entries)
        if entries and not folders and not is_packed:
            raise ValueError(
                f"data {dataset!r} must have files named after its splits, {ACCEPTED_NAMES}, that "
                f"end in one of {ACCEPTED_SUFFIXES}; got {_shown(entries)}"
            )
        return None
    contents = {split: _contents(own[0]) for split, own in by_folder.items()}
    by_content = {split: inside for split, inside in contents.items() if inside}
    if by_file and by_content:
        both = [next(iter(found.values()))[0] for found in (by_file, by_folder)]
        raise ValueError(
            f"data {dataset!r} must have files or folders of splits, got {both[0]} and {both[1]}"
        )
    if by_file:
        _say_unread(dataset, files, by_file)
        return _one_kind(dataset, by_file)
    if not by_content:
        return None
    if any(is_image(path) for inside in by_content.values() for path in inside):
        check_image_folders({by_folder[name][0]: x for name, x in by_content.items()})
        return Layout("images", {name: [by_folder[name][0].resolve()] for name in by_content})
    inside = {name: [path for path in x if kind_of(path)] for name, x in by_content.items()}
    for split, own in inside.items():
        _check_folder(by_folder[split][0], split, own)
    return _one_kind(dataset, inside)


def _check_folder(folder: Path, split: str, files: Sequence[Path]) -> None:
    """Check that the data files in the folder of a split are parts of it; say if they may not be.

    Raises:
        ValueError: If one is named after another split, or they are parts of several wholes.
    """
    counts: dict[str, set[int]] = defaultdict(set)
    for path in files:
        part = find_part(stem_of(path))
        try:
            named = find_split(part.name)
        except ValueError as error:
            raise ValueError(f"{path} {error}") from None
        # MNLI's validation_matched is of validation too.
        if named is not None and not split.startswith(named):
            raise ValueError(f"{path} is in the folder of {split!r} and named after {named!r}")
        if part.name != stem_of(path):
            counts[part.name].add(part.parts)
    for name, of_name in counts.items():
        if len(of_name) > 1:
            raise ValueError(
                f"{folder} must hold the parts of one whole, got parts of {name!r} of "
                f"{' and of '.join(map(str, sorted(of_name)))}: remove the old ones"
            )
    loose = [path for path in files if find_part(stem_of(path)).name == stem_of(path)]
    if loose and len(files) > 1:
        say_once(f"{folder} has {len(files)} files, {', '.join(_shown(files))}: all are read")


def _by_split(dataset: str, paths: Sequence[Path], what: str) -> dict[str, list[Path]]:
    """Return the files, or the folders, that are named after a split."""
    found: dict[str, dict[Part, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path in paths:
        part = find_part(stem_of(path) if what == "file" else path.name)
        try:
            split = find_split(part.name)
        except ValueError as error:
            raise ValueError(f"{path} {error}") from None
        if split is not None:
            found[split][part].append(path)
    otherwise = []
    for split, parts in found.items():
        own = [path for files in parts.values() for path in files]
        (name, count), *others = parts
        if others or (count == 1 and len(own) > 1):
            raise ValueError(
                f"data {dataset!r} must have one {what} for {split!r}, got {_shown(own)}; parts of "
                f"one are named {split}-00000-of-00002"
            )
        if len(own) != count:
            say_once(f"data {dataset!r} has {len(own)} of the {count} parts of {name!r}")
        if name != split:
            otherwise.append(f"{own[0].name} is its split {split!r}")
    if otherwise:
        say_once(f"data {dataset!r}: {', '.join(sorted(otherwise))}")
    order = [split for split in ("train", "validation", "test") if split in found]
    return {
        split: [path for files in found[split].values() for path in files]
        for split in dict.fromkeys((*order, *found))
    }


def _one_kind(dataset: str, splits: dict[str, list[Path]]) -> Layout:
    """Return the layout of files of one kind, of which none is empty."""
    by_kind = {str(kind_of(path)): path.name for own in splits.values() for path in own}
    for path in (path for own in splits.values() for path in own):
        check_start(path)
    if len(by_kind) > 1:
        raise ValueError(
            f"data {dataset!r} must have files of one kind, got {list(by_kind.values())}"
        )
    return Layout(next(iter(by_kind)), splits)


def _say_unread(dataset: str, files: Iterable[Path], splits: dict[str, list[Path]]) -> None:
    """Say which files look like data of the same kind and are none of a split."""
    read = {path for own in splits.values() for path in own}
    kinds = {kind_of(path) for path in read}
    unread = [path for path in files if path not in read and kind_of(path) in kinds]
    if unread:
        say_once(f"{', '.join(_shown(unread))} of data {dataset!r} is of no split: not read")


def _contents(folder: Path) -> list[Path]:
    """Return the images and data files in a folder and those below.

    Where `datasets` saved it, they are those that it lists: files of an earlier save stay beside.

    Raises:
        ValueError: If one of its folders is a link, which `datasets` does not follow.
    """
    if (listed := _saved_files(folder)) is not None:
        return listed
    files: list[Path] = []
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        linked = next((p for p in (Path(root, name) for name in folders) if p.is_symlink()), None)
        if linked is not None:
            raise ValueError(f"{linked} is a link to a folder: it must be the folder itself")
        files += [Path(root, name) for name in sorted(names) if not _is_hidden(name)]
    return [path for path in files if (is_image(path) or kind_of(path)) and path.is_file()]


def _saved_files(folder: Path) -> list[Path] | None:
    """Return the files that `save_to_disk` wrote; None for any other folder."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        files = [folder / entry["filename"] for entry in state["_data_files"]]
        if files and all(path.is_file() for path in files):
            return files
    return None


def _describes_itself(folder: Path) -> bool:
    """Return whether a folder's card says which files make its splits."""
    card = folder / "README.md"
    if not card.is_file():
        return False
    before, mark, after = card.read_text(encoding="utf-8", errors="replace").partition("---")
    return bool(mark) and not before.strip() and "\nconfigs:" in after.partition("\n---")[0]


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def _shown(paths: Sequence[Path]) -> list[str]:
    names = [path.name for path in paths]
    return names if len(names) <= _SHOWN else [*names[:_SHOWN], "..."]
