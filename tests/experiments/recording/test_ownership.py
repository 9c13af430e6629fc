import errno
import multiprocessing
import time
from pathlib import Path

import pytest

from regdrop.experiments.recording.ownership import HeldError, hold, holder

FORK = multiprocessing.get_context("fork")


def hold_long(path, is_held):
    with hold(path, "it"):
        is_held.set()
        time.sleep(60)


def test_a_lock_says_who_holds_it_and_ends_with_its_process(tmp_path):
    path, is_held = tmp_path / "a" / "run.lock", FORK.Event()
    process = FORK.Process(target=hold_long, args=(path, is_held))
    process.start()
    assert is_held.wait(30)
    assert holder(path).startswith(f"process {process.pid} on ")
    with (
        pytest.raises(HeldError, match=rf"the run is at work in process {process.pid} on"),
        hold(path, "the run", seconds=0),
    ):
        pass
    process.kill()
    process.join()
    assert path.exists()
    with hold(path, "the run", seconds=0):
        assert holder(path) is not None
    assert not path.exists()
    assert holder(path) is None


def test_folders_made_for_a_lock_go_with_it_where_they_are_empty(tmp_path):
    with hold(tmp_path / "a" / "b" / "run.lock", "it"):
        pass
    assert not (tmp_path / "a").exists()
    with hold(tmp_path / "a" / "b" / "run.lock", "it"):
        (tmp_path / "a" / "kept").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


def test_looking_at_a_lock_that_a_killed_process_left_removes_it(tmp_path):
    path = tmp_path / "run.lock"
    path.write_text("process 1")
    assert holder(path) is None
    assert not path.exists()


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_lock_ends_with_its_process_where_the_file_system_has_no_locks(tmp_path, monkeypatch):
    """As on a Lustre that is mounted without them: filelock looks in the file for the owner."""

    def no_locks(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", no_locks)
    path, is_held = tmp_path / "run.lock", FORK.Event()
    process = FORK.Process(target=hold_long, args=(path, is_held))
    process.start()
    assert is_held.wait(30)
    with (
        pytest.raises(HeldError, match="the run is at work in another process"),
        hold(path, "the run"),
    ):
        pass
    process.kill()
    process.join()
    with hold(path, "the run"):
        assert holder(path) == "another process"
    assert not path.exists()


def test_a_lock_is_held_where_nobody_can_write_to_its_file(tmp_path, monkeypatch):
    """As on Windows, to what is locked."""

    def refuse(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    for name in ("read_text", "write_text"):
        monkeypatch.setattr(Path, name, refuse)
    path = tmp_path / "run.lock"
    with hold(path, "it"):
        assert holder(path) == "another process"
    assert not path.exists()


def add_ones(folder, count):
    for _ in range(count):
        with hold(folder / "inner" / "run.lock", "it", seconds=60):
            number = int((folder / "number").read_text())
            (folder / "number").write_text(str(number + 1))


def test_processes_that_take_turns_never_meet(tmp_path):
    """Each adds to a number in a file under a lock whose file and folder come and go."""
    (tmp_path / "number").write_text("0")
    processes = [FORK.Process(target=add_ones, args=(tmp_path, 30)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "number").read_text() == "90"
