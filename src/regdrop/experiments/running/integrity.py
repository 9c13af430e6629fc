"""Checkpoints of an interrupted run: which of them are whole, and from which it goes on."""

import shutil
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from regdrop.experiments.recording.files import read_object, write_json

# Written last, with the size and the checksum of every file beside it.
SEAL_NAME = "whole.json"
_BLOCK_BYTES = 2**20


class SealCallback(TrainerCallback):
    """Notes of every checkpoint what it holds, so that damage is seen."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Seal the checkpoint that was written last."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # each process writes the state of its random numbers
        if state.is_world_process_zero:
            seal(written_checkpoint(args, state))


def written_checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder of the checkpoint that a Trainer has written last."""
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def seal(checkpoint: Path) -> None:
    """Write the size and the checksum of every file of a checkpoint beside them."""
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != SEAL_NAME]
    content = {str(path.relative_to(checkpoint)): _fingerprint(path) for path in sorted(files)}
    write_json(checkpoint / SEAL_NAME, content)


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, in words; None if it is whole.

    One without a seal, of an older version or stopped just before it, is whole where its state,
    which is written after all else, and the weights and tensors beside it can be read.
    """
    try:
        step = _read_state(checkpoint)["global_step"]
    except (ValueError, KeyError):
        return f"{TRAINER_STATE_NAME} cannot be read"
    if step != step_of(checkpoint):
        return f"{TRAINER_STATE_NAME} is of step {step}"
    path = checkpoint / SEAL_NAME
    if not path.exists():
        return _damage_inside(checkpoint)
    try:
        sealed = read_object(path, "a seal")
    except ValueError:
        return f"{SEAL_NAME} cannot be read"
    for name, expected in sealed.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected[0]:
            return f"{name} has {file.stat().st_size:,} of {expected[0]:,} bytes"
        if _fingerprint(file) != expected:
            return f"{name} has other content than was written"
    return None


def _damage_inside(checkpoint: Path) -> str | None:
    """Return which file of tensors cannot be read, by what these files say of themselves."""
    for file in sorted(checkpoint.rglob("*")):
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt"):
                    continue
            except SafetensorError:
                return f"{file.name} cannot be read"
        if file.suffix in (".bin", ".pt", ".pth"):  # torch saves archives with checksums
            try:
                with ZipFile(file) as archive:
                    is_whole = archive.testzip() is None
            except BadZipFile:
                is_whole = False
            if not is_whole:
                return f"{file.name} cannot be read"
    return None


def list_checkpoints(work: Path) -> list[Path]:
    """Return the checkpoints of a run that were written to their end, the first step first."""
    return sorted((path for path in _folders(work) if _was_written(path)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint by its name; -1 if it is none."""
    number = checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdecimal() else -1


def choose_checkpoint(work: Path, averaged_steps: Collection[int]) -> tuple[Path | None, list[str]]:
    """Return the last checkpoint from which a run can go on, and what was wrong with later ones.

    Damaged checkpoints are removed, and so are later ones than that which is chosen. A checkpoint
    is of no use without another that is needed at the end: the best one so far, or those whose
    weights are averaged.

    Args:
        work: Folder of the run, which may have been moved since.
        averaged_steps: Steps whose checkpoints are averaged at the end; none if the best is taken.
    """
    for path in _folders(work):
        if not _was_written(path):  # stopped while it was written
            shutil.rmtree(path)
    wrong = []
    whole = []
    for checkpoint in list_checkpoints(work):
        problem = damage(checkpoint)
        if problem is None:
            whole.append(checkpoint)
        else:
            wrong.append(f"{checkpoint}: {problem}")
            shutil.rmtree(checkpoint)
    while whole and not _is_complete(whole, averaged_steps):
        shutil.rmtree(whole.pop())
    if not whole:
        return None, wrong
    _note_place(whole[-1])
    return whole[-1], wrong


def _folders(work: Path) -> list[Path]:
    return [path for path in work.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if step_of(path) >= 0]


def _was_written(checkpoint: Path) -> bool:
    """Return whether a checkpoint has what is written last; that can be damaged."""
    return any((checkpoint / name).exists() for name in (SEAL_NAME, TRAINER_STATE_NAME))


def _is_complete(checkpoints: Sequence[Path], averaged_steps: Collection[int]) -> bool:
    """Return whether what the last checkpoint needs beside itself is there."""
    steps = {step_of(path) for path in checkpoints}
    last = max(steps)
    if averaged_steps:
        return {step for step in averaged_steps if step <= last} <= steps
    best = _read_state(checkpoints[-1]).get("best_model_checkpoint")
    return best is None or step_of(Path(best)) in steps


def _note_place(checkpoint: Path) -> None:
    """Correct where the best checkpoint is: the folder may have been moved, or named otherwise."""
    state = _read_state(checkpoint)
    best = state.get("best_model_checkpoint")
    here = None if best is None else str(checkpoint.parent / Path(best).name)
    if here != best:
        write_json(checkpoint / TRAINER_STATE_NAME, {**state, "best_model_checkpoint": here})
        seal(checkpoint)


def _read_state(checkpoint: Path) -> dict[str, Any]:
    return read_object(checkpoint / TRAINER_STATE_NAME, "the state of a run")


def _fingerprint(path: Path) -> list[int]:
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            size += len(block)
            checksum = zlib.crc32(block, checksum)
    return [size, checksum]
