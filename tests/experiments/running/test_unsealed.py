"""A checkpoint that was stopped just before its seal is whole where its files say so."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

from regdrop.experiments.running.integrity import damage


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    save_file({"weight": torch.arange(200.0)}, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"numbers": torch.arange(200.0)}, folder / name)
    (folder / "trainer_state.json").write_text('{"global_step": 1}')
    assert damage(folder) is None
    return folder


NAMES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", [0, 0.5])
def test_a_file_that_was_cut_is_named(checkpoint, name, part):
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[: int(len(content) * part)])
    assert damage(checkpoint) == f"{name} cannot be read"


def test_a_number_that_was_changed_is_found(checkpoint):
    content = bytearray((checkpoint / "optimizer.pt").read_bytes())
    content[content.index(torch.tensor(7.0).numpy().tobytes()) + 1] ^= 1
    (checkpoint / "optimizer.pt").write_bytes(content)
    assert damage(checkpoint) == "optimizer.pt cannot be read"


def test_a_pickle_in_place_of_an_archive_is_not_opened(checkpoint):
    (checkpoint / "scheduler.pt").write_bytes(pickle.dumps({"a": 1}))
    assert damage(checkpoint) == "scheduler.pt cannot be read"


@pytest.mark.parametrize(
    ("state", "message"),
    [("{}", "cannot be read"), ("[]", "cannot be read"), ('{"global_step": 2}', "is of step 2")],
)
def test_a_state_of_another_step_or_of_none_is_found(checkpoint, state, message):
    (checkpoint / "trainer_state.json").write_text(state)
    assert damage(checkpoint) == f"trainer_state.json {message}"
