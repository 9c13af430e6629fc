"""What is written appears whole or not at all, also where its writer is stopped in its middle."""

import errno
import os
from types import SimpleNamespace

import pytest

from regdrop import RDropConfig, whole_files
from regdrop.whole_files import write_text, write_whole


class Stopped(BaseException):
    """Stops a writer, as Ctrl-C would."""


def stop(*args, **kwargs):
    raise Stopped


def test_a_file_that_is_not_whole_never_has_the_name_of_one_that_is(tmp_path):
    path = tmp_path / "new" / "file.txt"

    def write(partial):
        partial.write_text("hal")
        assert partial.parent == path.parent
        assert not path.exists()
        raise Stopped

    with pytest.raises(Stopped):
        write_whole(path, write)
    assert not list(path.parent.iterdir())
    write_text(path, "whole")
    with pytest.raises(Stopped):
        write_whole(path, lambda partial: (partial.write_text("hal"), stop()))
    assert [(each.name, each.read_text()) for each in path.parent.iterdir()] == [
        ("file.txt", "whole")
    ]


def test_a_file_is_on_its_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []

    def fsync(number):
        done.append(("fsync", os.pread(number, 10, 0)))

    def rename(partial, path):
        done.append(("replace", path.name))
        os.replace(partial, path)

    monkeypatch.setattr(whole_files, "os", SimpleNamespace(replace=rename, fsync=fsync))
    write_text(tmp_path / "file.txt", "whole")
    assert done == [("fsync", b"whole"), ("replace", "file.txt")]


def write_a_plot(path):
    from regdrop.experiments.reporting.plots import new_figure, save_figure

    figure, panels = new_figure(1)
    next(panels).plot([0, 1], label="a line")
    save_figure(figure, path)


def write_lines(path):
    from regdrop.commands import app, runs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "load_run", lambda run: None)
        patch.setattr(runs, "generate_lines", lambda *args, **kwargs: iter(["a line"] * 3))
        app(["generate", "run", __file__, "--output", str(path)], standalone_mode=False)


def write_the_state_of_a_checkpoint(path):
    from regdrop.integrations.transformers.run import state

    state._write(path, {"alpha": 1.0})


def write_a_model_card(path):
    from regdrop.integrations.transformers.run import recording

    path.exists() or path.write_text(recording._MARK)
    recording.add_to_model_card(path, RDropConfig())


@pytest.mark.parametrize(
    "write",
    [write_a_plot, write_lines, write_the_state_of_a_checkpoint, write_a_model_card],
    ids=lambda write: write.__name__,
)
def test_each_writer_renames_what_it_has_written_beside(tmp_path, monkeypatch, write):
    path = tmp_path / "result.png"
    with monkeypatch.context() as patch:
        # What is stopped before the new file has its name leaves what was there.
        patch.setattr(whole_files, "os", SimpleNamespace(replace=stop, fsync=os.fsync))
        with pytest.raises(Stopped):
            write(path)
    before = [each.read_bytes() for each in tmp_path.iterdir()]
    assert before in ([], [b"The following hyperparameters were used during training:"])
    write(path)
    assert [each.name for each in tmp_path.iterdir()] == ["result.png"]
    assert path.stat().st_size > 10


def test_lines_of_a_command_that_is_stopped_do_not_block_its_next_try(tmp_path, monkeypatch):
    from regdrop.commands import app, runs

    def lines(*args, **kwargs):
        yield "a line"
        raise Stopped

    output = tmp_path / "output.txt"
    command = ["generate", "run", __file__, "--output", str(output)]
    monkeypatch.setattr(runs, "load_run", lambda run: None)
    monkeypatch.setattr(runs, "generate_lines", lines)
    with pytest.raises(Stopped):
        app(command, standalone_mode=False)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(runs, "generate_lines", lambda *args, **kwargs: iter(["a", "b"]))
    app(command, standalone_mode=False)
    assert output.read_text() == "a\nb\n"


def test_a_full_disk_is_named_by_the_file(tmp_path, monkeypatch):
    def fsync(number):  # the system names no file here
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(whole_files, "os", SimpleNamespace(replace=os.replace, fsync=fsync))
    with pytest.raises(OSError, match=r"No space left on device: '.*file\.txt'"):
        write_text(tmp_path / "file.txt", "text")
    assert not list(tmp_path.iterdir())


def test_what_a_link_points_to_is_written_and_the_link_kept(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / "link.txt", tmp_path / "elsewhere" / "file.txt"
    link.symlink_to(target)
    for text in ("first", "second"):
        write_text(link, text)
        assert link.is_symlink()
        assert target.read_text() == text
    assert [path.name for path in target.parent.iterdir()] == ["file.txt"]
