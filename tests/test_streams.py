import io
import sys

import pytest

import regdrop.commands
from regdrop.cli import main
from regdrop.commands import runs
from regdrop.commands.streams import allow_any_encoding


@pytest.fixture
def redirect(monkeypatch):
    """Give a standard stream an encoding and bytes, as a pipe on Windows has."""

    def make(name, content=b"", encoding="cp1252"):
        held = io.BytesIO(content)
        monkeypatch.setattr(sys, name, io.TextIOWrapper(held, encoding=encoding, newline=""))
        return held

    return make


def test_an_output_that_lacks_letters_shows_the_others_and_every_sign(redirect):
    held = redirect("stdout")
    allow_any_encoding()
    print("\N{MINUS SIGN}0.03 ± 1 文", flush=True)
    assert held.getvalue() == "-0.03 ± 1 ?\n".encode("cp1252")


def test_the_command_line_allows_any_encoding(redirect, monkeypatch):
    held = redirect("stdout", encoding="ascii")
    redirect("stderr", encoding="ascii")
    monkeypatch.setattr(regdrop.commands, "app", lambda: print("±", flush=True))
    main()
    assert held.getvalue() == b"?\n"


def test_lines_are_utf_8_in_a_pipe_whatever_its_encoding(redirect, monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "load_run", lambda folder: None)
    monkeypatch.setattr(runs, "generate_lines", lambda folder, lines, **options: map(str, lines))
    held = redirect("stdout")
    redirect("stdin", "\ufeffMännchen 文\n".encode())  # a mark of the encoding before it
    allow_any_encoding()  # what is generated is exact all the same
    runs.generate(tmp_path, source=None, output=None, num_beams=None, batch_size=1)
    assert held.getvalue().decode() == "Männchen 文\n\n"


def test_a_file_may_begin_with_a_mark_of_its_encoding(redirect, monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "load_run", lambda folder: None)
    monkeypatch.setattr(runs, "generate_lines", lambda folder, lines, **options: map(str, lines))
    held = redirect("stdout")
    (tmp_path / "lines").write_text("ein Haus", encoding="utf-8-sig")
    runs.generate(tmp_path, tmp_path / "lines", output=None, num_beams=None, batch_size=1)
    assert held.getvalue() == b"ein Haus\n"
